"""Loads and stores of tiles, and the running softmax: what every attention kernel is made of.

Kernels do not specialise on lengths, counts of heads or block sizes: a sequence that grows must not compile anew. Strides are
specialised on, since the alignment of loads follows from them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.tuning import padded_dim

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every score and far from overflow: a maximum that starts here never makes inf - inf.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def wide(x):
    """``x`` as a 64-bit number: offsets pass 2^31 elements."""
    return tl.zeros([], tl.int64) + x


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of ``rows`` rows of one head of ``x [B, T, H, D]``, which hardware that can loads without the help of threads."""
    return _boxes(x, [1, rows, 1, padded_dim(x.shape[-1])])


def direct_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """``descriptor`` for ``load_direct``, of ``columns`` columns.

    Batch and head come first: only leading dimensions of size 1 can be dropped without the tile passing through registers on
    its way from shared memory to a matrix product.
    """
    return _boxes(x.transpose(1, 2), [1, 1, rows, columns])


def _boxes(x: Tensor, box: list[int]) -> TensorDescriptor:
    if x.numel() == 0:  # nobody reads it, but it must not be empty
        x = x.new_zeros(1, 1, 1, x.shape[-1])
    strides = [stride if size > 1 else 8 * x.shape[-1] for size, stride in zip(x.shape[:-1], x.stride())]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box)


@triton.jit
def load_tile(desc, batch, row, head, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr):
    """``[ROWS, WIDTH]`` of a tensor from ``row`` on; outside the tensor, and with ``CHECK`` from row ``limit`` on, it is 0."""
    x = desc.load([batch.to(tl.int32), row.to(tl.int32), head, 0]).reshape(ROWS, WIDTH)
    if CHECK:
        x = tl.where((tl.arange(0, ROWS) < limit)[:, None], x, tl.zeros_like(x))
    return x


@triton.jit
def load_direct(desc, batch, row, head, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``[ROWS, WIDTH]`` for a matrix product, which finds it where it was loaded to; outside the tensor it is 0."""
    return desc.load([batch.to(tl.int32), head, row.to(tl.int32), column]).reshape(ROWS, WIDTH)


@triton.jit
def load_rows(base, offsets, dims, keep, DIM: tl.constexpr):
    """``[len(offsets), len(dims)]``, a row at each offset; 0 where ``keep`` is false."""
    return tl.load(base + offsets[:, None] + dims[None, :], mask=keep[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def store_tile(base, rows, stride, dims, keep, x, DIM: tl.constexpr):
    """Store ``x [len(rows), len(dims)]`` where ``keep`` holds, dims past ``DIM`` left out."""
    ptrs = base + rows[:, None] * stride + dims[None, :]
    tl.store(ptrs, x.to(base.dtype.element_ty), mask=keep[:, None] & (dims < DIM)[None, :])


@triton.jit
def dot(a, b, acc=None):
    """``a @ b`` with fp32 sums. Products of fp32 operands are as exact as fp32: three TF32 products where there are any."""
    if cuda_capability_geq(8, 0):
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def softmax_step(s, scale, v, m, l, acc):
    """Take a tile of products (-inf where masked) and values into the running softmax; ``scale`` makes them powers of two.

    The scale is applied in the exponent, where it costs nothing: the subtraction becomes a fused multiply-add.
    """
    p, m, l, acc = weighted_softmax_step(s, scale, v, m, l, acc)
    return m, l, acc


@triton.jit
def weighted_softmax_step(s, scale, v, m, l, acc):
    """``softmax_step`` that also returns the tile's weights: probabilities times ``exp2(lse - m)``, lse in units of log2."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return p, m_new, l, acc


@triton.jit
def softmax_end(m, l, acc):
    """Output and natural-log lse; 0 and -inf for a row that saw nothing."""
    seen = l > 0
    l = tl.where(seen, l, 1.0)
    lse = tl.where(seen, (m + tl.log2(l)) * LN2, float("-inf"))
    return tl.where(seen[:, None], acc / l[:, None], 0.0), lse


@triton.jit
def backward_lse(lse):
    """lse in units of log2, +inf for a row that saw nothing: its probabilities are then 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def backward_shift(lse, gate):
    """What a row's scores lose, in units of log2, so that their powers of two are probabilities times ``|gate|``.

    The lowest bit is set where the gate is negative. +inf for a row that saw nothing or whose gate is 0.
    """
    size = tl.where(gate == 0, 1.0, tl.abs(gate))
    shift = (lse * LOG2E - tl.log2(size)).to(tl.int32, bitcast=True)
    shift = ((shift & -2) | (gate < 0).to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where((lse == float("-inf")) | (gate == 0), float("inf"), shift)


@triton.jit
def gated(p, shift):
    """``p`` with the sign of the gate that ``shift`` carries."""
    return (p.to(tl.int32, bitcast=True) ^ (shift.to(tl.int32, bitcast=True) << 31)).to(tl.float32, bitcast=True)
