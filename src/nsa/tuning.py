"""Tile sizes: a pure function from shapes, dtype and architecture. No Triton, no GPU, no search at run time.

Those for ``arch >= 90``, 16 bit and dims to 128 are the fastest of what was tried on an H100 80GB HBM3 on 2026-11-23, at 65,536
tokens, 64/4 heads of 128, bf16; ``docs/performance.md`` has the others' times. The others are guesses that were not timed. Any
tile is made smaller until it fits: ``shared_bytes``, a model that ``tests/kernels/ahead_of_time.py`` holds against what Triton
allocates, is then within ``shared_memory``.
``arch`` is the compute capability as in 90, or 0 for AMD and the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """A launch: ``block_m`` rows of queries by ``block_n`` keys, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded(size: int) -> int:
    """The power of two, at least 16, that rows of a matrix product are held in."""
    return max(16, 1 << (size - 1).bit_length())


def padded_dim(dim: int) -> int:
    """The power of two, at least 64, that a head dimension is held in.

    Head dim 24 in fp16, held in 32, came out wrong on an H100 with Triton 3.6; held in 64 it is right. Rows of less than 128
    bytes, which descriptors load with a narrower swizzle, are the suspect.
    """
    return max(64, padded(dim))


def dim_pieces(dim: int) -> tuple[int, int]:
    """Columns and count of the pieces in which a kernel that takes products piece by piece holds a head dimension."""
    return (64, 3) if 128 < dim <= 192 else (padded_dim(dim), 1)


