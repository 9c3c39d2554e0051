"""Selected attention on Hopper, a warp for one query or several: the launcher of ``selected_forward.cu``.

The twin of ``kernels/hopper/selected_forward.py``.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from nsa.kernels.cuda import ROWS, SIZE
from nsa.kernels.cuda.selected_lists import Lists, Program, fill, load
from nsa.kernels.triton.combine import Mix
from nsa.kernels.triton.sequence import Spans
from nsa.kernels.triton.tile import LOG2E

WARPS, THREADS = 12, 512  # that multiply, and all of a block
# ROOM of the source, for the ring and what follows it, the barriers, and what aligning takes.
SHARED = (224 << 10) + 1024 + 1024


class Call(Lists):
    """``Call`` of the source; the comments are there."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_batch", "q_row", "q_head")),
        *((name, ctypes.c_void_p) for name in ("o", "lse", "mixed", "o_cmp", "o_win", "gates")),
        ("wide_gates", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_uint),
    )  # fmt: skip


@functools.cache
def program(dtype: torch.dtype, group: int, dim: int, value_dim: int, device: int) -> Program | None:
    """For groups of so many heads, on ``device``, the current one; None, after a warning, where it can't be had."""
    return load("selected_forward", WARPS, THREADS, SHARED, dtype, group, dim, value_dim, device)


def selected_forward(
    program: Program, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, spans: Spans, softmax_scale: float,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As the twin, from ``indices`` int32 ``[B, TQ, HK, width]``, contiguous: its lists have more queries than others'."""
    batch, rows, heads, value_dim = *q.shape[:3], v.shape[-1]
    save = mix is None or mix.save
    make = torch.zeros if spans.packed else torch.empty  # rows that belong to no sequence are written by nobody
    o = make((batch, rows, heads, value_dim) if save else (0,), dtype=q.dtype, device=q.device)
    mixed = None if mix is None else make((batch, rows, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if spans.packed:
        lse.fill_(float("-inf"))
    call = Call(
        q=q.data_ptr(), q_batch=q.stride(0), q_row=q.stride(1), q_head=q.stride(2),
        o=o.data_ptr() if save else None, lse=lse.data_ptr(), scale=softmax_scale * LOG2E.value,
    )  # fmt: skip
    if mix is not None:
        assert mixed is not None
        call.mixed, call.o_cmp, call.o_win, call.gates = (x.data_ptr() for x in (mixed, mix.o_cmp, mix.o_win, mix.gates))
        call.wide_gates = mix.gates.dtype == torch.float32
    group = heads // k.shape[2]
    if fill(call, indices, spans, WARPS, heads):
        program.launch(call, [(k, SIZE, 1), (v, SIZE, 1), (q, ROWS // group, group)], q.device)
    return o, lse, mixed
