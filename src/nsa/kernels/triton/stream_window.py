"""New tokens into the circular window of a stream.

The window is written twice, one copy behind the other: so the kernels that read token ``t`` in slot ``t % w`` can start at any
slot of the first copy, and a stream whose window began in the middle of a sequence is read in place like any other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.triton.tile import wide

COLUMNS = 512


@triton.jit
def _copy_row(x, ring, token, slot, slots, width, BC: tl.constexpr):
    """Row ``token`` of ``x`` to ``slot`` of both copies; rows are ``width`` long."""
    for first in tl.range(0, width, BC):
        column = first + tl.arange(0, BC)
        row = tl.load(x + token * width + column, mask=column < width)
        tl.store(ring + slot * width + column, row, mask=column < width)
        tl.store(ring + (slot + slots) * width + column, row, mask=column < width)


@triton.jit(do_not_specialize=["first_slot", "slots", "width", "value_width"])
def stream_window_kernel(new_k, new_v, k_win, v_win, first_slot, slots, width, value_width, BC: tl.constexpr):
    token = wide(tl.program_id(0))
    slot = (first_slot + token) % slots
    _copy_row(new_k, k_win, token, slot, slots, width, BC)
    _copy_row(new_v, v_win, token, slot, slots, value_width, BC)


def stream_window(new_k: Tensor, new_v: Tensor, k_win: Tensor, v_win: Tensor, first_slot: int) -> None:
    """new_k ``[tokens, HK, D]`` into both copies of k_win ``[2 w, HK, D]`` from slot ``first_slot`` on; values likewise.

    At most ``w`` tokens, contiguous.
    """
    stream_window_kernel[(len(new_k),)](
        new_k, new_v, k_win, v_win, first_slot, len(k_win) // 2, new_k[0].numel(), new_v[0].numel(), BC=COLUMNS, num_warps=4
    )
