"""Inverse lists cut into chunks of the queries, so that what runs together reads the same queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.triton.inverse import selectors
from nsa.kernels.triton.sequence import Spans


@triton.jit
def _first_pair(group, rows, cell, pairs, steps, chunks, chunk):
    """The first of the sorted pairs that is of ``cell`` or behind it; a cell is a group and a chunk."""
    low, high = cell * 0, cell * 0 + pairs
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        open = low < high
        its_group = tl.load(group + middle, mask=open, other=0)
        its_chunk = tl.load(rows + middle, mask=open, other=0) // chunk
        before = (its_group < cell // chunks) | ((its_group == cell // chunks) & (its_chunk < cell % chunks))
        low, high = tl.where(open & before, middle + 1, low), tl.where(open & (before == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["pairs", "steps", "cells", "chunks", "chunk", "num_blocks", "split"])
def cell_kernel(
    group, rows, edges, items, pairs, steps, cells, chunks, chunk, num_blocks, split, BN: tl.constexpr
):  # fmt: skip
    """Where each cell's pairs begin, and how many items they make, in the order in which the items are computed."""
    cell = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = _first_pair(group, rows, cell, pairs, steps, chunks, chunk)
    end = _first_pair(group, rows, cell + 1, pairs, steps, chunks, chunk)
    tl.store(edges + cell, begin, mask=cell <= cells)
    of_group = cell // chunks
    turn = (of_group // num_blocks * chunks + cell % chunks) * num_blocks + of_group % num_blocks
    tl.store(items + turn, tl.cdiv(end - begin, split), mask=cell < cells)


@triton.jit(do_not_specialize=["most", "steps", "cells", "chunks", "num_blocks", "groups", "split"])
def item_kernel(
    ends, edges, group, start, stop, most, steps, cells, chunks, num_blocks, groups, split, BN: tl.constexpr
):  # fmt: skip
    """``ends [cells]``: items up to and with each cell's, in the order in which they are computed."""
    item = tl.program_id(0) * BN + tl.arange(0, BN)
    low, high = item * 0, item * 0 + cells
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        open = low < high
        before = tl.load(ends + middle, mask=open, other=0) <= item
        low, high = tl.where(open & before, middle + 1, low), tl.where(open & (before == 0), middle, high)
    live = low < cells
    its_group = low // (chunks * num_blocks) * num_blocks + low % num_blocks
    cell = its_group * chunks + low // num_blocks % chunks
    number = item - tl.load(ends + low - 1, mask=live & (low > 0), other=0)
    first = tl.load(edges + cell, mask=live, other=0) + number * split
    end = tl.load(edges + cell + 1, mask=live, other=0)
    inside = item < most
    tl.store(group + item, tl.where(live, its_group, groups), mask=inside)
    tl.store(start + item, first, mask=inside)
    tl.store(stop + item, tl.minimum(first + split, end), mask=inside)


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
    groups, num_blocks, pairs = found.groups, found.num_blocks, found.rows.numel()
    batch, rows_q, kv_heads = indices.shape[:3]
    chunks = triton.cdiv(batch * rows_q, chunk)
    cells = groups * chunks
    most = kv_heads * _live_cells(spans, num_blocks, size, chunk, chunks) + triton.cdiv(pairs, split)
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=indices.device)
    edges, items = new(cells + 1), new(cells)
    cell_kernel[(triton.cdiv(cells + 1, 128),)](
        found.group, found.rows, edges, items, pairs, pairs.bit_length(), cells, chunks, chunk, num_blocks, split, BN=128
    )
    group, start, stop = new(3, most)
    item_kernel[(triton.cdiv(most, 128),)](
        items.cumsum(0, dtype=torch.int32), edges, group, start, stop, most, cells.bit_length(), cells, chunks, num_blocks,
        groups, split, BN=128,
    )  # fmt: skip
    return ChunkedLists(found.rows, group, start, stop, edges, chunks, groups, num_blocks, found.per_seq, found.seq, found.base)


def _live_cells(spans: Spans, num_blocks: int, size: int, chunk: int, chunks: int) -> int:
    """At most so many pairs of a block and a chunk in which a query may have selected it."""
    if spans.table is not None:
        return num_blocks * chunks
    block = torch.arange(num_blocks)
    seq, first = block // (num_blocks // spans.num_seqs), block % (num_blocks // spans.num_seqs) * size - spans.offset
    row = seq * spans.rows_q + first.clamp(0, spans.rows_q)
    return int((((seq + 1) * spans.rows_q - 1) // chunk - row // chunk + 1).sum())
