"""Native Sparse Attention as one PyTorch operator.

The steps alone cannot share what lies between them. Whole, the gated sum rides in a branch's epilogue, and the backward needs
no gradient of a branch's output: the branches take dO and the gate, and add into one dq.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from nsa.config import NSAConfig
from nsa.layout import SeqInfo
from nsa.ops.arguments import LENGTHS, kernel_rows, lengths, on_device_of, sequence_info

NUMBERS = "int length, int stride, int size, int n, int num_initial, int num_local, int window, float scale"
KEYS = "Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, Tensor v_win"
BRANCHES = 3


@custom_op(
    "nsa::attention",
    mutates_args=(),
    schema=f"(Tensor q, {KEYS}, Tensor gates, Tensor? indices, {LENGTHS}, {NUMBERS}, bool save) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_op(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    indices: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int,
    length: int, stride: int, size: int, n: int, num_initial: int, num_local: int, window: int, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o ``[B, TQ, HQ, DV]``; the selection int32 ``[B, TQ, HK, n]``, empty where ``indices`` is given; and for the backward,
    empty without ``save``, the outputs of the branches and their lse fp32 ``[B, HQ, TQ]``, each compressed, selected, window.
    """
    from nsa.kernels.launch import interval_forward, select_blocks, selected_and_combined
    from nsa.kernels.triton.sequence import spans

    with on_device_of(q):
        info = sequence_info(q, cu_q, cu_k, lens, seqlen_k)
        q, k_cmp = kernel_rows(q), kernel_rows(k_cmp)
        where = spans(q.shape[1], k_cmp.shape[1], info, length, stride)
        o_cmp, lse_cmp = interval_forward(q, k_cmp, kernel_rows(v_cmp), where, length, stride, 0, scale)
        new = q.new_empty(0, dtype=torch.int32)
        if indices is None:
            by_row = lse_cmp.transpose(1, 2)
            indices = new = select_blocks(q, k_cmp, by_row, where, length, stride, size, n, num_initial, num_local, scale)
        where = spans(q.shape[1], k_win.shape[1], info, 1, 1)
        o_win, lse_win = interval_forward(q, kernel_rows(k_win), kernel_rows(v_win), where, 1, 1, window, scale)
        where = spans(q.shape[1], k_slc.shape[1], info, 1, 1)
        o, o_slc, lse_slc = selected_and_combined(
            q, kernel_rows(k_slc), kernel_rows(v_slc), indices.contiguous(), where, size, scale,
            o_cmp, o_win, gates.contiguous(), save,
        )  # fmt: skip
    saved = (o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win) if save else [q.new_empty(0) for _ in range(2 * BRANCHES)]
    return (o, new, *saved)


@attention_op.register_fake
def _(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *args: Any) -> tuple[Tensor, ...]:
    batch, rows, heads = q.shape[:3]
    indices, n, save = args[5], args[13], args[-1]
    outputs = [q.new_empty(batch, rows, heads, v_cmp.shape[-1]) for _ in range(1 + BRANCHES)]
    new = q.new_empty((batch, rows, k_cmp.shape[2], n) if indices is None else 0, dtype=torch.int32)
    if not save:
        return (outputs[0], new, *(q.new_empty(0) for _ in range(2 * BRANCHES)))
    lse = [q.new_empty((batch, heads, rows), dtype=torch.float32) for _ in range(BRANCHES)]
    return (outputs[0], new, *outputs[1:], *lse)


@custom_op(
    "nsa::attention_backward",
    mutates_args=(),
    schema=f"(Tensor q, {KEYS}, Tensor gates, Tensor indices, Tensor[] o, Tensor[] lse, Tensor do, {LENGTHS}, {NUMBERS}, "
    "bool need_q, bool[] need_kv) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward_op(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    indices: Tensor, o: list[Tensor], lse: list[Tensor], do: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int,
    length: int, stride: int, size: int, n: int, num_initial: int, num_local: int, window: int, scale: float,
    need_q: bool, need_kv: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of each branch, dgates; an empty tensor for what is not needed. ``o``, ``lse``, ``need_kv`` by branch."""
    from nsa.kernels.launch import interval_backward, selected_backward
    from nsa.kernels.triton.sequence import spans
    from nsa.kernels.triton.statistics import gate_statistics

    with on_device_of(q):
        info = sequence_info(q, cu_q, cu_k, lens, seqlen_k)
        q, do, indices = kernel_rows(q), kernel_rows(do), indices.contiguous()
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = map(kernel_rows, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win))
        dgates, shift, delta = gate_statistics((o[0], o[1], o[2]), (lse[0], lse[1], lse[2]), gates.contiguous(), do)
        grads: list[Tensor | None] = []
        where = spans(q.shape[1], k_cmp.shape[1], info, length, stride)
        dq, *found = interval_backward(
            q, k_cmp, v_cmp, do, shift[0], delta[0], where, length, stride, 0, scale, (need_q, need_kv[0])
        )
        grads += found
        where = spans(q.shape[1], k_slc.shape[1], info, 1, 1)
        dq, *found = selected_backward(
            q, k_slc, v_slc, do, shift[1], delta[1], indices, where, size, scale, (need_q, need_kv[1]), dq
        )
        grads += found
        where = spans(q.shape[1], k_win.shape[1], info, 1, 1)
        dq, *found = interval_backward(
            q, k_win, v_win, do, shift[2], delta[2], where, 1, 1, window, scale, (need_q, need_kv[2]), dq
        )
        grads += found
    empty = [q.new_empty(0) if x is None else x for x in (dq, *grads)]
    return (*empty, dgates)  # type: ignore[return-value]


@attention_backward_op.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    need_q, need_kv = args[-2:]
    needed = [need_q, *(need_kv[i // 2] for i in range(2 * BRANCHES)), True]
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else q.new_empty(0)
        for x, need in zip((q, *args[: 2 * BRANCHES + 1]), needed)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, indices, cu_q, cu_k, lens, seqlen_k = inputs[:13]
    ctx.numbers = (seqlen_k, *inputs[13:-1])
    _, new, *saved = output
    ctx.save_for_backward(*tensors, new if indices is None else indices, *saved, cu_q, cu_k, lens)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, do: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    rest = (None,) * (len(needed) - 8)
    if do is None:
        return (*(None,) * 8, *rest)
    everything = ctx.saved_tensors  # once: checkpointing allows no second look
    *tensors, indices = everything[:9]
    saved, info = everything[9:15], everything[15:]
    need_kv = [any(needed[1 + 2 * b : 3 + 2 * b]) for b in range(BRANCHES)]
    grads = attention_backward_op(
        *tensors, indices, list(saved[:3]), list(saved[3:]), do, *info, *ctx.numbers, needed[0], need_kv
    )
    return (*(grad if need else None for grad, need in zip(grads, needed)), *rest)


attention_op.register_autograd(_gradient, setup_context=_save)


def attention(
    q: Tensor, keys: tuple[Tensor, ...], gates: Tensor, indices: Tensor | None, cfg: NSAConfig, info: SeqInfo
) -> tuple[Tensor, Tensor]:
    """The gated sum of all branches, and the blocks that the selected one read; ``keys`` k and v of each branch."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *keys, gates))
    o, new, *_ = attention_op(
        q, *keys, gates, indices, *lengths(info), cfg.block_length, cfg.block_stride, cfg.selection_block_size,
        cfg.num_selected_blocks, cfg.num_initial_blocks, cfg.num_local_blocks, cfg.window_size, cfg.softmax_scale, save,
    )  # fmt: skip
    return o, new if indices is None else indices
