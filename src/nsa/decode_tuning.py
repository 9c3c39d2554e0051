"""Tiles and splits of the decode kernels: pure functions like those of ``tuning``.

A step reads every byte once, so what counts is how many programs read at the same time. The keys of a sequence are split among
programs until there are ``PROGRAMS``, two for each of an H100's 132 multiprocessors; none of this depends on lengths, so that a
captured launch stays right as they grow. Sized by counting bytes and shared memory, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.config import NSAConfig
from nsa.tuning import Tile, padded, padded_dim

PROGRAMS = 264


def tile(cfg: NSAConfig, rows: int, dtype: torch.dtype, arch: int) -> Tile:
    """Of an attention of ``rows`` query rows that share their keys."""
    wide = max(padded_dim(cfg.head_dim), padded_dim(cfg.value_dim))
    block_m = min(64 if dtype != torch.float32 and wide <= 128 else 16, padded(rows))
    if dtype == torch.float32:
        return Tile(block_m, 16 if wide > 128 else 32, 4, 1)
    if wide > 128:
        return Tile(block_m, 32, 4, 3 if 90 <= arch < 120 else 1)
    return Tile(block_m, 64, 4, 3 if 90 <= arch < 120 else 2 if arch else 1)


def compressed_splits(programs: int, blocks: int, block_n: int) -> int:
    """Into how many parts at most ``blocks`` compressed blocks are split where there are ``programs`` without a split."""
    return max(1, min(PROGRAMS // programs, -(-blocks // block_n)))


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
    tiles = -(-(selected + window) // max(2, PROGRAMS // programs))
    return TokenSplits(tiles, -(-selected // tiles), -(-window // tiles))


def importance_tile(cfg: NSAConfig) -> tuple[int, int]:
    """Selection blocks of a program, and the compressed blocks that may touch one of them, padded."""
    strides = cfg.selection_block_size // cfg.block_stride + cfg.block_length // cfg.block_stride - 1
    width = 1 << max(0, strides - 1).bit_length()
    return max(1, 512 // width), width
