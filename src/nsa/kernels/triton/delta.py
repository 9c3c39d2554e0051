"""``sum(o * do)`` of every row: what softmax's backward subtracts. Source: FlashAttention-2, arXiv 2307.08691."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning


@triton.jit(do_not_specialize=["rows", "heads"])
def delta_kernel(
    o, do, delta, stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh, rows, heads,
    DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h, tile, batch = pid % heads, pid // heads % tl.cdiv(rows, BM), (pid // heads // tl.cdiv(rows, BM)).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, BDV)
    keep = (row < rows)[:, None] & (dims < DV)[None, :]
    row64 = row.to(tl.int64)[:, None]
    x = tl.load(o + batch * stride_ob + row64 * stride_ot + h * stride_oh + dims[None, :], mask=keep, other=0.0)
    y = tl.load(do + batch * stride_gb + row64 * stride_gt + h * stride_gh + dims[None, :], mask=keep, other=0.0)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + (batch * heads + h) * rows + row, total, mask=row < rows)


def row_delta(o: Tensor, do: Tensor) -> Tensor:
    """o, do ``[B, TQ, HQ, DV]``: fp32 ``[B, HQ, TQ]``."""
    batch, rows, heads, dim = o.shape
    delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=o.device)
    if delta.numel() == 0:
        return delta
    block = 32
    delta_kernel[(batch * triton.cdiv(rows, block) * heads,)](
        o, do, delta, *o.stride()[:3], *do.stride()[:3], rows, heads,
        DV=dim, BM=block, BDV=tuning.padded_dim(dim), num_warps=4,
    )  # fmt: skip
    return delta
