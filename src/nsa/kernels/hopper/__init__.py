"""Kernels for Hopper in Triton's Gluon dialect: only what measurement proved worth it, each with a portable twin."""

from __future__ import annotations

import torch
import triton

OLDEST = (3, 6)  # Triton whose Gluon these kernels are written in
HEAD_DIMS = {(64, 64), (64, 128), (128, 64), (128, 128), (192, 128)}  # of keys and of values


def supports(dtype: torch.dtype, dim: int, value_dim: int, arch: int) -> str | None:
    """``None`` if these kernels take head dims and a dtype like these on ``arch``, else the reason they don't."""
    if arch != 90:
        return f"they need compute capability 9.0, got {arch / 10}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"they need Triton {OLDEST[0]}.{OLDEST[1]}, got {triton.__version__}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"they compute in fp16 and bf16, got {dtype}"
    if (dim, value_dim) not in HEAD_DIMS:
        return f"they hold head dims of 64 and 128, and 192 with values of 128, got {dim} and {value_dim}"
    return None


def gathers(group: int, size: int) -> bool:
    """Whether tiles of 64 rows can be made of queries from anywhere, each with all heads of a group, for a block of 64 keys."""
    return group in (8, 16, 32, 64) and size == 64
