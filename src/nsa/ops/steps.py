"""The steps as PyTorch operators: schema, fake kernel and autograd formula of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from nsa.ops.arguments import LENGTHS, kernel_rows, on_device_of, sequence_info

# Attention over an interval of the keys: the compressed branch and the window.


@custom_op(
    "nsa::interval",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {LENGTHS}, int length, int stride, int window, float scale) -> (Tensor, Tensor)",
)
def interval_op(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int,
    length: int, stride: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output ``[B, TQ, HQ, DV]`` and lse fp32 ``[B, HQ, TQ]``."""
    from nsa.kernels.launch import interval_forward
    from nsa.kernels.triton.sequence import spans

    with on_device_of(q):
        where = spans(q.shape[1], k.shape[1], sequence_info(q, cu_q, cu_k, lens, seqlen_k), length, stride)
        return interval_forward(kernel_rows(q), kernel_rows(k), kernel_rows(v), where, length, stride, window, scale)


@interval_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _attention_like(q, v)


def _attention_like(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, heads = q.shape[:3]
    return q.new_empty(batch, rows, heads, v.shape[-1]), q.new_empty((batch, heads, rows), dtype=torch.float32)


@custom_op(
    "nsa::interval_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, "
    f"{LENGTHS}, int length, int stride, int window, float scale, bool need_q, bool need_kv) -> (Tensor, Tensor, Tensor)",
)
def interval_backward_op(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int,
    length: int, stride: int, window: int, scale: float, need_q: bool, need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; an empty tensor for what is not needed."""
    from nsa.kernels import launch as kernels
    from nsa.kernels.triton.sequence import spans
    from nsa.kernels.triton.statistics import row_statistics

    with on_device_of(q):
        q, k, v, do = kernel_rows(q), kernel_rows(k), kernel_rows(v), kernel_rows(do)
        where = spans(q.shape[1], k.shape[1], sequence_info(q, cu_q, cu_k, lens, seqlen_k), length, stride)
        statistics = row_statistics(o, do, lse)
        grads = kernels.interval_backward(q, k, v, do, *statistics, where, length, stride, window, scale, (need_q, need_kv))
    return _present(q, grads)


def _present(q: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(0) if g is None else g for g in grads)
    return dq, dk, dv


@interval_backward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(q, k, v, args[-2], args[-1])


def _gradients_like(q: Tensor, k: Tensor, v: Tensor, need_q: bool, need_kv: bool) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return _present(q, (like[0] if need_q else None, *(like[1:] if need_kv else (None, None))))


def _save_interval(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, lens, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, lens)
    ctx.set_materialize_grads(False)


def _interval_gradient(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, o, lse, cu_q, cu_k, lens = ctx.saved_tensors
    need_q, need_kv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    rest = (None,) * (3 + len(ctx.numbers))
    if do is None:
        return (None, None, None, *rest)
    grads = interval_backward_op(q, k, v, o, lse, do, cu_q, cu_k, lens, *ctx.numbers, need_q, need_kv)
    return (*_wanted(grads, need_q, need_kv), *rest)


def _wanted(grads: tuple[Tensor, Tensor, Tensor], need_q: bool, need_kv: bool) -> tuple[Tensor | None, ...]:
    return (grads[0] if need_q else None, *(grads[1:] if need_kv else (None, None)))


interval_op.register_autograd(_interval_gradient, setup_context=_save_interval)


# The selection.


@custom_op(
    "nsa::select_blocks",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor lse, {LENGTHS}, int length, int stride, int size, int n, int num_initial, "
    "int num_local, float scale) -> Tensor",
)
def select_op(
    q: Tensor, k: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int,
    length: int, stride: int, size: int, n: int, num_initial: int, num_local: int, scale: float,
) -> Tensor:  # fmt: skip
    """int32 ``[B, TQ, HK, n]``; lse fp32 ``[B, TQ, HQ]``."""
    from nsa.kernels.launch import select_blocks
    from nsa.kernels.triton.sequence import spans

    with on_device_of(q):
        where = spans(q.shape[1], k.shape[1], sequence_info(q, cu_q, cu_k, lens, seqlen_k), length, stride)
        return select_blocks(kernel_rows(q), kernel_rows(k), lse, where, length, stride, size, n, num_initial, num_local, scale)


@select_op.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, *args: Any) -> Tensor:
    n = args[7]
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2], n), dtype=torch.int32)


# Selected attention.


@custom_op(
    "nsa::selected",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor indices, {LENGTHS}, int size, float scale) -> (Tensor, Tensor)",
)
def selected_op(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int, size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output ``[B, TQ, HQ, DV]`` and lse fp32 ``[B, HQ, TQ]``."""
    from nsa.kernels.launch import selected_forward
    from nsa.kernels.triton.sequence import spans

    with on_device_of(q):
        where = spans(q.shape[1], k.shape[1], sequence_info(q, cu_q, cu_k, lens, seqlen_k), 1, 1)
        return selected_forward(kernel_rows(q), kernel_rows(k), kernel_rows(v), indices.contiguous(), where, size, scale)


@selected_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _attention_like(q, v)


@custom_op(
    "nsa::selected_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor o, Tensor lse, Tensor do, "
    f"{LENGTHS}, int size, float scale, bool need_q, bool need_kv) -> (Tensor, Tensor, Tensor)",
)
def selected_backward_op(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, o: Tensor, lse: Tensor, do: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int,
    size: int, scale: float, need_q: bool, need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; an empty tensor for what is not needed."""
    from nsa.kernels import launch as kernels
    from nsa.kernels.triton.sequence import spans
    from nsa.kernels.triton.statistics import row_statistics

    with on_device_of(q):
        q, k, v, do, indices = kernel_rows(q), kernel_rows(k), kernel_rows(v), kernel_rows(do), indices.contiguous()
        where = spans(q.shape[1], k.shape[1], sequence_info(q, cu_q, cu_k, lens, seqlen_k), 1, 1)
        statistics = row_statistics(o, do, lse)
        grads = kernels.selected_backward(q, k, v, do, *statistics, indices, where, size, scale, (need_q, need_kv))
    return _present(q, grads)


@selected_backward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(q, k, v, args[-2], args[-1])


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, cu_q, cu_k, lens, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, indices, *output, cu_q, cu_k, lens)
    ctx.set_materialize_grads(False)


def _selected_gradient(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, indices, o, lse, cu_q, cu_k, lens = ctx.saved_tensors
    need_q, need_kv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    rest = (None,) * (4 + len(ctx.numbers))
    if do is None:
        return (None, None, None, *rest)
    grads = selected_backward_op(q, k, v, indices, o, lse, do, cu_q, cu_k, lens, *ctx.numbers, need_q, need_kv)
    return (*_wanted(grads, need_q, need_kv), *rest)


selected_op.register_autograd(_selected_gradient, setup_context=_save_selected)


# The gated sum.


@custom_op("nsa::combine", mutates_args=(), schema="(Tensor o_cmp, Tensor o_slc, Tensor o_win, Tensor gates) -> Tensor")
def combine_op(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    from nsa.kernels.triton.combine import combine

    with on_device_of(o_cmp):
        return combine(o_cmp.contiguous(), o_slc.contiguous(), o_win.contiguous(), gates.contiguous())


@combine_op.register_fake
def _(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    return o_cmp.new_empty(o_cmp.shape)


@custom_op(
    "nsa::combine_backward",
    mutates_args=(),
    schema="(Tensor o_cmp, Tensor o_slc, Tensor o_win, Tensor gates, Tensor do) -> (Tensor, Tensor, Tensor, Tensor)",
)
def combine_backward_op(
    o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from nsa.kernels.triton.combine import combine_backward

    with on_device_of(o_cmp):
        return combine_backward(o_cmp.contiguous(), o_slc.contiguous(), o_win.contiguous(), gates.contiguous(), do.contiguous())


@combine_backward_op.register_fake
def _(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, g = (x.new_empty(x.shape) for x in (o_cmp, o_slc, o_win, gates))
    return a, b, c, g


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


combine_op.register_autograd(lambda ctx, do: combine_backward_op(*ctx.saved_tensors, do), setup_context=_save_all)


# The blocks that the compressor reads.


@custom_op("nsa::blocks", mutates_args=(), schema="(Tensor x, Tensor? cu_seqlens, int length, int stride, bool mean) -> Tensor")
def blocks_op(x: Tensor, cu_seqlens: Tensor | None, length: int, stride: int, mean: bool) -> Tensor:
    from nsa.kernels.triton.blocks import blocks

    with on_device_of(x):
        return blocks(kernel_rows(x), cu_seqlens, length, stride, mean)


@blocks_op.register_fake
def _(x: Tensor, cu_seqlens: Tensor | None, length: int, stride: int, mean: bool) -> Tensor:
    batch, tokens, heads, dim = x.shape
    whole = 0 if tokens < length else (tokens - length) // stride + 1
    rows = whole if cu_seqlens is None else tokens // stride
    return x.new_empty((batch, rows, heads, dim) if mean else (batch, rows, heads, length, dim))


@custom_op(
    "nsa::blocks_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? cu_seqlens, SymInt tokens, int length, int stride, bool mean) -> Tensor",
)
def blocks_backward_op(dout: Tensor, cu_seqlens: Tensor | None, tokens: int, length: int, stride: int, mean: bool) -> Tensor:
    from nsa.kernels.triton.blocks import blocks_backward

    with on_device_of(dout):
        return blocks_backward(dout.contiguous(), cu_seqlens, tokens, length, stride, mean)


@blocks_backward_op.register_fake
def _(dout: Tensor, cu_seqlens: Tensor | None, tokens: int, length: int, stride: int, mean: bool) -> Tensor:
    return dout.new_empty(dout.shape[0], tokens, dout.shape[2], dout.shape[-1])


def _save_blocks(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu_seqlens, *ctx.numbers = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(cu_seqlens)


def _blocks_gradient(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return blocks_backward_op(dout, *ctx.saved_tensors, ctx.tokens, *ctx.numbers), None, None, None, None


blocks_op.register_autograd(_blocks_gradient, setup_context=_save_blocks)
