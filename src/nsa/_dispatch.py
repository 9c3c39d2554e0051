"""Which backend computes a call. One that is named runs or says why it can't; none falls back silently."""

from __future__ import annotations

import importlib.util
import os
from typing import Protocol, cast

import torch
from torch import Tensor

import nsa.ops
import nsa.reference
from nsa.config import NSAConfig
from nsa.layout import SeqInfo

BACKENDS = ("reference", "triton")
# Read once, like Triton does when it decorates a kernel; looking them up in a call would break a compiled graph.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class Backend(Protocol):
    """What a backend's module provides: the steps of ``functional.py``, and the whole, on arguments that were checked there."""

    def compress_blocks(
        self, x: Tensor, cfg: NSAConfig, cu_seqlens: Tensor | None, embedding: Tensor | None, weights: tuple[Tensor, ...]
    ) -> Tensor: ...
    def compressed_attention(self, q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> tuple[Tensor, Tensor]: ...
    def select_blocks(self, q: Tensor, k: Tensor, lse: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor: ...
    def selected_attention(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor: ...
    def window_attention(self, q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor: ...
    def combine(self, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor: ...
    def attention(
        self, q: Tensor, keys: tuple[Tensor, ...], gates: Tensor, indices: Tensor | None, cfg: NSAConfig, info: SeqInfo
    ) -> tuple[Tensor, Tensor]: ...


def supports(backend: str, device: torch.device, dtype: torch.dtype, cfg: NSAConfig | None = None) -> str | None:
    """``None`` if ``backend`` computes on tensors like these, with this configuration if given; else the reason it can't."""
    if backend not in BACKENDS:
        return f"there is no such backend; the backends are {', '.join(BACKENDS)}"
    return _triton(device, dtype, cfg) if backend == "triton" else None


def _triton(device: torch.device, dtype: torch.dtype, cfg: NSAConfig | None) -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed"
    if device.type not in ("cuda", "cpu"):
        return "the kernels need a CUDA or ROCm device"
    if device.type == "cpu" and not _INTERPRETED:
        return "on the CPU the kernels only run in Triton's interpreter, which needs TRITON_INTERPRET=1 before the import"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 matrices wrongly; fp16 and fp32 work"
    if dtype == torch.float64:
        return "the kernels compute in fp32; the reference backend takes fp64"
    if cfg is not None and not all(16 <= dim <= 256 and dim % 8 == 0 for dim in (cfg.head_dim, cfg.value_dim)):
        return f"head_dim and value_dim must be multiples of 8 from 16 to 256, got {cfg.head_dim} and {cfg.value_dim}"
    if cfg is not None and cfg.group_size > 128:
        return f"num_heads / num_kv_heads must be at most 128, got {cfg.group_size}"
    if cfg is not None and cfg.selection_block_size > 128:
        return f"selection_block_size must be at most 128, got {cfg.selection_block_size}"
    return None


def choose(backend: str | None, device: torch.device, dtype: torch.dtype, cfg: NSAConfig | None = None) -> Backend:
    """The module whose functions compute the steps.

    Raises:
        ValueError: ``backend`` is unknown or cannot compute on these tensors; the message says why.
    """
    if backend is None:
        backend = default(device)
    reason = supports(backend, device, dtype, cfg)
    if reason is not None:
        raise ValueError(f"backend {backend!r} can't run on {device.type} tensors of {dtype}: {reason}")
    return cast(Backend, nsa.ops if backend == "triton" else nsa.reference)


def default(device: torch.device) -> str:
    """The backend that ``backend=None`` means for tensors on ``device``: the kernels on a GPU, the reference elsewhere."""
    return "triton" if device.type == "cuda" else "reference"
