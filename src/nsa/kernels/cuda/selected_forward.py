"""Selected attention on Hopper, a warp for two queries: the launcher of ``selected_forward.cu``.

The twin of ``kernels/hopper/selected_forward.py``.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nsa import tuning
from nsa.kernels.cuda import SIZE, driver, nvrtc
from nsa.kernels.triton.combine import Mix
from nsa.kernels.triton.sequence import Spans
from nsa.kernels.triton.tile import LOG2E

QUERIES, ITEM = 16, 520  # R, and the words of a tile's lists
THREADS, LIST_THREADS = 384, 256
# The ring's 10 tiles of 16 KiB, the queries' 64, the barriers, and what aligning takes.
SHARED = 10 * (16 << 10) + (64 << 10) + 1024 + 1024
BOX = 64  # columns that the widest swizzle takes


class Call(ctypes.Structure):
    """``Call`` of the source; the comments are there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tile_seq", "tile_first", "table")),
        *((name, ctypes.c_int) for name in (
            "per_seq", "q_len", "k_len", "offset", "rows", "tiles", "heads", "kv_heads", "covers_keys", "width", "words",
        )),
        *((name, ctypes.c_void_p) for name in ("indices", "lists", "q")),
        *((name, ctypes.c_int64) for name in ("q_batch", "q_row", "q_head")),
        *((name, ctypes.c_void_p) for name in ("o", "lse", "mixed", "o_cmp", "o_win", "gates")),
        ("wide_gates", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_uint),
    )  # fmt: skip


def options(dtype: torch.dtype) -> tuple[str, ...]:
    return ("--gpu-architecture=sm_90a", "--std=c++17", *(["--define-macro=FP16"] if dtype == torch.float16 else []))


@dataclass(frozen=True)
class Program:
    """Both kernels, loaded on a device."""

    lists: driver.Kernel
    forward: driver.Kernel


@functools.cache
def program(dtype: torch.dtype, device: int) -> Program | None:
    """The kernels on ``device``, the current one; None, after a warning, where they can't be compiled or loaded."""
    try:
        module = driver.load(nvrtc.cubin("selected_forward.cu", options(dtype)), device)
        return Program(
            driver.Kernel(module, "selected_lists", LIST_THREADS, 0),
            driver.Kernel(module, "selected_forward", THREADS, SHARED),
        )
    except (nvrtc.Unavailable, RuntimeError) as reason:
        warnings.warn(f"the selected branch takes its slower kernel: {reason}", RuntimeWarning, stacklevel=2)
        return None


def selected_forward(
    program: Program, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, spans: Spans, softmax_scale: float,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As the twin, from ``indices`` int32 ``[B, TQ, HK, width]``, contiguous: its lists have more queries than others'."""
    batch, rows, heads, dim = q.shape
    kv_heads, width = indices.shape[2:]
    save = mix is None or mix.save
    make = torch.zeros if spans.packed else torch.empty  # rows that belong to no sequence are written by nobody
    o = make((batch, rows, heads, dim) if save else (0,), dtype=q.dtype, device=q.device)
    mixed = None if mix is None else make((batch, rows, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if spans.packed:
        lse.fill_(float("-inf"))
    tiles = spans.query_tiles(QUERIES)
    items = tiles.count * kv_heads
    if items == 0:
        return o, lse, mixed
    if k.numel() == 0:  # nobody reads it, but it must not be empty
        k, v = (x.new_zeros(1, 1, kv_heads, dim) for x in (k, v))
    lists = torch.empty(items, ITEM, dtype=torch.int32, device=q.device)
    address = lambda x: None if x is None else x.data_ptr()
    words = triton.cdiv(triton.cdiv(spans.rows_k, SIZE), 32)
    call = Call(
        tile_seq=address(tiles.seq), tile_first=address(tiles.first), table=address(spans.table), per_seq=tiles.per_seq,
        q_len=spans.q_len, k_len=spans.k_len, offset=spans.offset, rows=rows, tiles=tiles.count, heads=heads, kv_heads=kv_heads,
        covers_keys=spans.covers_keys, width=width, words=words, indices=indices.data_ptr(), lists=lists.data_ptr(),
        q=q.data_ptr(), q_batch=q.stride(0), q_row=q.stride(1), q_head=q.stride(2),
        o=o.data_ptr() if save else None, lse=lse.data_ptr(), mixed=address(mixed),
        scale=softmax_scale * LOG2E.value,
    )  # fmt: skip
    if mix is not None:
        call.o_cmp, call.o_win, call.gates = mix.o_cmp.data_ptr(), mix.o_win.data_ptr(), mix.gates.data_ptr()
        call.wide_gates = mix.gates.dtype == torch.float32
    room = ctypes.create_string_buffer(2 * driver.MAP_BYTES + 63)
    k_map = (ctypes.addressof(room) + 63) & ~63
    v_map = k_map + driver.MAP_BYTES
    driver.describe(k_map, k, BOX, SIZE)
    driver.describe(v_map, v, BOX, SIZE)
    driver.enter(q.device.index)
    program.lists.launch((tiles.count, kv_heads), 2 * words * 4, [ctypes.addressof(call)])
    grid = min(items, tuning.multiprocessors(q.device))
    program.forward.launch((grid, 1), SHARED, [k_map, v_map, ctypes.addressof(call)])
    return o, lse, mixed