def arch(device: torch.device) -> int:
    """Compute capability of ``device`` as in 90, or 0 where it has none."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _hopper(arch: int) -> bool:
    """227 KiB of shared memory, warpgroup products and the tensor memory accelerator; sm_120 has none of the three."""
    return 90 <= arch < 120


def shared_memory(arch: int) -> int:
    """Bytes of shared memory that one block may have."""
    if arch in (80, 87):
        return 163 << 10
    if _hopper(arch):
        return 227 << 10
    return 99 << 10 if arch > 80 else 64 << 10


def shared_bytes(
    kernel: str, rows: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype, stages: int, arch: int
) -> int:
    """At least the shared memory that Triton 3.6 to 3.9 give to ``rows`` rows of queries by ``keys`` keys.

    ``kernel``: one of forward, dq, dkv and importance, of whichever branch.
    """
    q, do, k, v = (x * y for x in (rows, keys) for y in (padded_dim(dim), padded_dim(value_dim)))
    held, passing = {
        "forward": ((q,), (k, v)),
        "dq": ((q, do), (k, v)),
        "dkv": ((k, v), (q, do)),
        "importance": ((k,), (q,)),
    }[kernel]
    if arch == 0:  # operands live in registers; a tile passes through on its way there, and those loaded ahead wait
        return dtype.itemsize * (max(*held, *passing) + (stages - 1) * sum(passing))
    if dtype == torch.float32:  # three TF32 products: an operand lies there as its high and its low part, one product at a time
        return 2 * dtype.itemsize * (sum(held) + max(passing) + rows * keys)
    # One set more than is loaded ahead, for copies of other layout and for probabilities; and the rows' statistics.
    return dtype.itemsize * (sum(held) + (stages + 1) * sum(passing)) + (stages + 1) * 8 * rows


def _smaller(tile: Tile) -> Tile:
    """Less of what matters least: first the stages, then the longer side."""
    if tile.num_stages > 1:
        return replace(tile, num_stages=tile.num_stages - 1)
    if tile.block_m > tile.block_n:
        return replace(tile, block_m=tile.block_m // 2)
    return replace(tile, block_n=tile.block_n // 2)


def _fitting(tile: Tile, kernel: str, dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """``tile``, or the first smaller one that fits ``arch``."""
    while shared_bytes(kernel, tile.block_m, tile.block_n, dim, value_dim, dtype, tile.num_stages, arch) > shared_memory(arch):
        tile = _smaller(tile)
        assert min(tile.block_m, tile.block_n) >= 16, f"no tile of {kernel} fits architecture {arch}"
    return tile


def interval_forward(dim: int, value_dim: int, dtype: torch.dtype, windowed: bool, arch: int) -> Tile:
    wide = max(padded_dim(dim), padded_dim(value_dim)) > 128
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1) if wide else Tile(64, 32, 4, 1)
    elif wide or not _hopper(arch):
        tile = Tile(64, 32, 4, 2)
    else:
        # window 3.4 ms (128 rows: 4.6); compressed 9.2 ms (8 warps: 10.2; 64 rows: 9.9)
        tile = Tile(64, 64, 4, 2) if windowed else Tile(128, 64, 4, 2)
    return _fitting(tile, "forward", dim, value_dim, dtype, arch)


def interval_dq(dim: int, value_dim: int, dtype: torch.dtype, windowed: bool, arch: int) -> Tile:
    wide = max(padded_dim(dim), padded_dim(value_dim)) > 128
    if dtype == torch.float32:
        tile = Tile(32, 16, 4, 1) if wide else Tile(32, 32, 4, 1)
    elif wide or not _hopper(arch):
        tile = Tile(64, 32, 4, 1)
    else:
        # window 3.7 ms (2 stages: 4.3); compressed 11.1 ms (128 rows, 8 warps, 2 stages: 12.7)
        tile = Tile(64, 64, 4, 3 if windowed else 2)
    return _fitting(tile, "dq", dim, value_dim, dtype, arch)


def interval_dkv(dim: int, value_dim: int, dtype: torch.dtype, windowed: bool, arch: int) -> Tile:
    """``block_m`` queries at a time for ``block_n`` keys."""
    wide = max(padded_dim(dim), padded_dim(value_dim)) > 128
    if dtype == torch.float32:
        tile = Tile(16, 32, 4, 1) if wide else Tile(32, 32, 4, 1)
    elif wide:
        tile = Tile(32, 64, 8, 1) if _hopper(arch) else Tile(16, 32, 4, 1)
    elif not _hopper(arch):
        tile = Tile(32, 64, 4, 1)
    else:
        # window 5.6 ms (128 keys: 6.9); compressed 19.4 ms (64 queries, 2 stages: 21.2)
        tile = Tile(32, 64, 4, 3) if windowed else Tile(32, 128, 8, 3)
    return _fitting(tile, "dkv", dim, value_dim, dtype, arch)


def head_shares(programs: int, group: int) -> int:
    """Into how many shares the query heads of a group are split where ``programs`` alone would not fill a GPU."""
    share = max(1, group * max(1, programs) // 1024)
    return -(-group // min(share, group))


def union_queries(group: int, width: int, rows: int = 64) -> int:
    """R, neighbouring queries in a tile of the selected branch: their heads should fill the ``rows`` of a matrix product."""
    queries = 1
    while queries < 16 and queries * 2 * group <= rows and queries * 2 * padded(width) <= 4096:
        queries *= 2
    return queries


def grouped_queries(width: int) -> int:
    """Queries whose ``width`` slots one program sorts into inverse lists."""
    return max(1, min(16, 8192 // padded(width)))


def selected_forward(dim: int, value_dim: int, dtype: torch.dtype, group: int, size: int, arch: int) -> Tile:
    """``block_m`` rows, heads of a few queries or some of one's, by ``block_n`` keys of a selection block at a time."""
    wide = max(padded_dim(dim), padded_dim(value_dim)) > 128
    # 15.7 ms (4 stages: 23.5; 8 warps: 35.6)
    tile = Tile(_union_rows(group), padded(size), 4, 2 if dtype != torch.float32 and not wide and _hopper(arch) else 1)
    return _fitting(tile, "forward", dim, value_dim, dtype, arch)


def selected_dq(dim: int, value_dim: int, dtype: torch.dtype, group: int, size: int, arch: int) -> Tile:
    """As ``selected_forward``."""
    wide = max(padded_dim(dim), padded_dim(value_dim)) > 128
    # 17.8 ms (3 stages: 26.8)
    tile = Tile(_union_rows(group), padded(size), 4, 2 if dtype != torch.float32 and not wide and _hopper(arch) else 1)
    return _fitting(tile, "dq", dim, value_dim, dtype, arch)


def _union_rows(group: int) -> int:
    return padded(union_queries(group, 1) * group)


