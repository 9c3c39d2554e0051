"""The parts of the three branches become the output: each part's share of its branch's softmax, times the branch's gate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.dependent import launch_options, wait_for_inputs
from nsa.kernels.triton.tile import LOG2E, wide

PARTS = 64  # added up at a time


@triton.jit
def _scale(lse, mine, gate):
    """The highest lse of the parts ``mine`` of a branch in units of log2, and the gate over their sum."""
    each = tl.where(mine, lse, float("-inf")) * LOG2E
    most = tl.maximum(tl.max(each, 0), -1.0e30)  # a branch that saw nothing has no part to weigh
    return most, gate.to(tl.float32) / tl.maximum(tl.sum(tl.exp2(each - most), 0), 1.0e-30)


@triton.jit(do_not_specialize=["first_slc", "first_win", "parts"])
def decode_merge_kernel(
    part_o, part_lse, gates, o, first_slc, first_win, parts,
    DV: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr, ALL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    row = wide(tl.program_id(0))
    part_lse += row * parts
    part_o += row * parts * DV
    gates += row * 3
    every, dims = tl.arange(0, ALL), tl.arange(0, BDV)
    lse = tl.load(part_lse + every, mask=every < parts, other=float("-inf"))
    most_cmp, scale_cmp = _scale(lse, every < first_slc, tl.load(gates))
    most_slc, scale_slc = _scale(lse, (every >= first_slc) & (every < first_win), tl.load(gates + 1))
    most_win, scale_win = _scale(lse, every >= first_win, tl.load(gates + 2))
    out = tl.zeros([BDV], tl.float32)
    for p in tl.range(0, parts, BP):
        at = p + tl.arange(0, BP)
        # Every part was written, so its output is loaded before anything is known about its weight.
        x = tl.load(part_o + at[:, None] * DV + dims[None, :], mask=(at < parts)[:, None] & (dims < DV)[None, :], other=0.0)
        each = tl.load(part_lse + at, mask=at < parts, other=float("-inf")) * LOG2E
        most = tl.where(at < first_slc, most_cmp, tl.where(at < first_win, most_slc, most_win))
        scale = tl.where(at < first_slc, scale_cmp, tl.where(at < first_win, scale_slc, scale_win))
        out += tl.sum((tl.exp2(each - most) * scale)[:, None] * x, 0)
    tl.store(o + row * DV + dims, out.to(o.dtype.element_ty), mask=dims < DV)


def decode_merge(part_o: Tensor, part_lse: Tensor, gates: Tensor, o: Tensor, first_slc: int, first_win: int) -> None:
    """part_o fp32 ``[B, TQ, HQ, parts, DV]``, part_lse fp32 ``[B, TQ, HQ, parts]``, gates contiguous ``[B, TQ, HQ, 3]``: o
    ``[B, TQ, HQ, DV]``. Parts from ``first_slc`` on are the selected branch's, from ``first_win`` on the window's.
    """
    parts, value_dim = part_o.shape[-2:]
    every = triton.next_power_of_2(parts)
    dependent, options = launch_options(o.device)
    decode_merge_kernel[(part_lse.numel() // parts,)](
        part_o, part_lse, gates, o, first_slc, first_win, parts, DV=value_dim, BDV=tuning.padded_dim(value_dim),
        BP=min(PARTS, every), ALL=every, DEPENDENT=dependent, num_warps=8 if every > 16 else 2, **options,
    )  # fmt: skip
