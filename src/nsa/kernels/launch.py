"""Which twin of a kernel runs: Hopper's where it can, else the portable one. All compute the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nsa import decode_tuning, tuning
from nsa.config import NSAConfig
from nsa.kernels import cuda, hopper
from nsa.kernels.triton.combine import Mix, combine
from nsa.kernels.triton.sequence import Spans, Tiles
from nsa.kernels.triton.union import union_lists


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


def select_blocks(
    q: Tensor, k: Tensor, lse: Tensor, spans: Spans, length: int, stride: int, size: int, n: int,
    num_initial: int, num_local: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    """q ``[B, TQ, HQ, D]``, k ``[B, N, HK, D]``, lse ``[B, TQ, HQ]``: int32 ``[B, TQ, HK, n]``."""
    from nsa.kernels.triton.top_n import select_blocks as in_chunks

    return in_chunks(q, k, lse, spans, length, stride, size, n, num_initial, num_local, softmax_scale, _top_n)


def _top_n(
    importance: Tensor, out: Tensor, spans: Spans, tiles: Tiles, tile: int, tile0: int, count: int, ranked: int,
    size: int, n: int, num_initial: int, num_local: int, beside: bool,
) -> None:  # fmt: skip
    arguments = importance, out, spans, tiles, tile, tile0, count, ranked, size, n, num_initial, num_local, beside
    device = importance.device
    if device.type == "cuda" and cuda.ranks(ranked, n, tuning.arch(device)) is None:
        from nsa.kernels.cuda.top_n import program
        from nsa.kernels.cuda.top_n import top_n as in_cuda

        loaded = program(tile, device.index)
        if loaded is not None:
            return in_cuda(loaded, *arguments)
    from nsa.kernels.triton.top_n import top_n as portable

    return portable(*arguments)


def _in_cuda(q: Tensor, k: Tensor, v: Tensor, width: int, size: int) -> bool:
    """Whether kernels in CUDA C++ compute the selected branch of such a call."""
    group, arch = q.shape[2] // k.shape[2], tuning.arch(q.device)
    refused = cuda.supports(q.dtype, q.shape[-1], v.shape[-1], group, size, width, k.shape[1], arch)
    # Where kernels are only compiled, there is no driver to ask.
    return refused is None and _on_hopper(q, v.shape[-1]) and q.device.type == "cuda"


def _selected(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, spans: Spans, size: int, softmax_scale: float, mix: Mix | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The selected branch's output, its lse, and with ``mix`` the gated sum, if the kernel has it in its epilogue."""
    dim, value_dim, group, width = q.shape[-1], v.shape[-1], q.shape[2] // k.shape[2], indices.shape[-1]
    if _in_cuda(q, k, v, width, size):
        from nsa.kernels.cuda.selected_forward import program
        from nsa.kernels.cuda.selected_forward import selected_forward as in_cuda

        loaded = program(q.dtype, group, q.shape[-1], v.shape[-1], q.device.index)
        if loaded is not None:
            return in_cuda(loaded, q, k, v, indices, spans, softmax_scale, mix)
    tile = tuning.selected_forward(dim, value_dim, q.dtype, group, size, tuning.arch(q.device))
    lists = union_lists(indices, spans, tuning.union_queries(group, width, tile.block_m), size)
    if _on_hopper(q, value_dim) and dim == value_dim and size == 64 and lists.queries * group <= 64:
        from nsa.kernels.hopper.selected_forward import selected_forward as in_gluon

        return in_gluon(q, k, v, lists, spans, size, softmax_scale, mix)
    from nsa.kernels.triton.selected_forward import selected_forward as portable

    return *portable(q, k, v, lists, spans, size, softmax_scale), None


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, spans: Spans, size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As ``interval_forward``, over the blocks of ``size`` tokens in ``indices`` int32 ``[B, TQ, HK, width]``, contiguous."""
    return _selected(q, k, v, indices, spans, size, softmax_scale, None)[:2]


def selected_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, indices: Tensor, spans: Spans,
    size: int, softmax_scale: float, need: tuple[bool, bool], dq: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As ``interval_backward``, of ``gate * selected_forward``."""
    dk = dv = None
    if need[0]:
        dq = _selected_dq(q, k, v, do, shift, delta, indices, spans, size, softmax_scale, dq)
    if need[1]:
        if _on_hopper(q, v.shape[-1]) and hopper.gathers(q.shape[2] // k.shape[2], size):
            from nsa.kernels.hopper.selected_dkv import selected_dkv
        else:
            from nsa.kernels.triton.selected_backward import selected_dkv
        dk, dv = selected_dkv(q, k, v, do, shift, delta, indices, spans, size, softmax_scale)
    return dq, dk, dv


def _selected_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, indices: Tensor, spans: Spans,
    size: int, softmax_scale: float, dq: Tensor | None,
) -> Tensor:  # fmt: skip
    group, width = q.shape[2] // k.shape[2], indices.shape[-1]
    if _in_cuda(q, k, v, width, size):
        from nsa.kernels.cuda.selected_dq import program
        from nsa.kernels.cuda.selected_dq import selected_dq as in_cuda

        loaded = program(q.dtype, group, q.shape[-1], v.shape[-1], q.device.index)
        if loaded is not None:
            return in_cuda(loaded, q, k, v, do, shift, delta, indices, spans, softmax_scale, dq)
    from nsa.kernels.triton.selected_backward import selected_dq as portable

    tile = tuning.selected_dq(q.shape[-1], v.shape[-1], q.dtype, group, size, tuning.arch(q.device))
    lists = union_lists(indices, spans, tuning.union_queries(group, width, tile.block_m), size)
    return portable(q, k, v, do, shift, delta, lists, spans, size, softmax_scale, dq)


def selected_and_combined(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, spans: Spans, size: int, softmax_scale: float,
    o_cmp: Tensor, o_win: Tensor, gates: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gated sum of the branches, the selected branch's output (with ``save``, else empty) and its lse.

    o_cmp, o_win contiguous ``[B, TQ, HQ, DV]``, gates contiguous ``[B, TQ, HQ, 3]``.
    """
    o_slc, lse, o = _selected(q, k, v, indices, spans, size, softmax_scale, Mix(o_cmp, o_win, gates, save))
    if o is None:
        o, o_slc = combine(o_cmp, o_slc, o_win, gates), o_slc if save else o_slc.new_empty(0)
    return o, o_slc, lse


def decode(
    q: Tensor, gates: Tensor, pools: Sequence[Tensor], rings: Sequence[Tensor], table: Tensor, lengths: Tensor,
    max_seq_len: int, paged: bool, cfg: NSAConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``kernels.triton.decode.decode``."""
    from nsa.kernels.cuda.decode_step import decode_step, program, supports
    from nsa.kernels.triton.decode import decode as in_launches

    refused = supports(q, cfg.value_dim, paged, max_seq_len, cfg, tuning.arch(q.device))
    pairs = q.shape[0] * cfg.num_kv_heads
    if refused is None and q.device.type == "cuda" and decode_tuning.whole(pairs, tuning.multiprocessors(q.device)):
        kernel = program(q.dtype, q.shape[-1], cfg.value_dim, q.device.index)
        if kernel is not None:
            return decode_step(kernel, q, gates, pools, rings, lengths, cfg)
    return in_launches(q, gates, pools, rings, table, lengths, max_seq_len, paged, cfg)