def selected_dkv(dim: int, value_dim: int, dtype: torch.dtype, group: int, size: int, arch: int) -> Tile:
    """As ``selected_forward``, for ``block_n`` keys at a time."""
    wide = max(padded_dim(dim), padded_dim(value_dim)) > 128
    if dtype == torch.float32 or wide:
        tile = Tile(padded(max(16 // group, 1) * group), padded(size), 4, 1)
    else:
        # 13.7 ms (3 stages: 14.9; 64 rows: 17.1). Rows are gathered by an index: three stages would wait for it.
        stages = 5 if group <= 32 else 3 if group <= 64 else 2
        tile = Tile(padded(max(32 // group, 1) * group), padded(size), 4, stages if _hopper(arch) else 1)
    return _fitting(tile, "dkv", dim, value_dim, dtype, arch)


def importance(dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """``block_m`` queries by ``block_n`` compressed blocks."""
    wide = padded_dim(dim) > 128
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1) if wide else Tile(32, 64, 4, 1)
    elif dim > 192 or not _hopper(arch):
        tile = Tile(64, 64, 4, 2)
    elif wide:
        tile = Tile(64, 128, 4, 2)  # of 192 columns: with the top-n 8.0 ms on an H200; no other was timed
    else:
        # Without the top-n, on 2026-11-25, with ``importance_registers``: 5.21 ms (3 stages: 5.66; neither: 5.86). Before, of 3
        # stages: 5.1 to 5.5 ms (128 queries: 7.3; 64 blocks: 6.2; 256: 7.7).
        tile = Tile(64, 128, 4, 2 if arch == 90 else 3)
    return _fitting(tile, "importance", dim, dim, dtype, arch)


def importance_registers(dim: int, dtype: torch.dtype, starting: int, arch: int) -> int | None:
    """The most registers for a thread of ``importance``; None: as many as the compiler takes.

    ``starting``: compressed blocks that start in one selection block.
    """
    if arch != 90 or dtype == torch.float32 or padded_dim(dim) > 128:
        return None
    # 5.21 ms (without: 5.74), with Triton 3.6, which takes 156 (155). Where one or two start, sums over selection blocks are as
    # wide as the tile or half of it; more than 64 take a second pass, over which the sums are held. 160 are too few for either.
    return 160 if 2 < starting <= 64 else None


# Hopper's twins, for 16 bit and ``hopper.HEAD_DIMS``. H100 80GB HBM3, 2026-11-24, 65,536 tokens, 64/4 heads of 128, bf16.
HOPPER_SELECTED_STAGES = 3  # 14.6 ms random, 10.0 trained-like (2 stages: 14.5, 10.1; the portable kernel: 16.1, 11.1)


@dataclass(frozen=True)
class Gather:
    """Items of ``split`` queries at most, of which ``num_stages`` tiles are in flight, out of ``chunk`` rows of the queries. A
    tile has ``rows`` rows, heads of a few queries or some of one's."""

    chunk: int
    split: int
    rows: int
    num_stages: int


def hopper_selected_dkv(rows: int, dim: int) -> Gather:
    """Of ``rows`` queries in the batch."""
    # 8.7 ms with chunks of 4,096 rows (half or twice as many: 1.4 and 0.1 ms slower), items of 512 queries (256: 0.2 to 0.4 ms
    # slower, 1,024: 0.3 to 0.4). What a chunk costs does not depend on its length: there are 16 at most.
    # Of 192 columns the gradients leave too few registers for probabilities of 64 rows; no other tile was timed.
    tile = (32, 3) if dim > 128 else (64, 2)
    return Gather(max(1024, -(-rows // 16)), 512, *tile)


@dataclass(frozen=True)
class HopperTile:
    """A tile of 128 rows, queries by ``heads`` that lie side by side, and ``block_n`` keys in ``num_stages``."""

    heads: int
    block_n: int
    num_stages: int


def hopper_interval_forward(windowed: bool, group: int) -> HopperTile:
    heads = 1
    while heads < 16 and group % (2 * heads) == 0:
        heads *= 2
    # compressed 7.2 ms (heads apart 7.3; 64 keys 8.2; the portable kernel 9.1)
    # window 2.7 ms (128 keys 2.8; heads apart 3.1; the portable kernel 3.5)
    return HopperTile(heads, 64, 4) if windowed else HopperTile(heads, 128, 2)


# The backward of a step, 2026-11-25: compressed 25.4 ms (the portable kernels in an earlier run: 34.8), window 8.8 ms (12.2).
def hopper_interval_dq(windowed: bool, group: int) -> HopperTile:
    """The gradient of queries."""
    return HopperTile(hopper_interval_forward(windowed, group).heads, 64, 3)


def hopper_interval_dkv(dim: int) -> Tile:
    """The gradients of keys and values: ``block_m`` queries at a time."""
    # Of 192 columns the gradients leave too few registers for probabilities of 64 queries; no other tile was timed.
    return Tile(32, 128, 8, 4) if dim > 128 else Tile(64, 128, 8, 3)


def multiprocessors(device: torch.device) -> int:
    """Of ``device``; a compilation without one counts on an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
