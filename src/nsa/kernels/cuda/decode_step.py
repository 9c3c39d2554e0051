"""A decode step of one token on Hopper, a CTA for each sequence and KV head: the launcher of ``decode_step.cu``.

The twin of ``kernels/triton/decode.py``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.cuda import CHOSEN, ROWS, SIZE, driver, holds, nvrtc
from nsa.kernels.cuda.selected_lists import options
from nsa.kernels.triton.tile import LOG2E

THREADS = 384
LENGTH, STRIDE = 32, 16  # of compressed blocks
NEAR_TILES, KEPT = 66, ROWS * (16 + 2)  # tiles whose weights shared memory has room for, and numbers kept of a tile
# The ring, 8 tiles of 16 KiB or more smaller ones, what warps give each other, those weights, the barriers, and what aligning
# takes.
SHARED = 8 * (16 << 10) + 8 * ROWS * 40 * 4 + NEAR_TILES * KEPT * 4 + 2048 + 1024
MOST_BLOCKS = 4096


class Call(ctypes.Structure):
    """``Call`` of the source; the comments are there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "gates", "lengths", "kept", "o", "indices",
        )),
        *((name, ctypes.c_int) for name in (
            "heads", "kv_heads", "group", "tiles", "rows", "slots", "window", "n", "num_initial", "num_local", "wide_gates",
        )),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_uint),
    )  # fmt: skip


def supports(q: Tensor, value_dim: int, paged: bool, max_seq_len: int, cfg: NSAConfig, arch: int) -> str | None:
    """``None`` if the kernel takes a step like this, else the reason why not. ``q`` ``[B, TQ, HQ, D]``."""
    dim, geometry = q.shape[-1], (cfg.block_length, cfg.block_stride, cfg.selection_block_size)
    if refused := holds(q.dtype, dim, value_dim, arch):
        return refused
    if q.shape[1] != 1 or cfg.group_size > ROWS:
        return f"it takes one token, of up to {ROWS} heads a KV head, got {q.shape[1]} of {cfg.group_size}"
    if paged:
        return "it reads tokens that lie side by side, got pages"
    if geometry != (LENGTH, STRIDE, SIZE):
        return f"it takes blocks of {LENGTH} tokens every {STRIDE}, selected by {SIZE}, got {geometry}"
    if cfg.num_selected_blocks > CHOSEN or cfg.num_selection_blocks(max_seq_len) > MOST_BLOCKS:
        return (
            f"it chooses up to {CHOSEN} of {MOST_BLOCKS} blocks, got {cfg.num_selected_blocks} of "
            f"{cfg.num_selection_blocks(max_seq_len)}"
        )
    return None


@functools.cache
def program(dtype: torch.dtype, dim: int, value_dim: int, device: int) -> driver.Kernel | None:
    """For such head dims, on ``device``, the current one; None, after a warning, where it can't be had."""

    def loaded() -> driver.Kernel:
        module = driver.load(nvrtc.cubin("decode_step.cu", options(dtype, ROWS, dim, value_dim)), device)
        return driver.Kernel(module, "decode_step", THREADS, SHARED)

    return driver.attempt("decode_step", loaded)


def decode_step(
    kernel: driver.Kernel, q: Tensor, gates: Tensor, pools: Sequence[Tensor], rings: Sequence[Tensor], lengths: Tensor,
    cfg: NSAConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the twin, for what ``supports`` says: of one token, and of caches without pages."""
    if q.data_ptr() % 4:  # the kernel reads two numbers at once
        q = q.clone()
    batch, _, heads, _ = q.shape
    k_slc, v_slc, k_cmp, v_cmp = pools
    kv_heads, tiles = cfg.num_kv_heads, -(-k_cmp.shape[1] // SIZE)
    pairs = batch * kv_heads
    kept = torch.empty(pairs, tiles, KEPT, dtype=torch.float32, device=q.device) if tiles > NEAR_TILES else None
    o = torch.empty(batch, 1, heads, cfg.value_dim, dtype=q.dtype, device=q.device)
    indices = torch.empty(batch, 1, kv_heads, cfg.num_selected_blocks, dtype=torch.int32, device=q.device)
    call = Call(
        q.data_ptr(), gates.data_ptr(), lengths.data_ptr(), None if kept is None else kept.data_ptr(), o.data_ptr(),
        indices.data_ptr(),
        heads, kv_heads, cfg.group_size, tiles, k_slc.shape[1], rings[0].shape[1], cfg.window_size, cfg.num_selected_blocks,
        cfg.num_initial_blocks, cfg.num_local_blocks, gates.dtype == torch.float32, cfg.softmax_scale * LOG2E.value, 0,
    )  # fmt: skip
    _room, maps = driver.described([(x, SIZE, 1) for x in (k_cmp, v_cmp, k_slc, v_slc, *rings)])
    driver.enter(q.device.index)
    if pairs:
        kernel.launch((pairs, 1), SHARED, [*maps, ctypes.addressof(call)], early=True)
    return o, indices
