"""Union lists for the selected branch, made from ``block_indices``.

``R`` neighbouring queries are computed as one tile, over all blocks that any of them selected; bit ``r`` of a block's mask says
whether query ``r`` did. What neighbours share is then read once. A query's indices are a set: any order, duplicates once, out
of range never.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.triton.sequence import Spans, Tiles, locate, span

NOTHING = tl.constexpr(2147483647)  # sorts behind every block


@dataclass(frozen=True)
class UnionLists:
    """Blocks and masks ``[tiles, HK, length]``; tile ``i`` and KV head ``hk`` own the first ``counts[i, hk, 0]`` entries.

    ``masks`` hold running sums: an entry's own bits are its value less the one before. Of the blocks, which ascend, the
    first ``counts[i, hk, 1]`` lie wholly in the past of the tile's first query.
    """

    tiles: Tiles
    queries: int
    blocks: Tensor
    masks: Tensor
    counts: Tensor


@triton.jit
def own_blocks(indices, row, pos, keep, slot, hk, kv_heads, size, WIDTH: tl.constexpr):
    """``NOTHING`` or the block in ``slot`` of the queries in rows ``row`` at ``pos``."""
    ptrs = indices + (row.to(tl.int64) * kv_heads + hk) * WIDTH + slot
    block = tl.load(ptrs, mask=keep & (slot < WIDTH), other=-1)
    return tl.where((block >= 0) & (block <= pos // size), block, NOTHING)


@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "offset", "rows_q", "kv_heads", "size"])
def union_kernel(
    indices, blocks, masks, counts, tiles, tile_seq, tile_first, table, q_len, k_len, offset, rows_q, kv_heads, size,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    pid, hk = tl.program_id(0), tl.program_id(1)
    LENGTH: tl.constexpr = R * PADDED
    seq, tile = locate(pid, tiles, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    entry = tl.arange(0, LENGTH)
    r = entry // PADDED
    query = tile * R + r
    block = own_blocks(
        indices, batch * rows_q + q_row + query, offset + query, query < q_len, entry % PADDED, hk, kv_heads, size, WIDTH
    )
    # Sorted by block, then query; a query that named a block twice stands there twice in a row.
    key = tl.sort(tl.where(block == NOTHING, NOTHING, block * R + r))
    valid = key != NOTHING
    before = tl.gather(key, tl.maximum(entry - 1, 0), 0)
    after = tl.gather(key, tl.minimum(entry + 1, LENGTH - 1), 0)
    new = valid & ((key // R != before // R) | (entry == 0))
    last = valid & ((key // R != after // R) | (after == NOTHING) | (entry == LENGTH - 1))
    bit = tl.where(valid & ((key != before) | (entry == 0)), 1 << (key % R), 0)
    place = tl.cumsum(new.to(tl.int32), 0) - 1
    base = (pid.to(tl.int64) * kv_heads + hk) * LENGTH
    tl.store(blocks + base + place, key // R, mask=new)
    tl.store(masks + base + place, tl.cumsum(bit, 0), mask=last)
    past = new & ((key // R + 1) * size - 1 <= offset + tile * R)
    count = counts + (pid * kv_heads + hk) * 2
    tl.store(count, tl.sum(new.to(tl.int32), 0))
    tl.store(count + 1, tl.sum(past.to(tl.int32), 0))


def union_lists(indices: Tensor, spans: Spans, queries: int, size: int) -> UnionLists:
    """indices int32 ``[B, TQ, HK, width]``; a tile for each ``queries`` queries."""
    kv_heads, width = indices.shape[2:]
    padded = triton.next_power_of_2(max(width, 1))
    tiles = spans.query_tiles(queries)
    blocks = torch.empty(tiles.count, kv_heads, queries * padded, dtype=torch.int32, device=indices.device)
    masks = torch.empty_like(blocks)
    counts = torch.empty(tiles.count, kv_heads, 2, dtype=torch.int32, device=indices.device)
    if tiles.count:
        union_kernel[(tiles.count, kv_heads)](
            indices, blocks, masks, counts, tiles.per_seq, tiles.seq, tiles.first,
            spans.table, spans.q_len, spans.k_len, spans.offset, spans.rows_q, kv_heads, size,
            R=queries, WIDTH=width, PADDED=padded, PACKED=spans.packed, TABLE=spans.table is not None,
            num_warps=1 if queries * padded <= 256 else 4,
        )  # fmt: skip
    return UnionLists(tiles, queries, blocks, masks, counts)
