"""Tiles and splits of the decode kernels: pure functions like those of ``tuning``.

A step reads every byte once, so what counts is how many programs read at the same time. The keys of a sequence are split among
programs until these fill an H100's 132 multiprocessors two or three times; none of this depends on lengths, so that a captured
launch stays right as they grow. ``docs/performance.md`` says what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.config import NSAConfig
from nsa.tuning import Tile, padded, padded_dim

COMPRESSED_PROGRAMS = 264
FEW_PROGRAMS, FEW_PARTS = 132, 33  # more parts than that of a sequence took longer to merge than they saved: 4 us at 1 x 64k
SLICED = 128  # programs without a split that a step in slices has at least: a slice must fill the GPU
SLICES = 4
PRIORITIES = (-1, -2, 0)  # of a slice's compressed blocks, its choice and its tokens; the lowest number goes first
TOKEN_PROGRAMS = 396
RANKED = 512  # blocks that a program adds up the importance of and ranks
RANKED_AGAIN = 4096  # that one ranks of those which such programs chose


def tile(cfg: NSAConfig, rows: int, dtype: torch.dtype, arch: int) -> Tile:
    """Of an attention of ``rows`` query rows that share their keys."""
    wide = max(padded_dim(cfg.head_dim), padded_dim(cfg.value_dim))
    block_m = min(64 if dtype != torch.float32 and wide <= 128 else 16, padded(rows))
    if dtype == torch.float32:
        return Tile(block_m, 16 if wide > 128 else 32, 4, 1)
    if wide > 128:
        return Tile(block_m, 32, 4, 3 if 90 <= arch < 120 else 1)
    return Tile(block_m, 64, 4, 3 if 90 <= arch < 120 else 2 if arch else 1)


@dataclass(frozen=True)
class Cells:
    """How a tile of compressed blocks is cut: a cell is ``width`` of those that start in one selection block, or fewer.

    Attributes:
        width: a power of two.
        per_block: cells of a selection block.
        per_tile: cells of a tile.
        tiles: of the longest sequence.
    """

    width: int
    per_block: int
    per_tile: int
    tiles: int


def cells(cfg: NSAConfig, max_seq_len: int, block_n: int) -> Cells:
    """Of tiles of ``block_n`` compressed blocks."""
    starting = cfg.selection_block_size // cfg.block_stride
    width = min(1 << (starting - 1).bit_length(), block_n)
    per_block, per_tile = -(-starting // width), block_n // width
    return Cells(width, per_block, per_tile, max(1, -(-cfg.num_selection_blocks(max_seq_len) * per_block // per_tile)))


def slices(batch: int, programs: int, arch: int) -> int:
    """Into how many slices a batch is cut whose sequences have ``programs`` programs each without a split."""
    return min(SLICES, batch) if arch >= 90 and batch * programs >= SLICED else 1


def compressed_splits(programs: int, tiles: int) -> int:
    """Into how many parts ``tiles`` tiles are split where there are ``programs`` without a split."""
    return max(1, min(COMPRESSED_PROGRAMS // programs, max(FEW_PARTS, FEW_PROGRAMS // programs), tiles))


@dataclass(frozen=True)
class TokenSplits:
    """Tiles that a program of the selected or window branch takes, and how many programs each branch has."""

    tiles: int
    selected: int
    window: int


def token_splits(cfg: NSAConfig, programs: int, block_n: int) -> TokenSplits:
    """Both branches in parts of one size, where there are ``programs`` without a split."""
    selected = cfg.num_selected_blocks * -(-cfg.selection_block_size // block_n)
    window = -(-cfg.window_size // block_n)
    tiles = -(-(selected + window) // max(2, TOKEN_PROGRAMS // programs))
    return TokenSplits(tiles, -(-selected // tiles), -(-window // tiles))


def ranking(n: int, again: bool, count: int, least: int = 16) -> tuple[int, int]:
    """Blocks that a program ranks, of ``count``, and its warps; each program chooses ``n``, so there must be more."""
    most = max(RANKED_AGAIN if again else RANKED, 1 << (4 * n - 1).bit_length())
    width = max(least, 16, 1 << (n - 1).bit_length(), min(most, 1 << (count - 1).bit_length()))
    return width, max(1, min(8, width // (512 if again else 128)))


def whole(pairs: int, multiprocessors: int) -> bool:
    """Whether a step of so many sequences and KV heads is one launch, a program for each, rather than several with splits.

    Programs read at a pace of their own, about the share of memory that each of a third of all multiprocessors has: on an H200,
    2026-11-28, 64k tokens, 128 pairs 104 us (launches: 129), 64 pairs 66 (85), but 32 pairs of 128k 89 (85).
    """
    left = pairs % multiprocessors  # of the last turn
    return left == 0 or 10 * left >= 3 * multiprocessors or pairs >= 3 * multiprocessors


def dependent_launch(arch: int) -> bool:
    """Whether a kernel may start before the one before it has ended (Hopper and newer)."""
    return arch >= 90
