"""Gradients of ``selected_forward``.

Gradients of queries walk the union lists like the forward. Gradients of keys and values walk the inverse lists: one program
an item, a block and up to ``SPLIT`` of the queries that selected it. A block's items are written apart and then added up in
order, so the result is the same on every run; atomics would save 2% of the time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.inverse import InverseLists, inverse_lists
from nsa.kernels.triton.selected_forward import tile_and_heads
from nsa.kernels.triton.sequence import Spans, locate, new_gradient, span
from nsa.kernels.triton.tile import LOG2E, descriptor, dot, gated, load_rows, load_tile, wide
from nsa.kernels.triton.union import UnionLists

SPLIT = 1024  # queries of an item: fewer balance better, more make less to add up


@triton.jit
def _query_blocks(
    qt, gt, k, v, batch, k_row, hk, blocks, masks, i0, i1, before, r, pos, k_len, scale, shift, delta, acc,
    CAUSAL: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Entries ``i0 .. i1`` of the tile's list into the gradient of its queries."""
    CHECK: tl.constexpr = CAUSAL or SIZE % BN != 0
    CHUNKS: tl.constexpr = (SIZE + BN - 1) // BN
    keys = tl.arange(0, BN)
    for i in tl.range(i0 * CHUNKS, i1 * CHUNKS):
        block = tl.load(blocks + i // CHUNKS)
        mask = tl.load(masks + i // CHUNKS)
        wanted = ((mask - before) >> r) & 1 != 0  # [BM]
        before = tl.where(i % CHUNKS == CHUNKS - 1, mask, before)
        chunk = i % CHUNKS * BN
        first = block * SIZE + chunk
        end = tl.minimum(k_len - first, SIZE - chunk)
        kt = load_tile(k, batch, k_row + first, hk, end, BN, BD, CHECK)
        vt = load_tile(v, batch, k_row + first, hk, end, BN, BDV, CHECK)
        p = tl.exp2(dot(qt, kt.T) * scale - tl.where(wanted, shift, float("inf"))[:, None])  # [BM, BN]
        if CHECK:
            p = tl.where((first + keys[None, :] <= pos[:, None]) & (chunk + keys < SIZE)[None, :], p, 0.0)
        ds = p * (dot(gt, vt.T) - delta[:, None])
        acc = dot(ds.to(kt.dtype), kt, acc)
    return before, acc


@triton.jit(do_not_specialize=["add", "tiles", "q_len", "k_len", "offset", "kv_heads", "stride_lb", "stride_lh"])
def selected_dq_kernel(
    q, k, v, do, shift, delta, dq, add, blocks, masks, counts,
    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, stride_lb, stride_lh, stride_db, stride_dt, stride_dh,
    tiles, tile_seq, tile_first, table, q_len, k_len, offset, kv_heads, scale, softmax_scale,
    R: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, LENGTH: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    pid, hk, head = tile_and_heads(kv_heads, G, HEADS)
    seq, tile = locate(pid, tiles, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * R
    if start >= q_len:
        return
    row = tl.arange(0, BM)
    r, h = row // HEADS, hk * G + head + row % HEADS
    keep = (row < R * HEADS) & (start + r < q_len)
    if G % HEADS != 0:
        keep = keep & (head + row % HEADS < G)
    pos = offset + start + r
    first = q_row + start
    dims = tl.arange(0, BD)
    qt = load_rows(q + batch * stride_qb + first * stride_qt, r * stride_qt + h * stride_qh, dims, keep, D)
    gt = load_rows(do + batch * stride_gb + first * stride_gt, r * stride_gt + h * stride_gh, tl.arange(0, BDV), keep, DV)
    stat = batch * stride_lb + h * stride_lh + first + r
    row_shift = tl.load(shift + stat, mask=keep, other=float("inf"))
    row_delta = tl.load(delta + stat, mask=keep, other=0.0)
    list_at = wide(pid) * kv_heads + hk
    blocks += list_at * LENGTH
    masks += list_at * LENGTH
    count = tl.load(counts + list_at * 2)
    past = tl.load(counts + list_at * 2 + 1)
    acc = tl.zeros([BM, BD], tl.float32)
    before, acc = _query_blocks(
        qt, gt, k, v, batch, k_row, hk, blocks, masks, 0, past, tl.zeros([], tl.int32), r, pos, k_len, scale,
        row_shift, row_delta, acc, False, SIZE, BN, BD, BDV,
    )  # fmt: skip
    before, acc = _query_blocks(
        qt, gt, k, v, batch, k_row, hk, blocks, masks, past, count, before, r, pos, k_len, scale,
        row_shift, row_delta, acc, True, SIZE, BN, BD, BDV,
    )  # fmt: skip
    acc = gated(acc * softmax_scale, row_shift[:, None])
    out, at = dq + batch * stride_db + first * stride_dt, r * stride_dt + h * stride_dh
    if add != 0:
        acc += load_rows(out, at, dims, keep, D).to(tl.float32)
    ptrs = out + at[:, None] + dims[None, :]
    tl.store(ptrs, acc.to(dq.dtype.element_ty), mask=keep[:, None] & (dims < D)[None, :])


@triton.jit(
    do_not_specialize=[
        "q_len",
        "k_len",
        "offset",
        "rows_q",
        "groups",
        "num_blocks",
        "per_seq",
        "kv_heads",
        "stride_lb",
        "stride_lh",
    ]
)
def selected_dkv_kernel(
    q, k, v, do, shift, delta, dk, dv, rows, item_group, item_start, item_stop, block_seq, block_base,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, stride_lb, stride_lh,
    table, q_len, k_len, offset, rows_q, groups, num_blocks, per_seq, kv_heads, scale, softmax_scale,
    QUERIES: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (SIZE + BN - 1) // BN
    pid, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS * BN
    group = tl.load(item_group + pid)
    if group >= groups:
        return
    block = group % num_blocks
    hk = group // num_blocks
    if PACKED:
        seq = tl.load(block_seq + block)
        block -= tl.load(block_base + seq)
    else:
        seq = block // per_seq
        block = block % per_seq
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    first = block * SIZE + chunk
    keys = tl.arange(0, BN)
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BDV)
    row = k_row + first
    inside = keys < tl.minimum(k_len - first, SIZE - chunk)
    kt = load_rows(k + batch * stride_kb + row * stride_kt + hk * stride_kh, keys * stride_kt, dims, inside, D)
    vt = load_rows(v + batch * stride_vb + row * stride_vt + hk * stride_vh, keys * stride_vt, value_dims, inside, DV)
    q += batch * stride_qb
    do += batch * stride_gb
    shift += batch * stride_lb
    delta += batch * stride_lb
    col = tl.arange(0, BM)
    dkt = tl.zeros([BN, BD], tl.float32)
    dvt = tl.zeros([BN, BDV], tl.float32)
    for head in tl.range(0, G, HEADS):
        h = hk * G + head + col % HEADS
        stop = tl.load(item_stop + pid)
        for i in tl.range(tl.load(item_start + pid), stop, QUERIES):
            entry = i + col // HEADS
            keep = (entry < stop) & (col < QUERIES * HEADS)
            if G % HEADS != 0:
                keep = keep & (head + col % HEADS < G)
            query = tl.load(rows + entry, mask=keep, other=0).to(tl.int64) - batch * rows_q  # row of q
            query = tl.where(keep, query, 0)
            qt = load_rows(q, query * stride_qt + h * stride_qh, dims, keep, D)  # [BM, BD]
            gt = load_rows(do, query * stride_gt + h * stride_gh, value_dims, keep, DV)  # [BM, BDV]
            row_shift = tl.load(shift + h * stride_lh + query, mask=keep, other=float("inf"))
            row_delta = tl.load(delta + h * stride_lh + query, mask=keep, other=0.0)
            p = gated(tl.exp2(dot(kt, qt.T) * scale - row_shift[None, :]), row_shift[None, :])  # [BN, BM]
            pos = offset + query - q_row
            p = tl.where((first + keys[:, None] <= pos[None, :]) & (chunk + keys < SIZE)[:, None], p, 0.0)
            dvt = dot(p.to(gt.dtype), gt, dvt)
            ds = p * (dot(vt, gt.T) - row_delta[None, :])
            dkt = dot(ds.to(qt.dtype), qt, dkt)
    place = (wide(pid) * SIZE + chunk + keys)[:, None]
    stored = (chunk + keys < SIZE)[:, None]
    tl.store(dk + place * D + dims[None, :], dkt * softmax_scale, mask=stored & (dims < D)[None, :])
    tl.store(dv + place * DV + value_dims[None, :], dvt, mask=stored & (value_dims < DV)[None, :])


@triton.jit(do_not_specialize=["q_len", "k_len", "offset", "rows_k", "num_blocks", "per_seq", "kv_heads"])
def reduce_kernel(
    parts, out, item_first, block_seq, block_base, table, q_len, k_len, offset, rows_k, num_blocks, per_seq, kv_heads,
    SIZE: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Add a group's items in their order. A group is a block and a KV head."""
    group = tl.program_id(0)
    block, hk = group % num_blocks, group // num_blocks
    if PACKED:
        seq = tl.load(block_seq + block)
        block -= tl.load(block_base + seq)
    else:
        seq = block // per_seq
        block = block % per_seq
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    keys, dims = tl.arange(0, BS), tl.arange(0, BD)
    inside = (keys < SIZE)[:, None] & (dims < D)[None, :]
    acc = tl.zeros([BS, BD], tl.float32)
    for item in tl.range(tl.load(item_first + group), tl.load(item_first + group + 1)):
        acc += tl.load(parts + (wide(item) * SIZE + keys)[:, None] * D + dims[None, :], mask=inside, other=0.0)
    first = block * SIZE
    place = ((batch * rows_k + k_row + first + keys) * kv_heads + hk)[:, None]
    tl.store(out + place * D + dims[None, :], acc.to(out.dtype.element_ty), mask=inside & (first + keys < k_len)[:, None])


def _shape(q: Tensor, k: Tensor, v: Tensor, spans: Spans, size: int) -> dict[str, int]:
    """What both kernels are compiled for."""
    return {
        "G": q.shape[2] // k.shape[2], "SIZE": size, "D": q.shape[-1], "DV": v.shape[-1],
        "BD": tuning.padded_dim(q.shape[-1]), "BDV": tuning.padded_dim(v.shape[-1]),
        "PACKED": spans.packed, "TABLE": spans.table is not None,
    }  # fmt: skip


def selected_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, lists: UnionLists, spans: Spans,
    size: int, softmax_scale: float, dq: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dq of ``gate * selected_forward``, added to ``dq`` where there is one.

    do ``[B, TQ, HQ, DV]``; shift, which carries the gate, and delta fp32 ``[B, HQ, TQ]``, of one layout.
    """
    add = dq is not None
    dq = new_gradient(q, spans) if dq is None else dq
    kv_heads = k.shape[2]
    group = q.shape[2] // kv_heads
    tune = tuning.selected_dq(q.shape[-1], v.shape[-1], q.dtype, group, size, tuning.arch(q.device))
    side = min(group, tune.block_m)
    if lists.tiles.count:
        selected_dq_kernel[(lists.tiles.count * kv_heads * triton.cdiv(group, side),)](
            q, descriptor(k, tune.block_n), descriptor(v, tune.block_n), do, shift, delta, dq, int(add),
            lists.blocks, lists.masks, lists.counts,
            *q.stride()[:3], *do.stride()[:3], *shift.stride()[:2], *dq.stride()[:3],
            lists.tiles.per_seq, lists.tiles.seq, lists.tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
            kv_heads, softmax_scale * LOG2E.value, softmax_scale,
            R=lists.queries, HEADS=side, LENGTH=lists.blocks.shape[2],
            BM=tuning.padded(lists.queries * side), BN=tune.block_n, **_shape(q, k, v, spans, size),
            num_warps=tune.num_warps, num_stages=tune.num_stages,
        )  # fmt: skip
    return dq


def selected_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, indices: Tensor, spans: Spans,
    size: int, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv of ``gate * selected_forward``; ``indices`` int32 ``[B, TQ, HK, width]``, the others as ``selected_dq``."""
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if q.shape[1] and k.shape[1]:
        inverse, scale = inverse_lists(indices, spans, size, SPLIT), softmax_scale * LOG2E.value
        shared = _shape(q, k, v, spans, size)
        _keys_values(q, k, v, do, shift, delta, dk, dv, inverse, spans, scale, softmax_scale, shared)
    return dk, dv


def _keys_values(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    inverse: InverseLists, spans: Spans, scale: float, softmax_scale: float, shared: dict[str, int],
) -> None:  # fmt: skip
    """Fill dk ``[B, T, HK, D]`` and dv ``[B, T, HK, DV]``, zeros before."""
    items, size, kv_heads, group = inverse.group.numel(), shared["SIZE"], k.shape[2], shared["G"]
    dk_parts, dv_parts = (torch.empty(items, size, x.shape[-1], dtype=torch.float32, device=x.device) for x in (k, v))
    lengths = (spans.table, spans.q_len, spans.k_len, spans.offset)
    tune = tuning.selected_dkv(q.shape[-1], v.shape[-1], q.dtype, group, size, tuning.arch(q.device))
    side, queries = min(group, tune.block_m), max(1, tune.block_m // group)
    selected_dkv_kernel[(items * triton.cdiv(size, tune.block_n),)](
        q, k, v, do, shift, delta, dk_parts, dv_parts,
        inverse.rows, inverse.group, inverse.start, inverse.stop, inverse.seq, inverse.base,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *shift.stride()[:2], *lengths, q.shape[1],
        inverse.groups, inverse.num_blocks, inverse.per_seq, kv_heads, scale, softmax_scale,
        QUERIES=queries, HEADS=side, BM=tuning.padded(queries * side), BN=tune.block_n, **shared,
        num_warps=tune.num_warps, num_stages=tune.num_stages,
    )  # fmt: skip
    for parts, out in ((dk_parts, dk), (dv_parts, dv)):
        reduce_kernel[(inverse.groups,)](
            parts, out, inverse.first, inverse.seq, inverse.base, *lengths, k.shape[1],
            inverse.num_blocks, inverse.per_seq, kv_heads,
            SIZE=size, D=out.shape[-1], BS=tuning.padded(size), BD=tuning.padded_dim(out.shape[-1]),
            PACKED=spans.packed, TABLE=spans.table is not None, num_warps=4,
        )  # fmt: skip
