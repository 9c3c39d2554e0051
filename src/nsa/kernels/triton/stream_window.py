"""New tokens into the circular window of a stream.

The window is written twice, one copy behind the other: so the kernels that read token ``t`` in slot ``t % w`` can start at any
slot of the first copy, and a stream whose window began in the middle of a sequence is read in place like any other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.triton.dependent import dependents_may_start, launch_options, wait_for_inputs
from nsa.kernels.triton.tile import wide

COLUMNS = 512


@triton.jit
def _store_twice(ring, slot, slots, width, column, row):
    """Into ``slot`` of both copies; rows are ``width`` long."""
    tl.store(ring + slot * width + column, row, mask=column < width)
    tl.store(ring + (slot + slots) * width + column, row, mask=column < width)


@triton.jit(do_not_specialize=["first_slot", "slots", "width", "value_width"])
def stream_window_kernel(
    new_k, new_v, k_win, v_win, first_slot, slots, width, value_width, BC: tl.constexpr, DEPENDENT: tl.constexpr
):
    dependents_may_start(DEPENDENT)
    wait_for_inputs(DEPENDENT)
    token = wide(tl.program_id(0))
    slot = (first_slot + token) % slots
    for first in tl.range(0, tl.maximum(width, value_width), BC):
        column = first + tl.arange(0, BC)
        # Both loads before all stores: one wait for memory instead of two.
        key = tl.load(new_k + token * width + column, mask=column < width)
        value = tl.load(new_v + token * value_width + column, mask=column < value_width)
        _store_twice(k_win, slot, slots, width, column, key)
        _store_twice(v_win, slot, slots, value_width, column, value)


def stream_window(new_k: Tensor, new_v: Tensor, k_win: Tensor, v_win: Tensor, first_slot: int) -> None:
    """new_k ``[tokens, HK, D]`` into both copies of k_win ``[2 w, HK, D]`` from slot ``first_slot`` on; values likewise.

    At most ``w`` tokens, contiguous.
    """
    dependent, options = launch_options(new_k.device)
    stream_window_kernel[(len(new_k),)](
        new_k, new_v, k_win, v_win, first_slot, len(k_win) // 2, new_k[0].numel(), new_v[0].numel(),
        BC=COLUMNS, DEPENDENT=dependent, num_warps=4, **options,
    )  # fmt: skip
