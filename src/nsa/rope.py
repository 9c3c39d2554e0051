"""Rotary position embedding, in the half-split convention of GPT-NeoX and Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn ``x [B, T, H, D]`` by its ``positions [T]`` or ``[B, T]``; D even. Angles in fp32, output in x's dtype.

    Source: RoFormer, arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions.to(torch.float32)[..., None] * frequency)[..., None, :]  # [(B,) T, 1, D / 2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def positions_in(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Position of each of ``rows`` packed rows inside its own sequence: int64 ``[rows]``."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return row - cu_seqlens[sequence.clamp_max(cu_seqlens.numel() - 1)]
