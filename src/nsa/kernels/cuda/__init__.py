"""Kernels in CUDA C++, for what neither dialect of Triton can say: warps of a program that go ways of their own.

Compiled by NVRTC at first use, each behind a twin that computes the same.
"""

from __future__ import annotations

import torch

HEAD_DIMS = ((64, 64), (128, 128), (192, 128))  # of keys and of values
ROWS, SIZE, WIDTH = 16, 64, 16  # as in tiles.cuh and selected_lists.cuh
MOST_KEYS = 1 << 23  # for every 32 blocks, the kernel that makes lists has two words of shared memory, 32 KiB in all
RANKED, CHOSEN = 2048, 32  # blocks that a row's warp holds in registers, and that a warp chooses, one a lane


def holds(dtype: torch.dtype, dim: int, value_dim: int, arch: int) -> str | None:
    """``None`` if kernels of attention here take a dtype and head dims like these on ``arch``, else the reason why not."""
    if arch != 90:
        return f"it needs compute capability 9.0, got {arch / 10}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in fp16 and bf16, got {dtype}"
    if (dim, value_dim) not in HEAD_DIMS:
        known = " or ".join(f"{x}/{y}" for x, y in HEAD_DIMS)
        return f"it holds head dims of {known} of keys and values, got {dim}/{value_dim}"
    return None


def supports(
    dtype: torch.dtype, dim: int, value_dim: int, group: int, size: int, width: int, keys: int, arch: int
) -> str | None:
    """``None`` if the selected branch of a call like this has a kernel here, else the reason why not.

    ``size`` of a selection block, ``width`` of the selection, ``keys`` the rows of the key tensor.
    """
    if refused := holds(dtype, dim, value_dim, arch):
        return refused
    if ROWS % group:
        return f"whole groups of heads fill the {ROWS} rows of a fragment, got {group}"
    if size != SIZE:
        return f"selection blocks must have {SIZE} tokens, got {size}"
    if width > WIDTH:
        return f"its lists hold {WIDTH} blocks a query, got {width}"
    if keys > MOST_KEYS:
        return f"its lists hold the blocks of {MOST_KEYS} keys, got {keys}"
    return None


def ranks(blocks: int, n: int, arch: int) -> str | None:
    """``None`` if a kernel here chooses ``n`` of so many blocks, else the reason why not."""
    if arch != 90:
        return f"it needs compute capability 9.0, got {arch / 10}"
    if n > CHOSEN:
        return f"it chooses {CHOSEN} blocks at most, got {n}"
    if blocks > RANKED:
        return f"it holds {RANKED} blocks in registers, got {blocks}"
    return None
