"""What the kernels over a selection have in common: lists of what each warp computes, of ``selected_lists.cuh``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nsa import tuning
from nsa.kernels.cuda import MOST_KEYS, ROWS, SIZE, WIDTH, driver, nvrtc
from nsa.kernels.triton.sequence import Spans


class Lists(ctypes.Structure):
    """``Lists`` of the source; the comments are there. A kernel's arguments begin with it.

    Attributes:
        held: tensors that nobody else holds till the launch.
    """

    held: tuple[Tensor | None, ...]
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tile_seq", "tile_first", "table")),
        *((name, ctypes.c_int) for name in (
            "per_seq", "q_len", "k_len", "offset", "rows", "tiles", "heads", "kv_heads", "covers_keys", "width", "words",
        )),
        *((name, ctypes.c_void_p) for name in ("indices", "lists")),
    )  # fmt: skip


def queries_of(warps: int, group: int) -> int:
    """R, the queries of a tile: each warp has the rows of a fragment, groups of heads."""
    return warps * (ROWS // group)


def item_words(warps: int, group: int) -> int:
    """The words of a tile's lists."""
    return (2 if group == ROWS else 3) * queries_of(warps, group) * WIDTH + 8


def list_threads(warps: int, group: int) -> int:
    """Of a block that makes them."""
    return warps * (WIDTH if group == ROWS else 32)


def fill(call: Lists, indices: Tensor, spans: Spans, warps: int, heads: int) -> bool:
    """Say what to list, in tiles of ``warps``: ``indices`` int32 ``[B, TQ, HK, width]``, contiguous, for ``heads`` of q.

    Whether there is anything to compute.
    """
    rows, kv_heads, width = indices.shape[1:]
    group = heads // kv_heads
    tiles = spans.query_tiles(queries_of(warps, group))
    items = tiles.count * kv_heads
    lists = torch.empty(items, item_words(warps, group), dtype=torch.int32, device=indices.device)
    call.held = lists, tiles.seq, tiles.first
    call.tile_seq, call.tile_first, call.table = map(_address, (tiles.seq, tiles.first, spans.table))
    call.per_seq, call.q_len, call.k_len, call.offset = tiles.per_seq, spans.q_len, spans.k_len, spans.offset
    call.rows, call.tiles, call.heads, call.kv_heads = rows, tiles.count, heads, kv_heads
    call.covers_keys, call.width = spans.covers_keys, width
    call.words = words_of(spans.rows_k)
    call.indices, call.lists = indices.data_ptr(), lists.data_ptr()
    return items > 0


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def words_of(keys: int) -> int:
    """Of a bit for each block."""
    return triton.cdiv(triton.cdiv(keys, SIZE), 32)


def list_shared(words: int) -> int:
    """Bytes of shared memory that a block that makes lists is given."""
    return 2 * words * 4


def options(dtype: torch.dtype, group: int, dim: int, value_dim: int) -> tuple[str, ...]:
    half = ["--define-macro=FP16"] if dtype == torch.float16 else []
    macros = (f"--define-macro={name}={x}" for name, x in (("GROUP", group), ("DIM", dim), ("VALUE_DIM", value_dim)))
    return ("--gpu-architecture=sm_90a", "--std=c++17", *macros, *half)


@dataclass(frozen=True)
class Program:
    """A kernel and that of its lists, loaded on a device. ``shared`` bytes of a block."""

    lists: driver.Kernel
    kernel: driver.Kernel
    shared: int

    def launch(self, call: Lists, boxes: Sequence[tuple[Tensor, int, int]], device: torch.device) -> None:
        """``call`` filled; ``boxes`` the tensors that are loaded in boxes, with the rows and heads of a box."""
        _room, maps = driver.described(boxes)
        driver.enter(device.index)
        self.lists.launch((call.tiles, call.kv_heads), list_shared(call.words), [ctypes.addressof(call)])
        grid = min(call.tiles * call.kv_heads, tuning.multiprocessors(device))
        self.kernel.launch((grid, 1), self.shared, [*maps, ctypes.addressof(call)])


def load(
    name: str, warps: int, threads: int, shared: int, dtype: torch.dtype, group: int, dim: int, value_dim: int, device: int
) -> Program | None:
    """The kernel ``name`` on ``device``, the current one; None, after a warning, where it can't be compiled or loaded."""

    def loaded() -> Program:
        module = driver.load(nvrtc.cubin(f"{name}.cu", options(dtype, group, dim, value_dim)), device)
        lists = driver.Kernel(module, "selected_lists", list_threads(warps, group), list_shared(words_of(MOST_KEYS)))
        return Program(lists, driver.Kernel(module, name, threads, shared), shared)

    return driver.attempt(name, loaded, stacklevel=4)
