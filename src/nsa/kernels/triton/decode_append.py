"""A step's new tokens into the cache, and the means of the blocks that they complete.

One program a sequence, which is the only one to read its length and the only one to change it: no other launch has to. The new
tokens overwrite nothing that a block still needs, since the tail has slack for a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.triton.decode_compressed import pool_place
from nsa.kernels.triton.dependent import dependents_may_start, launch_options
from nsa.kernels.triton.tile import wide

COLUMNS = 512  # numbers of a row, its heads one after another, that are moved together


@triton.jit
def _load(new, rows, columns, keep, width):
    return tl.load(new + rows * width + columns, mask=keep & (columns < width), other=0.0)


@triton.jit
def _place(page, row, rows, kv_heads, column, D: tl.constexpr):
    """Where number ``column`` of all heads' row ``row`` lies in a tensor of pages ``[HK, rows, D]``."""
    return ((page * kv_heads + column // D) * rows + row) * D + column % D


@triton.jit
def _block(new, tail, first, held, batch, queries, slots, length, width, column, BL: tl.constexpr):
    """``[BL, len(column)]``: the ``length`` tokens from ``first`` on, those before ``held`` out of the tail; 0 behind them."""
    token = first + tl.arange(0, BL)
    inside = tl.arange(0, BL) < length
    known = (inside & (token < held))[:, None] & (column < width)[None, :]
    fresh = (inside & (token >= held) & (token < held + queries))[:, None] & (column < width)[None, :]
    at = (wide(batch) * slots + token % slots)[:, None] * width + column[None, :]
    row = (wide(batch * queries) + token - held)[:, None] * width + column[None, :]
    old = tl.load(tail + at, mask=known, other=0.0)
    return tl.where(known, old, tl.load(new + row, mask=fresh, other=0.0))


@triton.jit
def _store_block(
    new, tail, made, pool, block, page, row, rows, c, count, held, batch, queries, slots, length, stride, kv_heads,
    MEAN: tl.constexpr, D: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Row ``row`` of a page of ``pool``: the mean of the block, or what the compressor made of it."""
    width = kv_heads * D
    for first in tl.range(0, width, BC):
        column = first + tl.arange(0, BC)
        if MEAN:
            x = _block(new, tail, block * stride, held, batch, queries, slots, length, width, column, BL)
            y = tl.sum(x.to(tl.float32), 0) / length
        else:
            y = tl.load(made + (wide(batch) * count + c) * width + column, mask=column < width, other=0.0)
        at = _place(page, row, rows, kv_heads, column, D)
        tl.store(pool + at, y.to(pool.dtype.element_ty), mask=column < width)


@triton.jit
def next_block(held, length, stride):
    """The first compressed block that ``held`` tokens don't complete."""
    return tl.where(held < length, 0, (held - length) // stride + 1)


@triton.jit(do_not_specialize=["queries", "kv_heads", "slots", "length", "stride", "count"])
def decode_blocks_kernel(
    new_k, new_v, k_tail, v_tail, out_k, out_v, lengths, queries, kv_heads, slots, length, stride, count,
    D: tl.constexpr, DV: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    batch, c = tl.program_id(0), tl.program_id(1)
    held = tl.load(lengths + batch)
    first = (next_block(held, length, stride) + c) * stride
    token = tl.arange(0, BL)
    row = (wide(batch) * count + c) * length + token
    for i in tl.static_range(2):
        new, tail, out = (new_k, k_tail, out_k) if i == 0 else (new_v, v_tail, out_v)
        width = kv_heads * (D if i == 0 else DV)
        for begin in tl.range(0, width, BC):
            column = begin + tl.arange(0, BC)
            x = _block(new, tail, first, held, batch, queries, slots, length, width, column, BL)
            keep = (token < length)[:, None] & (column < width)[None, :]
            tl.store(out + row[:, None] * width + column[None, :], x, mask=keep)


@triton.jit(do_not_specialize=["max_pages", "rows", "queries", "kv_heads", "window_slots", "tail_slots", "length", "stride"])
def decode_append_kernel(
    nk_cmp, nv_cmp, nk_slc, nv_slc, nk_win, nv_win, made_k, made_v, k_slc, v_slc, k_cmp, v_cmp, k_win, v_win, k_tail, v_tail,
    table, lengths, limit, overflow, max_pages, rows, queries, kv_heads, window_slots, tail_slots, length, stride, count,
    MEAN: tl.constexpr, PAGED: tl.constexpr, PER_PAGE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, BCL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    dependents_may_start(DEPENDENT)
    batch = tl.program_id(0)
    held = tl.load(lengths + batch)
    end = held + queries
    room = end <= tl.load(limit)
    if PAGED:
        last = tl.minimum((end - 1) // PER_PAGE, max_pages - 1)
        room = room & (tl.load(table + batch * max_pages + last) >= 0)
    if room:
        token = held + tl.arange(0, BT)
        new = tl.arange(0, BT) < queries
        page, row = pool_place(token, new, batch, table, max_pages, PER_PAGE)
        page, row = page[:, None], row[:, None]
        slot, tail = (token % window_slots)[:, None], (wide(batch) * tail_slots + token % tail_slots)[:, None]
        width, width_v = kv_heads * D, kv_heads * DV
        # How many blocks a step can complete is known, which of them it does is not.
        for c in tl.range(0, count):
            block = next_block(held, length, stride) + c
            if block * stride + length <= end:
                end_stride = block + length // stride - 1 + tl.zeros([1], tl.int32)
                at, there = pool_place(end_stride, end_stride >= 0, batch, table, max_pages, PER_PAGE // STRIDE)
                at, there = tl.sum(at, 0), tl.sum(there, 0)
                _store_block(
                    nk_cmp, k_tail, made_k, k_cmp, block, at, there, rows // stride, c, count, held, batch, queries, tail_slots,
                    length, stride, kv_heads, MEAN, D, BL, BCL,
                )  # fmt: skip
                _store_block(
                    nv_cmp, v_tail, made_v, v_cmp, block, at, there, rows // stride, c, count, held, batch, queries, tail_slots,
                    length, stride, kv_heads, MEAN, DV, BL, BCL,
                )  # fmt: skip
        rows_new, keep = (wide(batch * queries) + tl.arange(0, BT))[:, None], new[:, None]
        for c in tl.range(0, tl.maximum(width, width_v), BC):
            column = (c + tl.arange(0, BC))[None, :]
            # All loads before all stores: one wait for memory instead of six.
            xk_cmp, xv_cmp = _load(nk_cmp, rows_new, column, keep, width), _load(nv_cmp, rows_new, column, keep, width_v)
            xk_slc, xv_slc = _load(nk_slc, rows_new, column, keep, width), _load(nv_slc, rows_new, column, keep, width_v)
            xk_win, xv_win = _load(nk_win, rows_new, column, keep, width), _load(nv_win, rows_new, column, keep, width_v)
            keep_k, keep_v = keep & (column < width), keep & (column < width_v)
            tl.store(k_tail + tail * width + column, xk_cmp, mask=keep_k)
            tl.store(v_tail + tail * width_v + column, xv_cmp, mask=keep_v)
            tl.store(k_slc + _place(page, row, rows, kv_heads, column, D), xk_slc, mask=keep_k)
            tl.store(v_slc + _place(page, row, rows, kv_heads, column, DV), xv_slc, mask=keep_v)
            tl.store(k_win + _place(wide(batch), slot, window_slots, kv_heads, column, D), xk_win, mask=keep_k)
            tl.store(v_win + _place(wide(batch), slot, window_slots, kv_heads, column, DV), xv_win, mask=keep_v)
        tl.debug_barrier()  # every warp has read the length
        tl.store(lengths + batch, end)
    else:
        tl.store(overflow, 1)


def decode_blocks(
    new: Sequence[Tensor], tails: Sequence[Tensor], lengths: Tensor, count: int, length: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Raw tokens of the next ``count`` blocks of each sequence: ``[B, count, l, HK, D]`` and ``[B, count, l, HK, DV]``.

    new: k and v ``[B, T_new, HK, D or DV]`` contiguous; tails: k_tail, v_tail. Of a block that is not complete yet, the tokens
    to come are 0.
    """
    batch, queries, kv_heads, dim = new[0].shape
    value_dim, covers = new[1].shape[-1], triton.next_power_of_2(length)
    k, v = (x.new_empty(batch, count, length, kv_heads, x.shape[-1]) for x in new)
    decode_blocks_kernel[(batch, count)](
        *new, *tails, k, v, lengths, queries, kv_heads, tails[0].shape[1], length, stride, count,
        D=dim, DV=value_dim, BL=covers, BC=_columns(covers), num_warps=4,
    )  # fmt: skip
    return k, v


def _columns(covers: int) -> int:
    """Of a tile of ``covers`` tokens."""
    return max(16, min(COLUMNS, 16384 // covers))


def decode_append(
    new: Sequence[Tensor], made: Sequence[Tensor] | None, pools: Sequence[Tensor], rings: Sequence[Tensor], table: Tensor,
    lengths: Tensor, limit: Tensor, overflow: Tensor, paged: bool, length: int, stride: int,
) -> None:  # fmt: skip
    """Write the step and add to ``lengths`` int32 ``[B]``; one past ``limit [1]`` or without a page sets ``overflow`` only.

    new: k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, contiguous ``[B, T_new, HK, D or DV]``; pools: k_slc, v_slc, k_cmp, v_cmp
    ``[pages, rows, HK, D or DV]``; rings: k_win, v_win, k_tail, v_tail ``[B, slots, HK, D or DV]``. made: what the compressors
    made of the next ``count`` blocks, contiguous ``[B, count, HK, D or DV]``; None for the mean.
    """
    batch, queries, kv_heads, dim = new[0].shape
    rows = pools[0].shape[1]
    covers = triton.next_power_of_2(length)
    decode_append_kernel[(batch,)](
        *new, *(made or (None, None)), *pools, *rings, table, lengths, limit, overflow,
        table.shape[1], rows, queries, kv_heads, rings[0].shape[1], rings[2].shape[1], length, stride,
        (queries - 1) // stride + 1 if made is None else made[0].shape[1],
        MEAN=made is None, PAGED=paged, PER_PAGE=rows if paged else 0, STRIDE=stride, D=dim, DV=new[1].shape[-1],
        BT=triton.next_power_of_2(queries), BL=covers, BC=COLUMNS, BCL=_columns(covers),
        DEPENDENT=launch_options(table.device)[0], num_warps=8,
    )  # fmt: skip
