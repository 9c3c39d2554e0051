"""Tile sizes: a pure function from shapes, dtype and architecture. No Triton, no GPU, no search at run time.

Those for ``arch >= 90``, 16 bit and dims to 128 are the fastest of what was tried on an H100 80GB HBM3 on 2026-11-23, at 65,536
tokens, 64/4 heads of 128, bf16; ``docs/performance.md`` has the others' times. The rest are sized to fit shared memory.
``arch`` is the compute capability as in 90, or 0 for AMD and the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """A launch: ``block_m`` queries by ``block_n`` keys, warps and pipeline stages; 0 where the kernel decides."""

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


def arch(device: torch.device) -> int:
    """Compute capability of ``device`` as in 90, or 0 where it has none."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _hopper(arch: int) -> bool:
    """227 KiB of shared memory, warpgroup products and the tensor memory accelerator; sm_120 has none of the three."""
    return 90 <= arch < 120


def interval_forward(dim: int, value_dim: int, dtype: torch.dtype, windowed: bool, arch: int) -> Tile:
    wide = max(padded_dim(dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1) if wide > 128 else Tile(64, 32, 4, 1)
    if wide > 128:
        return Tile(64, 32, 4, 2 if _hopper(arch) else 1)
    if not _hopper(arch):
        return Tile(64, 32, 4, 2)
    # window 3.4 ms (128 rows: 4.6); compressed 9.2 ms (8 warps: 10.2; 64 rows: 9.9)
    return Tile(64, 64, 4, 2) if windowed else Tile(128, 64, 4, 2)


def interval_dq(dim: int, value_dim: int, dtype: torch.dtype, windowed: bool, arch: int) -> Tile:
    wide = max(padded_dim(dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return Tile(32, 16, 4, 1) if wide > 128 else Tile(32, 32, 4, 1)
    if wide > 128:
        return Tile(64, 32, 4, 1) if _hopper(arch) else Tile(32, 32, 4, 1)
    if not _hopper(arch):
        return Tile(64, 32, 4, 1)
    # window 3.7 ms (2 stages: 4.3); compressed 11.1 ms (128 rows, 8 warps, 2 stages: 12.7)
    return Tile(64, 64, 4, 3 if windowed else 2)


def interval_dkv(dim: int, value_dim: int, dtype: torch.dtype, windowed: bool, arch: int) -> Tile:
    """``block_m`` queries at a time for ``block_n`` keys."""
    wide = max(padded_dim(dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1) if wide > 128 else Tile(32, 32, 4, 1)
    if wide > 128:
        return Tile(32, 64, 8, 1) if _hopper(arch) else Tile(16, 32, 4, 1)
    if not _hopper(arch):
        return Tile(32, 64, 4, 1)
    # window 5.6 ms (128 keys: 6.9); compressed 19.4 ms (64 queries, 2 stages: 21.2)
    return Tile(32, 64, 4, 3) if windowed else Tile(32, 128, 8, 3)


def head_shares(programs: int, group: int) -> int:
    """Into how many shares the query heads of a group are split where ``programs`` alone would not fill a GPU."""
    share = max(1, group * max(1, programs) // 1024)
    return -(-group // min(share, group))


def union_queries(group: int, width: int) -> int:
    """R, neighbouring queries in a tile of the selected branch: their heads should fill the 64 rows of a matrix product."""
    queries = 1
    while queries < 16 and queries * 2 * group <= 64 and queries * 2 * padded(width) <= 4096:
        queries *= 2
    return queries


def selected_forward(dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """Only warps and stages; the tile is ``union_queries`` queries by a selection block."""
    wide = max(padded_dim(dim), padded_dim(value_dim))
    # 15.7 ms (4 stages: 23.5; 8 warps: 35.6)
    return Tile(0, 0, 4, 2 if dtype != torch.float32 and wide <= 128 and _hopper(arch) else 1)


def selected_dq(dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> Tile:
    wide = max(padded_dim(dim), padded_dim(value_dim))
    # 17.8 ms (3 stages: 26.8)
    return Tile(0, 0, 4, 2 if dtype != torch.float32 and wide <= 128 and _hopper(arch) else 1)


def selected_dkv(dim: int, value_dim: int, dtype: torch.dtype, group: int, arch: int) -> Tile:
    """``block_m`` rows, heads of a few queries, at a time; a group of more heads takes all of them."""
    wide = max(padded_dim(dim), padded_dim(value_dim))
    if dtype == torch.float32 or wide > 128:
        return Tile(16, 0, 4, 1)
    # 13.7 ms (3 stages: 14.9; 64 rows: 17.1). Rows are gathered by an index: three stages would wait for it.
    stages = 5 if group <= 32 else 3 if group <= 64 else 2
    return Tile(32, 0, 4, stages if _hopper(arch) else 1)


def importance(dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """``block_m`` queries by ``block_n`` compressed blocks."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1) if padded_dim(dim) > 128 else Tile(32, 64, 4, 1)
    if padded_dim(dim) > 128:
        return Tile(64, 64, 4, 2 if _hopper(arch) else 1)
    # 5.7 ms without the top-n (128 queries: 7.0; 64 blocks: 6.1)
    return Tile(64, 128, 4, 3) if _hopper(arch) else Tile(64, 64, 4, 2)


# Hopper's twins, for 16 bit and head dims of 64 or 128. H100 80GB HBM3, 2026-11-24, 65,536 tokens, 64/4 heads of 128, bf16.
HOPPER_SELECTED_STAGES = 3  # 14.6 ms random, 10.0 trained-like (2 stages: 14.5, 10.1; the portable kernel: 16.1, 11.1)


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


def multiprocessors(device: torch.device) -> int:
    """Of ``device``; a compilation without one counts on an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
