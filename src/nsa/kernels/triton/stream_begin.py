"""What a streaming step has to do before it attends: its length, its gates, and the means of blocks that ended.

They need nothing of each other, so they are programs of one launch. The length is a number of the launch: the host writes to no
memory that a step before this one may still read.

Block ``i`` is written where ``decode_compressed`` reads it, to the row of the stride in which it ends, ``i + l / d - 1``. Block
sizes are numbers of the launch: a program goes over a block's tokens in a loop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.dependent import dependents_may_start, launch_options, wait_for_inputs
from nsa.kernels.triton.tile import load_rows, wide

TOKENS = 32  # of a mean that are loaded together: one wait for memory where blocks are no longer
# Whose gates a program computes. While one of these programs is on a multiprocessor, the compressed branch's, which need more
# shared memory, may not get onto it: so a step has few of them, or those crowd where the first of these have ended.
HEADS = 8


@triton.jit
def _gates(q, gate_weights, gates, row, keep, gated, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """The three gates of each of the ``BH`` heads ``row``."""
    branch, dims = tl.arange(0, 4), tl.arange(0, BD)
    gate = tl.full([BH, 4], 1.0 / 3.0, tl.float32)
    if gated:
        x = load_rows(q, row * D, dims, keep, D).to(tl.float32)
        w = load_rows(gate_weights, branch * D, dims, branch < 3, D).to(tl.float32)
        gate = tl.sigmoid(tl.sum(x[:, None, :] * w[None, :, :], 2))
    tl.store(gates + row[:, None] * 3 + branch[None, :], gate, mask=keep[:, None] & (branch < 3)[None, :])


@triton.jit
def _mean(x, out, start, hk, kv_heads, length, BT: tl.constexpr, DIM: tl.constexpr, BDIM: tl.constexpr):
    """Into the row ``out``: the mean of the ``length`` rows of ``x`` from ``start`` on."""
    dims, token = tl.arange(0, BDIM), tl.arange(0, BT)
    total = tl.zeros([BDIM], tl.float32)
    for first in tl.range(0, length, BT):
        row = (start + first + token) * kv_heads + hk
        total += tl.sum(load_rows(x, row * DIM, dims, first + token < length, DIM).to(tl.float32), 0)
    tl.store(out + dims, (total / length).to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=["seq_len", "gated", "first", "group", "kv_heads", "length", "stride"])
def stream_begin_kernel(
    q, gate_weights, gates, lengths, k, v, k_cmp, v_cmp, stride_kcr, stride_kch, stride_vcr, stride_vch,
    seq_len, gated, first, group, kv_heads, length, stride,
    D: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    dependents_may_start(DEPENDENT)
    wait_for_inputs(DEPENDENT)
    which, hk, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    gating = tl.cdiv(group, 2 * BH)  # programs of each side, and of each KV head
    block = wide(first) + which - gating
    at = block + length // stride - 1
    if which < gating:
        if which + hk + side == 0:
            tl.store(lengths, seq_len)
        head = (2 * which + side) * BH + tl.arange(0, BH)
        _gates(q, gate_weights, gates, wide(hk) * group + head, head < group, gated, D, BD, BH)
    elif side == 0:
        _mean(k, k_cmp + at * stride_kcr + wide(hk) * stride_kch, block * stride, hk, kv_heads, length, BT, D, BD)
    else:
        _mean(v, v_cmp + at * stride_vcr + wide(hk) * stride_vch, block * stride, hk, kv_heads, length, BT, DV, BDV)


def stream_begin(
    q: Tensor, gate_weights: Tensor | None, gates: Tensor, lengths: Tensor, seq_len: int, k: Tensor, v: Tensor, k_cmp: Tensor,
    v_cmp: Tensor, first: int, stop: int, length: int, stride: int,
) -> None:  # fmt: skip
    """``seq_len`` into lengths int32 ``[1]``, into gates fp32 ``[HQ, 3]`` the sigmoid of gate_weights ``[3, D]`` times q, and
    the means of blocks ``first .. stop - 1`` of k ``[T, HK, D]`` into k_cmp ``[rows, HK, D]``, of v ``[T, HK, DV]`` into v_cmp.

    q ``[HQ, D]``, k and v contiguous; rows and heads of k_cmp and v_cmp may lie anyhow. Without gate_weights every gate is 1/3.
    """
    (kv_heads, dim), value_dim = k.shape[1:], v.shape[-1]
    group = len(q) // kv_heads
    dependent, options = launch_options(q.device)
    stream_begin_kernel[(triton.cdiv(group, 2 * HEADS) + stop - first, kv_heads, 2)](
        q, q if gate_weights is None else gate_weights, gates, lengths, k, v, k_cmp, v_cmp,
        *k_cmp.stride()[:2], *v_cmp.stride()[:2],
        seq_len, int(gate_weights is not None), first, group, kv_heads, length, stride,
        D=dim, DV=value_dim, BT=TOKENS, BH=HEADS, BD=tuning.padded_dim(dim), BDV=tuning.padded_dim(value_dim),
        DEPENDENT=dependent, num_warps=4, **options,
    )  # fmt: skip
