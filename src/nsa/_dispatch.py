"""Which backend computes a call. One that is named runs or says why it can't; none falls back silently."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.layout import SeqInfo

_HOME = {"reference": "nsa.reference"}
BACKENDS = tuple(_HOME)


class Backend(Protocol):
    """What a backend's module provides: the steps of ``functional.py`` on arguments that were checked there."""

    def compress_blocks(
        self, x: Tensor, cfg: NSAConfig, cu_seqlens: Tensor | None, embedding: Tensor | None, weights: tuple[Tensor, ...]
    ) -> Tensor: ...
    def compressed_attention(self, q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> tuple[Tensor, Tensor]: ...
    def select_blocks(self, q: Tensor, k: Tensor, lse: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor: ...
    def selected_attention(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor: ...
    def window_attention(self, q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor: ...
    def combine(self, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor: ...


def supports(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if ``backend`` computes on tensors like these, else the reason it can't."""
    if backend not in BACKENDS:
        return f"there is no such backend; the backends are {', '.join(BACKENDS)}"
    return None


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The module whose functions compute the steps.

    Raises:
        ValueError: ``backend`` is unknown or cannot compute on these tensors; the message says why.
    """
    if backend is None:
        backend = default(device)
    reason = supports(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"backend {backend!r} can't run on {device.type} tensors of {dtype}: {reason}")
    return cast(Backend, importlib.import_module(_HOME[backend]))


def default(device: torch.device) -> str:
    """The backend that ``backend=None`` means for tensors on ``device``."""
    return "reference"
