"""Index lists for the selected branch, made from ``block_indices``.

*Union lists*: ``R`` neighbouring queries are computed as one tile, over all blocks that any of them selected; bit ``r`` of a
block's mask says whether query ``r`` did. What neighbours share is then read once.
*Inverse lists*: for every block the queries that selected it, in order: what gradients of keys and values walk along.
Both treat a query's indices as a set: any order, duplicates once, out of range never.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
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
def _own_blocks(indices, row, pos, keep, slot, hk, kv_heads, size, WIDTH: tl.constexpr):
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
    block = _own_blocks(
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


@dataclass(frozen=True)
class InverseLists:
    """``rows`` int32: query rows, those that selected a block side by side. Item ``i`` is the stretch ``start[i] .. stop[i]``.

    ``group[i]`` is ``hk * num_blocks + block`` with ``block`` counted over all sequences, or the number of groups for an item
    that stands for nothing. ``first [groups + 1]`` says which items a group has. Block ``b`` belongs to
    sequence ``b // per_seq``, or ``seq[b]`` if packed, whose first block is ``base[seq]``.
    """

    rows: Tensor
    group: Tensor
    start: Tensor
    stop: Tensor
    first: Tensor
    groups: int
    num_blocks: int
    per_seq: int
    seq: Tensor | None
    base: Tensor | None


@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "offset", "rows_q", "kv_heads", "size", "per_seq", "num_blocks"])
def group_kernel(
    indices, groups, tiles, tile_seq, tile_first, table, base, q_len, k_len, offset, rows_q, kv_heads, size,
    per_seq, num_blocks,
    R: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The group of every (query, KV head, slot); ``NOTHING`` for duplicates and blocks out of range."""
    pid, hk = tl.program_id(0), tl.program_id(1)
    seq, tile = locate(pid, tiles, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    LENGTH: tl.constexpr = R * PADDED
    entry = tl.arange(0, LENGTH)
    r = entry // PADDED
    query = tile * R + r
    row = batch * rows_q + q_row + query
    block = _own_blocks(indices, row, offset + query, query < q_len, entry % PADDED, hk, kv_heads, size, WIDTH)
    # Sorting each query's own slots brings its duplicates together.
    block = tl.reshape(tl.sort(tl.reshape(block, [R, PADDED]), 1), [LENGTH])
    before = tl.gather(block, tl.maximum(entry - 1, 0), 0)
    keep = (block != NOTHING) & ((block != before) | (entry % PADDED == 0))
    first = seq * per_seq
    if PACKED:
        first = tl.load(base + seq)
    group = hk * num_blocks + first + block
    out = groups + (row * kv_heads + hk) * PADDED + entry % PADDED
    tl.store(out, tl.where(keep, group, NOTHING), mask=query < q_len)


@dataclass(frozen=True)
class Selectors:
    """Which queries selected a block: those of group ``g`` lie side by side in ``rows``, in order, where ``group`` is ``g``.

    ``rows`` int32: query rows, counted over the batch. A group is ``hk * num_blocks + block`` with ``block`` counted over all
    sequences; there are ``groups``, and ``NOTHING`` comes last. Block ``b`` belongs to sequence ``b // per_seq``, or ``seq[b]``
    if packed, whose first block is ``base[seq]``.
    """

    rows: Tensor
    group: Tensor
    groups: int
    num_blocks: int
    per_seq: int
    seq: Tensor | None
    base: Tensor | None


def selectors(indices: Tensor, spans: Spans, size: int) -> Selectors:
    """indices int32 ``[B, TQ, HK, width]``."""
    batch, rows_q, kv_heads, width = indices.shape
    device = indices.device
    padded = triton.next_power_of_2(max(width, 1))
    per_seq, seq, base = triton.cdiv(spans.rows_k, size), None, None
    num_blocks = batch * per_seq
    if spans.packed:
        # Sequence b begins a new block, and none has more than its tokens' share plus one.
        assert spans.table is not None
        number = torch.arange(spans.num_seqs + 1, device=device, dtype=torch.int32)
        base = spans.table[:, 3] // size + number
        num_blocks = spans.rows_k // size + spans.num_seqs
        every = torch.arange(num_blocks, device=device, dtype=torch.int32)
        seq = (torch.searchsorted(base[:-1].contiguous(), every, right=True) - 1).clamp_min(0).to(torch.int32)
    groups = kv_heads * num_blocks
    keys = torch.full((batch, rows_q, kv_heads, padded), NOTHING.value, dtype=torch.int32, device=device)
    queries = tuning.grouped_queries(width)
    tiles = spans.query_tiles(queries)
    if tiles.count:
        group_kernel[(tiles.count, kv_heads)](
            indices, keys, tiles.per_seq, tiles.seq, tiles.first, spans.table, base,
            spans.q_len, spans.k_len, spans.offset, rows_q, kv_heads, size, per_seq, num_blocks,
            R=queries, WIDTH=width, PADDED=padded, PACKED=spans.packed, TABLE=spans.table is not None, num_warps=4,
        )  # fmt: skip
    ordered, pair = keys.flatten().sort(stable=True)
    rows = (pair // (kv_heads * padded)).to(torch.int32)
    return Selectors(rows, ordered, groups, num_blocks, per_seq, seq, base)


def inverse_lists(indices: Tensor, spans: Spans, size: int, split: int) -> InverseLists:
    """indices int32 ``[B, TQ, HK, width]``; a block that more than ``split`` queries selected makes several items."""
    found = selectors(indices, spans, size)
    device, groups = indices.device, found.groups
    edges = torch.searchsorted(found.group, torch.arange(groups + 1, device=device, dtype=torch.int32), out_int32=True)
    items = (edges.diff() + split - 1) // split
    ends = items.cumsum(0, dtype=torch.int32)
    first = torch.nn.functional.pad(ends, (1, 0))
    most = groups + triton.cdiv(found.rows.numel(), split)
    item = torch.arange(most, device=device, dtype=torch.int32)
    group = torch.searchsorted(ends, item, right=True, out_int32=True)
    inside = group.clamp_max(groups - 1).long()
    start = edges[inside] + (item - first[inside]) * split
    stop = torch.minimum(start + split, edges[inside + 1])
    return InverseLists(found.rows, group, start, stop, first, groups, found.num_blocks, found.per_seq, found.seq, found.base)


@dataclass(frozen=True)
class ChunkedLists:
    """The items of ``InverseLists`` in another order, and no longer than a chunk of the queries: KV head by KV head, chunk by
    chunk, block by block. So programs that run together read the same queries.

    The queries of group ``g`` are ``rows[edges[g * chunks] .. edges[(g + 1) * chunks]]``. The rest as in ``InverseLists``.
    """

    rows: Tensor
    group: Tensor
    start: Tensor
    stop: Tensor
    edges: Tensor
    chunks: int
    groups: int
    num_blocks: int
    per_seq: int
    seq: Tensor | None
    base: Tensor | None


def chunked_lists(indices: Tensor, spans: Spans, size: int, chunk: int, split: int) -> ChunkedLists:
    """indices int32 ``[B, TQ, HK, width]``; ``chunk`` rows, of all in the batch; items of ``split`` queries at most."""
    found = selectors(indices, spans, size)
    device, groups, num_blocks = indices.device, found.groups, found.num_blocks
    rows_q, kv_heads = indices.shape[1:3]
    chunks = triton.cdiv(indices.shape[0] * rows_q, chunk)
    cell = found.group.clamp_max(groups) * chunks + found.rows // chunk
    edges = torch.searchsorted(cell, torch.arange(groups * chunks + 1, device=device, dtype=torch.int32), out_int32=True)
    in_turn = lambda x: x.view(kv_heads, num_blocks, chunks).transpose(1, 2).flatten()
    begin, count = in_turn(edges[:-1]), in_turn(edges.diff())
    ends = ((count + split - 1) // split).cumsum(0, dtype=torch.int32)
    first = torch.nn.functional.pad(ends, (1, 0))
    most = kv_heads * _live_cells(spans, num_blocks, size, chunk, chunks) + triton.cdiv(found.rows.numel(), split)
    item = torch.arange(most, device=device, dtype=torch.int32)
    cell = torch.searchsorted(ends, item, right=True, out_int32=True)
    inside = cell.clamp_max(groups * chunks - 1).long()
    start = begin[inside] + (item - first[inside]) * split
    stop = torch.minimum(start + split, begin[inside] + count[inside])
    group = inside // (chunks * num_blocks) * num_blocks + inside % num_blocks
    group = torch.where(cell < groups * chunks, group, groups).to(torch.int32)
    return ChunkedLists(found.rows, group, start, stop, edges, chunks, groups, num_blocks, found.per_seq, found.seq, found.base)


def _live_cells(spans: Spans, num_blocks: int, size: int, chunk: int, chunks: int) -> int:
    """At most so many pairs of a block and a chunk in which a query may have selected it."""
    if spans.table is not None:
        return num_blocks * chunks
    block = torch.arange(num_blocks)
    seq, first = block // (num_blocks // spans.num_seqs), block % (num_blocks // spans.num_seqs) * size - spans.offset
    row = seq * spans.rows_q + first.clamp(0, spans.rows_q)
    return int((((seq + 1) * spans.rows_q - 1) // chunk - row // chunk + 1).sum())
