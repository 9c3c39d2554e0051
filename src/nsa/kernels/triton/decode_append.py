"""A step's new tokens into the cache, and the means of the blocks that they complete.

One program a sequence, which is the only one to read its length and the only one to change it: no other launch has to. The new
tokens overwrite nothing that a block still needs, since the tail has slack for a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.triton.decode_compressed import pool_rows
from nsa.kernels.triton.tile import wide

COLUMNS = 512  # numbers of a row, its heads one after another, that are moved together


@triton.jit
def _copy(new, pool, ring, at, slot, batch, queries, width, BT: tl.constexpr, BC: tl.constexpr):
    """Rows of ``new`` to the rows ``at`` of ``pool``, where there is one, and to the slots ``slot`` of ``ring``."""
    token = tl.arange(0, BT)
    for c in tl.range(0, width, BC):
        column = c + tl.arange(0, BC)
        keep = (token < queries)[:, None] & (column < width)[None, :]
        x = tl.load(new + (wide(batch * queries) + token)[:, None] * width + column[None, :], mask=keep, other=0.0)
        if pool is not None:
            tl.store(pool + at[:, None] * width + column[None, :], x, mask=keep)
        if ring is not None:
            tl.store(ring + slot[:, None] * width + column[None, :], x, mask=keep)


@triton.jit
def _mean(new, tail, pool, first, at, held, batch, queries, slots, length, width, BL: tl.constexpr, BC: tl.constexpr):
    """The mean of the ``length`` tokens from ``first`` on to row ``at`` of ``pool``: those before ``held`` lie in the tail."""
    token = first + tl.arange(0, BL)
    inside = tl.arange(0, BL) < length
    for c in tl.range(0, width, BC):
        column = c + tl.arange(0, BC)
        known = (inside & (token < held))[:, None] & (column < width)[None, :]
        fresh = (inside & (token >= held))[:, None] & (column < width)[None, :]
        slot = wide(batch) * slots + token % slots
        x = tl.load(tail + slot[:, None] * width + column[None, :], mask=known, other=0.0).to(tl.float32)
        row = wide(batch * queries) + token - held
        x += tl.load(new + row[:, None] * width + column[None, :], mask=fresh, other=0.0).to(tl.float32)
        mean = tl.sum(x, 0) / length
        tl.store(pool + at * width + column, mean.to(pool.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["max_pages", "rows", "queries", "kv_heads", "window_slots", "tail_slots", "length", "stride"])
def decode_append_kernel(
    nk_cmp, nv_cmp, nk_slc, nv_slc, nk_win, nv_win, k_slc, v_slc, k_cmp, v_cmp, k_win, v_win, k_tail, v_tail,
    table, lengths, limit, overflow, max_pages, rows, queries, kv_heads, window_slots, tail_slots, length, stride,
    PAGED: tl.constexpr, PER_PAGE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, BCL: tl.constexpr,
):  # fmt: skip
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
        at = pool_rows(token, new, batch, table, max_pages, rows, PER_PAGE)
        slot = wide(batch) * window_slots + token % window_slots
        tail = wide(batch) * tail_slots + token % tail_slots
        width, width_v = kv_heads * D, kv_heads * DV
        # How many blocks a step can complete is known, which of them it does is not.
        for c in tl.range(0, (queries - 1) // stride + 1):
            done = tl.where(held < length, 0, (held - length) // stride + 1)
            block = done + c
            if block * stride + length <= end:
                stride_at = block + length // stride - 1 + tl.zeros([1], tl.int32)
                where = tl.sum(
                    pool_rows(stride_at, stride_at >= 0, batch, table, max_pages, rows // stride, PER_PAGE // STRIDE), 0
                )
                _mean(nk_cmp, k_tail, k_cmp, block * stride, where, held, batch, queries, tail_slots, length, width, BL, BCL)
                _mean(nv_cmp, v_tail, v_cmp, block * stride, where, held, batch, queries, tail_slots, length, width_v, BL, BCL)
        _copy(nk_cmp, None, k_tail, at, tail, batch, queries, width, BT, BC)
        _copy(nv_cmp, None, v_tail, at, tail, batch, queries, width_v, BT, BC)
        _copy(nk_slc, k_slc, None, at, slot, batch, queries, width, BT, BC)
        _copy(nv_slc, v_slc, None, at, slot, batch, queries, width_v, BT, BC)
        _copy(nk_win, None, k_win, at, slot, batch, queries, width, BT, BC)
        _copy(nv_win, None, v_win, at, slot, batch, queries, width_v, BT, BC)
        tl.debug_barrier()  # every warp has read the length
        tl.store(lengths + batch, end)
    else:
        tl.store(overflow, 1)


def decode_append(
    new: Sequence[Tensor], pools: Sequence[Tensor], rings: Sequence[Tensor], table: Tensor, lengths: Tensor,
    limit: Tensor, overflow: Tensor, paged: bool, length: int, stride: int,
) -> None:  # fmt: skip
    """Write the step and add to ``lengths`` int32 ``[B]``; one past ``limit [1]`` or without a page sets ``overflow`` only.

    new: k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, contiguous ``[B, T_new, HK, D or DV]``; pools: k_slc, v_slc, k_cmp, v_cmp
    ``[pages, rows, HK, D or DV]``; rings: k_win, v_win, k_tail, v_tail ``[B, slots, HK, D or DV]``.
    """
    batch, queries, kv_heads, dim = new[0].shape
    rows = pools[0].shape[1]
    covers = triton.next_power_of_2(length)
    decode_append_kernel[(batch,)](
        *new, *pools, *rings, table, lengths, limit, overflow, table.shape[1], rows, queries, kv_heads,
        rings[0].shape[1], rings[2].shape[1], length, stride,
        PAGED=paged, PER_PAGE=rows if paged else 0, STRIDE=stride, D=dim, DV=new[1].shape[-1],
        BT=triton.next_power_of_2(queries), BL=covers, BC=COLUMNS, BCL=max(16, min(COLUMNS, 16384 // covers)),
        num_warps=8,
    )  # fmt: skip
