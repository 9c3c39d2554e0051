"""Gradient of the queries of selected attention on Hopper, a warp for one query or several: the launcher of ``selected_dq.cu``.

The twin of ``selected_dq`` in ``kernels/triton/selected_backward.py``.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from nsa.kernels.cuda import ROWS, SIZE
from nsa.kernels.cuda.selected_lists import Lists, Program, fill, load
from nsa.kernels.triton.sequence import Spans, new_gradient
from nsa.kernels.triton.tile import LOG2E

WARPS, THREADS = 8, 384  # that multiply, and all of a block
# ROOM of the source, for the ring and what follows it, the barriers, and what aligning takes.
SHARED = (224 << 10) + 1024 + 1024


class Call(Lists):
    """``Call`` of the source; the comments are there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("shift", "delta")),
        *((name, ctypes.c_int64) for name in ("stat_batch", "stat_head")),
        ("dq", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dq_batch", "dq_row", "dq_head")),
        ("add", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("scale2", ctypes.c_float),
        ("zero", ctypes.c_uint),
    )


@functools.cache
def program(dtype: torch.dtype, group: int, dim: int, value_dim: int, device: int) -> Program | None:
    """For groups of so many heads, on ``device``, the current one; None, after a warning, where it can't be had."""
    return load("selected_dq", WARPS, THREADS, SHARED, dtype, group, dim, value_dim, device)


def selected_dq(
    program: Program, q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, indices: Tensor, spans: Spans,
    softmax_scale: float, dq: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the twin, from ``indices`` int32 ``[B, TQ, HK, width]``, contiguous: its lists are of other queries than others'."""
    add = dq is not None
    dq = new_gradient(q, spans) if dq is None else dq
    if q.numel() == 0:
        return dq
    call = Call(
        shift=shift.data_ptr(), delta=delta.data_ptr(), stat_batch=shift.stride(0), stat_head=shift.stride(1),
        dq=dq.data_ptr(), dq_batch=dq.stride(0), dq_row=dq.stride(1), dq_head=dq.stride(2),
        add=add, scale=softmax_scale, scale2=softmax_scale * LOG2E.value,
    )  # fmt: skip
    group = q.shape[2] // k.shape[2]
    if fill(call, indices, spans, WARPS, q.shape[2]):
        program.launch(call, [(k, SIZE, 1), (v, SIZE, 1), (q, ROWS // group, group), (do, ROWS // group, group)], q.device)
    return dq
