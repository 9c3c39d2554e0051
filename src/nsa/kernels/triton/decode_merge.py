"""The parts of the three branches become the output: each part's share of its branch's softmax, times the branch's gate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.tile import LOG2E, wide

PARTS = 16  # added up at a time


@triton.jit
def _weights(lse, at, parts, first, end, most, total, gate, BP: tl.constexpr):
    """Weights of the parts ``at`` that lie in a branch, ``first .. end - 1``: 0 for a part that saw nothing."""
    mine = (at >= first) & (at < end)
    part_lse = tl.load(lse + at, mask=mine, other=float("-inf"))
    return tl.where(part_lse > float("-inf"), tl.exp2((part_lse - most) * LOG2E) * (gate / total), 0.0)


@triton.jit(do_not_specialize=["first_slc", "first_win", "parts"])
def decode_merge_kernel(
    part_o, part_lse, gates, o, first_slc, first_win, parts,
    DV: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    row = wide(tl.program_id(0))
    part_lse += row * parts
    part_o += row * parts * DV
    every, dims = tl.arange(0, ALL), tl.arange(0, BDV)
    lse = tl.load(part_lse + every, mask=every < parts, other=float("-inf"))
    out = tl.zeros([BDV], tl.float32)
    for branch in tl.static_range(3):
        first = 0 if branch == 0 else first_slc if branch == 1 else first_win
        end = first_slc if branch == 0 else first_win if branch == 1 else parts
        gate = tl.load(gates + row * 3 + branch).to(tl.float32)
        mine = tl.where((every >= first) & (every < end), lse, float("-inf"))
        most = tl.maximum(tl.max(mine, 0), -1.0e30)  # a branch that saw nothing has no part to weigh
        total = tl.maximum(tl.sum(tl.exp2((mine - most) * LOG2E), 0), 1.0e-30)
        for p in tl.range(first, end, BP):
            at = p + tl.arange(0, BP)
            weight = _weights(part_lse, at, parts, first, end, most, total, gate, BP)
            x = tl.load(
                part_o + at[:, None] * DV + dims[None, :], mask=(weight != 0)[:, None] & (dims < DV)[None, :], other=0.0
            )
            out += tl.sum(weight[:, None] * x, 0)
    tl.store(o + row * DV + dims, out.to(o.dtype.element_ty), mask=dims < DV)


def decode_merge(part_o: Tensor, part_lse: Tensor, gates: Tensor, o: Tensor, first_slc: int, first_win: int) -> None:
    """part_o fp32 ``[B, TQ, HQ, parts, DV]``, part_lse fp32 ``[B, TQ, HQ, parts]``, gates contiguous ``[B, TQ, HQ, 3]``: o
    ``[B, TQ, HQ, DV]``. Parts from ``first_slc`` on are the selected branch's, from ``first_win`` on the window's.
    """
    parts, value_dim = part_o.shape[-2:]
    decode_merge_kernel[(part_lse.numel() // parts,)](
        part_o, part_lse, gates, o, first_slc, first_win, parts,
        DV=value_dim, BDV=tuning.padded_dim(value_dim), BP=PARTS, ALL=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
