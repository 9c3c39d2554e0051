"""What a backward needs of a branch's outputs: for every row ``sum(o * do)``, and what its scores lose.

The gradient of a gated branch's output is ``g * do``, and softmax's backward subtracts ``sum(o * g * do)``. The sum without the
gate is the gate's own gradient. So a branch's backward takes do as it is, that sum as its delta, and the gate inside its shift.
Source: FlashAttention-2, arXiv 2307.08691, for an ungated branch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.tile import backward_shift

ROWS = 32


@triton.jit
def _tile(rows, heads, BM: tl.constexpr):
    """Batch index, head and rows of a program."""
    pid, tiles = tl.program_id(0), tl.cdiv(rows, BM)
    return (pid // heads // tiles).to(tl.int64), pid % heads, pid // heads % tiles * BM + tl.arange(0, BM)


@triton.jit(do_not_specialize=["rows", "heads"])
def row_kernel(
    o, do, lse, delta, shift, stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh, rows, heads,
    DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    batch, h, row = _tile(rows, heads, BM)
    dims = tl.arange(0, BDV)
    keep = (row < rows)[:, None] & (dims < DV)[None, :]
    row64 = row.to(tl.int64)[:, None]
    x = tl.load(o + batch * stride_ob + row64 * stride_ot + h * stride_oh + dims[None, :], mask=keep, other=0.0)
    y = tl.load(do + batch * stride_gb + row64 * stride_gt + h * stride_gh + dims[None, :], mask=keep, other=0.0)
    at = (batch * heads + h) * rows + row
    tl.store(delta + at, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=row < rows)
    row_lse = tl.load(lse + at, mask=row < rows, other=0.0)
    tl.store(shift + at, backward_shift(row_lse, row_lse * 0.0 + 1.0), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "heads", "number"])
def gate_kernel(
    a, b, c, lse_a, lse_b, lse_c, gates, do, dgates, delta, shift, stride_gb, stride_gt, stride_gh, rows, heads, number,
    DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    batch, h, row = _tile(rows, heads, BM)
    keep = row < rows
    dims = tl.arange(0, BDV)
    inside = keep[:, None] & (dims < DV)[None, :]
    row64 = row.to(tl.int64)
    grad = tl.load(do + batch * stride_gb + row64[:, None] * stride_gt + h * stride_gh + dims[None, :], mask=inside, other=0.0)
    flat = (batch * rows + row64) * heads + h
    at = (batch * heads + h) * rows + row64
    for i in tl.static_range(3):
        x = a if i == 0 else b if i == 1 else c
        lse = lse_a if i == 0 else lse_b if i == 1 else lse_c
        value = tl.load(x + flat[:, None] * DV + dims[None, :], mask=inside, other=0.0)
        total = tl.sum(grad.to(tl.float32) * value.to(tl.float32), 1)
        tl.store(dgates + flat * 3 + i, total.to(dgates.dtype.element_ty), mask=keep)
        tl.store(delta + i * number + at, total, mask=keep)
        gate = tl.load(gates + flat * 3 + i, mask=keep, other=0.0).to(tl.float32)
        row_lse = tl.load(lse + at, mask=keep, other=0.0)
        tl.store(shift + i * number + at, backward_shift(row_lse, gate), mask=keep)


def row_statistics(o: Tensor, do: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and delta, fp32 ``[B, HQ, TQ]``. o, do ``[B, TQ, HQ, DV]``, lse contiguous ``[B, HQ, TQ]``."""
    batch, rows, heads, dim = o.shape
    shift, delta = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel():
        row_kernel[(batch * triton.cdiv(rows, ROWS) * heads,)](
            o, do, lse, delta, shift, *o.stride()[:3], *do.stride()[:3], rows, heads,
            DV=dim, BM=ROWS, BDV=tuning.padded_dim(dim), num_warps=4,
        )  # fmt: skip
    return shift, delta


def gate_statistics(
    outputs: tuple[Tensor, Tensor, Tensor], lse: tuple[Tensor, Tensor, Tensor], gates: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gates' gradient ``[B, TQ, HQ, 3]``; shift and delta of each branch, fp32 ``[3, B, HQ, TQ]``.

    Outputs contiguous ``[B, TQ, HQ, DV]``, lse contiguous ``[B, HQ, TQ]``, gates contiguous, do ``[B, TQ, HQ, DV]``.
    """
    batch, rows, heads, dim = do.shape
    dgates = torch.empty_like(gates)
    shift, delta = (torch.empty(3, batch, heads, rows, dtype=torch.float32, device=do.device) for _ in range(2))
    if do.numel():
        gate_kernel[(batch * triton.cdiv(rows, ROWS) * heads,)](
            *outputs, *lse, gates, do, dgates, delta, shift, *do.stride()[:3], rows, heads, batch * heads * rows,
            DV=dim, BM=ROWS, BDV=tuning.padded_dim(dim), num_warps=4,
        )  # fmt: skip
    return dgates, shift, delta
