"""Keys and values of a block as one: equation 7 of arXiv 2502.11089."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from nsa.config import NSAConfig


def gather_blocks(x: Tensor, cfg: NSAConfig, cu_seqlens: Tensor | None) -> Tensor:
    """The overlapping blocks of every sequence: ``[B, T, HK, D]`` to ``[B, N, HK, l, D]``.

    Packed: ``T // d`` rows, of which sequence ``b`` owns ``N(T_b)`` in order from row 0; the rest are 0. No lengths are
    read on the host.
    """
    length, stride = cfg.block_length, cfg.block_stride
    if cu_seqlens is None:
        if x.shape[1] < length:
            return x.new_zeros(x.shape[0], 0, x.shape[2], length, x.shape[3])
        return x.unfold(1, length, stride).transpose(-1, -2)
    rows = torch.arange(x.shape[1] // stride, device=x.device)
    lens = cu_seqlens.diff().long()
    owned = torch.where(lens < length, 0, (lens - length) // stride + 1)
    ends = owned.cumsum(0)
    if lens.numel() == 0 or rows.numel() == 0:
        return x.new_zeros(1, rows.numel(), x.shape[2], length, x.shape[3])
    sequence = torch.searchsorted(ends, rows, right=True)
    inside = sequence < lens.numel()
    sequence = sequence.clamp_max(lens.numel() - 1)
    start = cu_seqlens[:-1].long()[sequence] + (rows - (ends - owned)[sequence]) * stride
    token = torch.where(inside, start, 0)[:, None] + torch.arange(length, device=x.device)
    blocks = x[0, token.clamp(0, x.shape[1] - 1)].transpose(1, 2)  # [rows, HK, l, D]
    return torch.where(inside[:, None, None, None], blocks, 0)[None]


def compress_blocks(
    x: Tensor, cfg: NSAConfig, cu_seqlens: Tensor | None, embedding: Tensor | None, weights: tuple[Tensor, ...]
) -> Tensor:
    """``phi`` over the blocks of ``x [B, T, HK, D]``: ``[B, N, HK, D]``.

    ``weights`` are ``()`` for the mean, ``(w [D, l*D],)`` for linear, ``(w1 [hidden, l*D], w2 [D, hidden])`` for the MLP;
    ``embedding [l, D]`` is added to each block first.
    """
    blocks = gather_blocks(x, cfg, cu_seqlens)
    if not weights:
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        return blocks.mean(-2, dtype=acc).to(x.dtype)
    assert embedding is not None
    # The embedding's share is the same for every block: it is added after the product, in the product's own dtype.
    first = linear(blocks.flatten(-2), weights[0])
    first = first + linear(embedding.flatten().to(weights[0].dtype), weights[0]).to(first.dtype)
    return first if len(weights) == 1 else linear(silu(first), weights[1])
