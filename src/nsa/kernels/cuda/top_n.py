"""The choice of blocks on Hopper, a warp for each query and KV head: the launcher of ``top_n.cu``.

The twin of ``top_n`` in ``kernels/triton/top_n.py``.
"""

from __future__ import annotations

import ctypes
import functools

from torch import Tensor

from nsa.kernels.cuda import CHOSEN, RANKED, driver, nvrtc
from nsa.kernels.triton.sequence import Spans, Tiles

WARPS = 8  # of a block, a row each
WIDTHS = (RANKED // 4, RANKED // 2, RANKED)  # blocks that the kernels rank


class Call(ctypes.Structure):
    """``Call`` of the source; the comments are there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("importance", "out", "tile_seq", "tile_first", "table")),
        *((name, ctypes.c_int) for name in (
            "per_seq", "q_len", "offset", "rows", "kv_heads", "tile0", "blocks", "seen", "size", "n", "num_initial",
            "num_local", "beside",
        )),
    )  # fmt: skip


def options(tile: int) -> tuple[str, ...]:
    return ("--gpu-architecture=sm_90a", "--std=c++17", f"--define-macro=TILE={tile}")


@functools.cache
def program(tile: int, device: int) -> dict[int, driver.Kernel] | None:
    """Its kernels, by the blocks that they rank, for tiles of ``tile`` queries on ``device``, the current one; None, after a
    warning, where they can't be had.
    """

    def loaded() -> dict[int, driver.Kernel]:
        module = driver.load(nvrtc.cubin("top_n.cu", options(tile)), device)
        return {width: driver.Kernel(module, f"top_n_{width}", WARPS * 32, 0) for width in WIDTHS}

    return driver.attempt("top_n", loaded)


def top_n(
    program: dict[int, driver.Kernel], importance: Tensor, out: Tensor, spans: Spans, tiles: Tiles, tile: int, tile0: int,
    count: int, ranked: int, size: int, n: int, num_initial: int, num_local: int, beside: bool,
) -> None:  # fmt: skip
    """As the twin."""
    kv_heads, blocks = importance.shape[1:]
    assert n <= CHOSEN
    assert blocks % 4 == 0  # rows are loaded 16 bytes at a time
    pointers = [None if x is None else x.data_ptr() for x in (importance, out, tiles.seq, tiles.first, spans.table)]
    call = Call(
        *pointers, tiles.per_seq, spans.q_len, spans.offset, spans.rows_q, kv_heads, tile0, blocks, ranked, size, n,
        num_initial, num_local, beside,
    )  # fmt: skip
    driver.enter(importance.device.index)
    kernel = program[next(width for width in WIDTHS if ranked <= width)]
    kernel.launch((count * (tile // WARPS), kv_heads), 0, [ctypes.addressof(call)])
