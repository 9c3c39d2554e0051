"""Which twin of a kernel runs: Hopper's where it can, else the portable one. Both compute the same."""

from __future__ import annotations

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


def interval_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, spans: Spans,
    length: int, stride: int, window: int, softmax_scale: float, need: tuple[bool, bool], dq: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv of ``gate * interval_forward``; ``need`` says whether those of the queries and those of keys and values are
    wanted. Those of the queries are added to ``dq`` where there is one.

    do ``[B, TQ, HQ, DV]``; shift, which carries the gate, and delta fp32 ``[B, HQ, TQ]``, of one layout.
    """
    arguments = q, k, v, do, shift, delta, spans, length, stride, window, softmax_scale
    if _on_hopper(q, v.shape[-1]):
        from nsa.kernels.hopper.interval_dkv import interval_dkv
        from nsa.kernels.hopper.interval_dq import interval_dq
    else:
        from nsa.kernels.triton.interval_backward import interval_dkv, interval_dq
    dk = dv = None
    if need[0]:
        dq = interval_dq(*arguments, dq)
    if need[1]:
        parts = zip(interval_dkv(*arguments), (k, v))
        dk, dv = (x[0].to(y.dtype) if len(x) == 1 else x.sum(0).to(y.dtype) for x, y in parts)
    return dq, dk, dv


def _selected_on_hopper(q: Tensor, k: Tensor, v: Tensor, lists: UnionLists, size: int) -> bool:
    rows = lists.queries * (q.shape[2] // k.shape[2])
    return _on_hopper(q, v.shape[-1]) and q.shape[-1] == v.shape[-1] and size == 64 and rows <= 64


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: UnionLists, spans: Spans, size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As ``interval_forward``, over the union lists of the queries' blocks of ``size`` tokens."""
    if _selected_on_hopper(q, k, v, lists, size):
        from nsa.kernels.hopper import selected_forward as kernels

        return kernels.selected_forward(q, k, v, lists, spans, size, softmax_scale)[:2]
    from nsa.kernels.triton.selected_forward import selected_forward as forward

    return forward(q, k, v, lists, spans, size, softmax_scale)


def selected_and_combined(
    q: Tensor, k: Tensor, v: Tensor, lists: UnionLists, spans: Spans, size: int, softmax_scale: float,
    o_cmp: Tensor, o_win: Tensor, gates: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gated sum of the branches, the selected branch's output (with ``save``, else empty) and its lse.

    o_cmp, o_win contiguous ``[B, TQ, HQ, DV]``, gates contiguous ``[B, TQ, HQ, 3]``.
    """
    if _selected_on_hopper(q, k, v, lists, size):
        from nsa.kernels.hopper import selected_forward as kernels

        mix = kernels.Mix(o_cmp, o_win, gates, save)
        o_slc, lse, o = kernels.selected_forward(q, k, v, lists, spans, size, softmax_scale, mix)
        assert o is not None
        return o, o_slc, lse
    from nsa.kernels.triton.combine import combine
    from nsa.kernels.triton.selected_forward import selected_forward as forward

    o_slc, lse = forward(q, k, v, lists, spans, size, softmax_scale)
    return combine(o_cmp, o_slc, o_win, gates), o_slc if save else o_slc.new_empty(0), lse
