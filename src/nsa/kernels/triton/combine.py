"""The gated sum of the branches and its gradients, each read and written once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning

ROWS = 16


@dataclass(frozen=True)
class Mix:
    """What the selected branch needs for the gated sum in its epilogue: the other branches' outputs and the gates, contiguous;
    ``save`` says whether its own output is wanted too."""

    o_cmp: Tensor
    o_win: Tensor
    gates: Tensor
    save: bool


@triton.jit
def _row_tile(rows, DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dims = tl.arange(0, BDV)
    return row, row[:, None] * DV + dims[None, :], row < rows, (row < rows)[:, None] & (dims < DV)[None, :]


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(a, b, c, gates, o, rows, DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr):
    row, at, keep, inside = _row_tile(rows, DV, BM, BDV)
    total = tl.zeros([BM, BDV], tl.float32)
    for i in tl.static_range(3):
        x = a if i == 0 else b if i == 1 else c
        gate = tl.load(gates + row * 3 + i, mask=keep, other=0.0).to(tl.float32)
        total += gate[:, None] * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(o + at, total.to(o.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def combine_backward_kernel(
    a, b, c, gates, do, da, db, dc, dgates, rows, DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr
):
    row, at, keep, inside = _row_tile(rows, DV, BM, BDV)
    grad = tl.load(do + at, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(3):
        x = a if i == 0 else b if i == 1 else c
        dx = da if i == 0 else db if i == 1 else dc
        gate = tl.load(gates + row * 3 + i, mask=keep, other=0.0).to(tl.float32)
        tl.store(dx + at, (grad * gate[:, None]).to(dx.dtype.element_ty), mask=inside)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dgates + row * 3 + i, tl.sum(grad * value, 1).to(dgates.dtype.element_ty), mask=keep)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """o_cmp, o_slc, o_win contiguous ``[B, T, HQ, DV]``, gates contiguous ``[B, T, HQ, 3]``: ``[B, T, HQ, DV]``."""
    o = torch.empty_like(o_cmp)
    dim = o.shape[-1]
    rows = o.numel() // dim
    if rows:
        combine_kernel[(triton.cdiv(rows, ROWS),)](
            o_cmp, o_slc, o_win, gates, o, rows, DV=dim, BM=ROWS, BDV=tuning.padded_dim(dim), num_warps=4
        )
    return o


def combine_backward(
    o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three outputs and of the gates; all arguments contiguous."""
    grads = torch.empty_like(o_cmp), torch.empty_like(o_slc), torch.empty_like(o_win)
    dgates = torch.empty_like(gates)
    dim = do.shape[-1]
    rows = do.numel() // dim
    if rows:
        combine_backward_kernel[(triton.cdiv(rows, ROWS),)](
            o_cmp, o_slc, o_win, gates, do, *grads, dgates, rows, DV=dim, BM=ROWS, BDV=tuning.padded_dim(dim), num_warps=4
        )
    return *grads, dgates
