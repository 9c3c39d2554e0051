"""Which twin of a kernel runs: Hopper's where it can, else the portable one. Both compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nsa import tuning
from nsa.kernels import hopper
from nsa.kernels.triton.sequence import Spans
from nsa.kernels.triton.union import UnionLists


def _on_hopper(q: Tensor, value_dim: int) -> bool:
    return hopper.supports(q.dtype, q.shape[-1], value_dim, tuning.arch(q.device)) is None


def interval_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, length: int, stride: int, window: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """q ``[B, TQ, HQ, D]``, k ``[B, T, HK, D]``, v ``[B, T, HK, DV]``: o ``[B, TQ, HQ, DV]`` and lse fp32 ``[B, HQ, TQ]``."""
    if _on_hopper(q, v.shape[-1]):
        from nsa.kernels.hopper.interval_forward import interval_forward as forward
    else:
        from nsa.kernels.triton.interval_forward import interval_forward as forward
    return forward(q, k, v, spans, length, stride, window, softmax_scale)


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: UnionLists, spans: Spans, size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As ``interval_forward``, over the union lists of the queries' blocks of ``size`` tokens."""
    rows = lists.queries * (q.shape[2] // k.shape[2])
    if _on_hopper(q, v.shape[-1]) and q.shape[-1] == v.shape[-1] and size == 64 and rows <= 64:
        from nsa.kernels.hopper.selected_forward import selected_forward as forward
    else:
        from nsa.kernels.triton.selected_forward import selected_forward as forward
    return forward(q, k, v, lists, spans, size, softmax_scale)


@dataclass(frozen=True)
class Importance:
    """``score``, as ``kernels.triton.importance.block_importance``, works on tiles of ``queries``."""

    queries: int
    score: Callable[..., None]


def importance(q: Tensor, stride: int, size: int) -> Importance:
    """How to score blocks of ``size`` tokens by compressed blocks that are ``stride`` apart."""
    per = size // stride
    if _on_hopper(q, q.shape[-1]) and per <= 16 and per & (per - 1) == 0:
        from nsa.kernels.hopper.importance import block_importance

        return Importance(tuning.HOPPER_IMPORTANCE_QUERIES, block_importance)
    from nsa.kernels.triton.importance import block_importance

    return Importance(tuning.importance(q.shape[-1], q.dtype, tuning.arch(q.device)).block_m, block_importance)
