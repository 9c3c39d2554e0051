"""For every block the queries that selected it, in order: what gradients of keys and values walk along.

A query's indices are a set: any order, duplicates once, out of range never.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.sequence import Spans, locate, span
from nsa.kernels.triton.union import NOTHING, own_blocks


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
    block = own_blocks(indices, row, offset + query, query < q_len, entry % PADDED, hk, kv_heads, size, WIDTH)
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
