"""The compressed blocks of a stream, out of contiguous keys: what a compressor's weights make of them.

They are written where ``stream_begin`` writes means, and block sizes are numbers of the launch there and here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.dependent import dependents_may_start, launch_options, wait_for_inputs
from nsa.kernels.triton.tile import dot, load_rows, wide

BLOCKS = 32  # of a program that multiplies by weights


def hidden_columns(bits: int) -> int:
    """Of a compressor's first product that are computed together: rows of weights that fit any GPU's shared memory."""
    return 32 if bits == 32 else 64


@triton.jit(do_not_specialize=["first", "stop", "kv_heads", "length", "stride", "hidden"])
def stream_weighted_kernel(
    x, out, embedding, w1, w2, stride_or, stride_oh, first, stop, kv_heads, length, stride, hidden,
    D: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, MLP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    dependents_may_start(DEPENDENT)
    wait_for_inputs(DEPENDENT)
    hk = tl.program_id(1)
    block = wide(first) + tl.program_id(0) * BM + tl.arange(0, BM)
    keep, dims = block < stop, tl.arange(0, BD)
    at = (block + length // stride - 1) * stride_or + wide(hk) * stride_oh  # of the block's row in out
    columns = hidden if MLP else D
    total = tl.zeros([BM, BD], tl.float32)
    for h0 in tl.range(0, columns, BH):
        h = h0 + tl.arange(0, BH)
        acc = tl.zeros([BM, BH], tl.float32)
        bias = tl.zeros([BH], tl.float32)
        for r in tl.range(0, length):
            rows = load_rows(x, ((block * stride + r) * kv_heads + hk) * D, dims, keep, D)  # [BM, BD]
            w = load_rows(w1, (h.to(tl.int64) * length + r) * D, dims, h < columns, D)  # [BH, BD]
            acc = dot(rows, w.T, acc)
            # The embedding is the same for every block, so its share of the product is one row, and is not rounded first.
            e = tl.load(embedding + r * D + dims, mask=dims < D, other=0.0).to(tl.float32)
            bias += tl.sum(w.to(tl.float32) * e[None, :], 1)
        acc += bias[None, :]
        if MLP:
            back = tl.load(
                w2 + dims[None, :] * hidden + h[:, None], mask=(h < hidden)[:, None] & (dims < D)[None, :], other=0.0
            )
            total = dot((acc * tl.sigmoid(acc)).to(back.dtype), back, total)
        else:
            there = out + at[:, None] + h[None, :]
            tl.store(there, acc.to(out.dtype.element_ty), mask=keep[:, None] & (h < D)[None, :])
    if MLP:
        there = out + at[:, None] + dims[None, :]
        tl.store(there, total.to(out.dtype.element_ty), mask=keep[:, None] & (dims < D)[None, :])


def stream_weighted(
    x: Tensor, out: Tensor, embedding: Tensor, weights: tuple[Tensor, ...], first: int, stop: int, length: int, stride: int
) -> None:
    """Blocks ``first .. stop - 1`` of x ``[T, HK, D]`` into out ``[rows, HK, D]``.

    Rows and heads of out may lie anyhow, the rest is contiguous. embedding ``[l, D]``; weights ``(w [D, l*D],)``, or
    ``(w1 [hidden, l*D], w2 [D, hidden])`` with SiLU between.
    """
    kv_heads, dim = x.shape[1:]
    if stop > first:
        dependent, options = launch_options(x.device)
        stream_weighted_kernel[(triton.cdiv(stop - first, BLOCKS), kv_heads)](
            x, out, embedding, weights[0], weights[-1], *out.stride()[:2],
            first, stop, kv_heads, length, stride, len(weights[0]),
            D=dim, BM=BLOCKS, BH=hidden_columns(8 * x.element_size()), BD=tuning.padded_dim(dim), MLP=len(weights) == 2,
            DEPENDENT=dependent, num_warps=4, num_stages=1, **options,
        )  # fmt: skip
