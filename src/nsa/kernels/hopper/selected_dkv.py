"""Gradients of keys and values of the selected branch, on Hopper: the twin of ``selected_dkv_kernel``.

A program has a block of 64 keys and some of the queries that selected it. One warp fetches a few queries at a time, each with
all heads of its group, with the output's gradient and the statistics; one warpgroup multiplies. Two programs share a
multiprocessor: one's exponentials run beside the other's products.

A query is wanted by many blocks, and what is fetched again from memory is the wall. So the queries go in chunks that fit the L2
cache, and programs that run together work on one chunk. What a chunk gives to a block is added to the sum of those before, in
their order, so that the result is the same on every run: a program waits, at its end, for its turn. That is never long: the
program that it waits for was started before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from nsa import tuning
from nsa.kernels.hopper.dkv_step import KEYS, add_queries, store_rows, zero_gradients
from nsa.kernels.hopper.pipeline import (
    LOG2E,
    barriers,
    boxes,
    load_async,
    load_numbers,
    load_pieces,
    phase,
    pieces,
    reinterpret,
    span,
    thread_barrier,
    tile_pieces,
)
from nsa.kernels.triton.chunked_lists import chunked_lists
from nsa.kernels.triton.sequence import Spans

BOX = gl.constexpr(64)  # columns that the widest swizzle takes


@gluon.jit
def _item(items, where, rows_q, PACKED: gl.constexpr, TABLE: gl.constexpr):
    """A program's queries ``rows[start .. stop]``, of all those ``low .. high`` of its group, the KV head, and the block: where
    the keys and their sequence lie."""
    item_group, item_start, item_stop, edges, chunks, groups, num_blocks, per_seq, block_seq, block_base = items
    table, q_len, k_len, offset = where
    pid = gl.program_id(0)
    group = gl.load(item_group + pid)
    start = gl.load(item_start + pid)
    stop = gl.where(group < groups, gl.load(item_stop + pid), start)
    group = gl.minimum(group, groups - 1)
    low, high = gl.load(edges + group * chunks), gl.load(edges + (group + 1) * chunks)
    block, hk = group % num_blocks, group // num_blocks
    if PACKED:
        seq = gl.load(block_seq + block)
        block -= gl.load(block_base + seq)
    else:
        seq = block // per_seq
        block = block % per_seq
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    # A query's position is its row, counted over the batch, less ``back``.
    back = batch.to(gl.int32) * rows_q + q_row.to(gl.int32) - offset
    return start, stop, low, high, group, hk, batch.to(gl.int32), k_row.to(gl.int32), block * KEYS, k_len, back


@gluon.jit
def _load(rows, items, where, rows_q, descs, shift, delta, strides, buffers, bars,
          G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
          PACKED: gl.constexpr, TABLE: gl.constexpr):  # fmt: skip
    """The loading warp: the keys and values, then the queries."""
    NUMBERS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    HEADS: gl.constexpr = min(G, ROWS)
    PARTS: gl.constexpr = G // HEADS
    QUERIES: gl.constexpr = ROWS // HEADS
    q_desc, g_desc, k_desc, v_desc = descs
    q_boxes, g_boxes, k_buf, v_buf, shift_buf, delta_buf = buffers
    kv_full, q_full, g_full, empty = bars
    stride_b, stride_t = strides
    start, stop, low, high, group, hk, batch, k_row, first, k_len, back = _item(items, where, rows_q, PACKED, TABLE)
    rows += start
    count = stop - start
    if count > 0:
        mbarrier.expect(kv_full.index(0), pieces(D) * k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        load_pieces(k_desc, batch, k_row + first, hk, kv_full.index(0), k_buf, 0, pieces(D))
        load_async(v_desc, [batch, k_row + first, hk, 0], kv_full.index(0), v_buf)
    row = gl.arange(0, ROWS, layout=NUMBERS)
    stat = batch.to(gl.int64) * stride_b + hk * G + row % HEADS
    for t in range(gl.cdiv(count, QUERIES) * PARTS):
        slot = t % STAGES
        entry = t // PARTS * QUERIES
        head = t % PARTS * HEADS
        # Asked for before the wait, so that they are there after it. Past the last query comes the last again, and is masked.
        queries = gl.load(rows + gl.minimum(entry + row // HEADS, count - 1)) - batch * rows_q
        mine = ()
        for n in gl.static_range(QUERIES):
            mine += (gl.load(rows + gl.minimum(entry + n, count - 1)) - batch * rows_q,)  # type: ignore[assignment]
        mbarrier.wait(empty.index(slot), phase(t, STAGES) ^ 1)
        # These count themselves in, so they come before what the barrier counts on.
        at = stat + head + queries.to(gl.int64) * stride_t
        load_numbers(shift_buf.index(slot), shift + at)
        load_numbers(delta_buf.index(slot), delta + at)
        async_copy.mbarrier_arrive(q_full.index(slot))
        mbarrier.expect(q_full.index(slot), QUERIES * D // BOX * q_desc.block_type.nbytes)
        for n in gl.static_range(QUERIES):
            for c in gl.static_range(D // BOX):
                load_async(q_desc, [batch, mine[n], hk * G + head, c * BOX], q_full.index(slot),
                           q_boxes.index((slot * (D // BOX) + c) * QUERIES + n))  # fmt: skip
        mbarrier.expect(g_full.index(slot), QUERIES * DV // BOX * g_desc.block_type.nbytes)
        for n in gl.static_range(QUERIES):
            for c in gl.static_range(DV // BOX):
                load_async(g_desc, [batch, mine[n], hk * G + head, c * BOX], g_full.index(slot),
                           g_boxes.index((slot * (DV // BOX) + c) * QUERIES + n))  # fmt: skip


@gluon.jit
def _add(t0, t1, dk, dv, kt, vt, buffers, bars, rows, count, back, lo, scale,
         MASK: gl.constexpr, G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr,
         STAGES: gl.constexpr, S_LAYOUT: gl.constexpr):  # fmt: skip
    """Tiles ``t0 .. t1``; the position of a query is its row less ``back``."""
    HEADS: gl.constexpr = min(G, ROWS)
    for t in range(t0, t1):
        entry = t // (G // HEADS) * (ROWS // HEADS) + gl.arange(0, ROWS, layout=gl.SliceLayout(0, S_LAYOUT)) // HEADS
        pos = entry
        if MASK:
            pos = gl.where(entry < count, gl.load(rows + entry, mask=entry < count, other=0) - back, -1)
        dk, dv = add_queries(t, dk, dv, kt, vt, buffers, bars, pos, lo, lo * 0 + 0x7FFFFFFF, scale,
                             MASK, ROWS, D, DV, STAGES, S_LAYOUT)  # fmt: skip
    return dk, dv


@gluon.jit
def _gradients(rows, items, where, rows_q, scale, softmax_scale, sums, done, outs, buffers, bars,
               G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
               PACKED: gl.constexpr, TABLE: gl.constexpr):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    HEADS: gl.constexpr = min(G, ROWS)
    PARTS: gl.constexpr = G // HEADS
    QUERIES: gl.constexpr = ROWS // HEADS
    WIDTH: gl.constexpr = D // pieces(D)
    q_buf, g_buf, k_buf, v_buf, shift_buf, delta_buf = buffers
    kv_full, q_full, g_full, empty = bars
    start, stop, low, high, group, hk, batch, k_row, first, k_len, back = _item(items, where, rows_q, PACKED, TABLE)
    rows += start
    count = stop - start
    if count > 0:
        # Queries come in order: only the first few may not see all of the block's keys.
        nearest = gl.arange(0, KEYS, layout=gl.BlockedLayout([1], [32], [4], [0]))
        pos = gl.load(rows + nearest, mask=nearest < count, other=0) - back
        near = gl.sum(((nearest < count) & (pos < first + KEYS - 1)).to(gl.int32), 0)
        tiles = gl.cdiv(count, QUERIES) * PARTS
        t1 = gl.cdiv(near, QUERIES) * PARTS
        t2 = gl.maximum(count // QUERIES * PARTS, t1)  # the last tile may not be whole
        lo = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, S_LAYOUT))
        kt, vt = tile_pieces(k_buf, 0, KEYS, D), v_buf.reshape([KEYS, DV])
        dk, dv = zero_gradients(D, DV)
        mbarrier.wait(kv_full.index(0), 0)
        ring = (q_buf, g_buf, shift_buf, delta_buf)
        full = (q_full, g_full, empty)
        dk, dv = _add(0, t1, dk, dv, kt, vt, ring, full, rows, count, back, lo, scale,
                      True, G, D, DV, ROWS, STAGES, S_LAYOUT)  # fmt: skip
        dk, dv = _add(t1, t2, dk, dv, kt, vt, ring, full, rows, count, back, lo, scale,
                      False, G, D, DV, ROWS, STAGES, S_LAYOUT)  # fmt: skip
        dk, dv = _add(t2, tiles, dk, dv, kt, vt, ring, full, rows, count, back, lo, scale,
                      True, G, D, DV, ROWS, STAGES, S_LAYOUT)  # fmt: skip
        k_sums, v_sums = sums
        k_sums += group.to(gl.int64) * KEYS * D
        v_sums += group.to(gl.int64) * KEYS * DV
        if start > low:  # its turn comes when all queries before its own are in the sums
            while gl.atomic_add(done + group, 0, sem="acquire") != start:
                pass
            dk, dv = _added(dk, k_sums), _added((dv,), v_sums)[0]
        if stop < high:
            for c in gl.static_range(pieces(D)):
                gl.store(k_sums + _places(dk[c], c), dk[c])
            gl.store(v_sums + _places(dv, 0), dv)
            thread_barrier()
            gl.atomic_xchg(done + group, stop, sem="release")
        else:
            dk_out, dv_out, stride_dt, stride_et = outs
            row = batch.to(gl.int64) * stride_dt[0] + (k_row + first).to(gl.int64) * stride_dt[1] + hk * D
            for c in gl.static_range(pieces(D)):
                x = (dk[c] * softmax_scale).to(dk_out.dtype.element_ty)
                store_rows(dk_out + row + c * WIDTH, x, stride_dt[1], k_len - first)
            row = batch.to(gl.int64) * stride_et[0] + (k_row + first).to(gl.int64) * stride_et[1] + hk * DV
            store_rows(dv_out + row, dv.to(dv_out.dtype.element_ty), stride_et[1], k_len - first)


@gluon.jit
def _places(x, c: gl.constexpr):
    """Where in a block's sum the entries of its piece ``c`` lie, which is like ``x``."""
    WIDTH: gl.constexpr = x.shape[1]
    LAYOUT: gl.constexpr = x.type.layout
    row = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT)), 1) + c * KEYS
    return row * WIDTH + gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT)), 0)


@gluon.jit
def _added(x, sums):
    """The pieces ``x`` and those of a block's sum."""
    total = ()
    for c in gl.static_range(len(x)):
        total += (x[c] + gl.load(sums + _places(x[c], c)),)  # type: ignore[assignment]
    return total


@gluon.jit(do_not_specialize=["q_len", "k_len", "offset", "rows_q", "chunks", "groups", "num_blocks", "per_seq",
                              "stride_b", "stride_t"])  # fmt: skip
def selected_dkv_kernel(
    q_desc, g_desc, k_desc, v_desc, shift, delta, k_sums, v_sums, done, dk, dv,
    rows, item_group, item_start, item_stop, edges, chunks, groups, num_blocks, per_seq, block_seq, block_base,
    stride_b, stride_t, stride_db, stride_dt, stride_eb, stride_et,
    table, q_len, k_len, offset, rows_q, scale, softmax_scale,
    G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q_desc.dtype
    HEADS: gl.constexpr = min(G, ROWS)
    QUERIES: gl.constexpr = ROWS // HEADS
    PIECES: gl.constexpr = pieces(D)
    # Boxes of a query's heads by 64 columns, side by side so that together they are tiles of ``ROWS`` rows by all columns.
    q_boxes = gl.allocate_shared_memory(TYPE, [STAGES * (D // BOX) * QUERIES, 1, 1, HEADS, BOX], q_desc.layout)
    g_boxes = gl.allocate_shared_memory(TYPE, [STAGES * (DV // BOX) * QUERIES, 1, 1, HEADS, BOX], g_desc.layout)
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_buf = reinterpret(q_boxes, TYPE, [STAGES * PIECES, ROWS, D // PIECES], TILE)
    g_buf = reinterpret(g_boxes, TYPE, [STAGES, ROWS, DV], TILE)
    k_buf = gl.allocate_shared_memory(TYPE, [PIECES, 1, KEYS, 1, D // PIECES], k_desc.layout)
    v_buf = gl.allocate_shared_memory(TYPE, [1, KEYS, 1, DV], v_desc.layout)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shift_buf = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], NUMBERS)
    delta_buf = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], NUMBERS)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    fence_async_shared()
    items = (item_group, item_start, item_stop, edges, chunks, groups, num_blocks, per_seq, block_seq, block_base)
    where = (table, q_len, k_len, offset)
    outs = (dk, dv, (stride_db, stride_dt), (stride_eb, stride_et))
    gl.warp_specialize(
        [
            (_gradients, (rows, items, where, rows_q, scale, softmax_scale, (k_sums, v_sums), done, outs,
                          (q_buf, g_buf, k_buf, v_buf, shift_buf, delta_buf), bars, G, D, DV, ROWS, STAGES, PACKED, TABLE)),
            (_load, (rows, items, where, rows_q, (q_desc, g_desc, k_desc, v_desc), shift, delta, (stride_b, stride_t),
                     (q_boxes, g_boxes, k_buf, v_buf, shift_buf, delta_buf), bars, G, D, DV, ROWS, STAGES, PACKED, TABLE)),
        ],
        [1],
        [24],
    )  # fmt: skip


def selected_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, indices: Tensor, spans: Spans,
    size: int, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``kernels.triton.selected_backward.selected_dkv``, for what ``hopper.gathers`` says."""
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if q.shape[1] == 0 or k.shape[1] == 0:
        return dk, dv
    dim, group = q.shape[-1], q.shape[2] // k.shape[2]
    tune = tuning.hopper_selected_dkv(q.shape[0] * q.shape[1], dim)
    lists = chunked_lists(indices, spans, size, tune.chunk, tune.split)
    k_sums, v_sums = (torch.empty(lists.groups, size, x.shape[-1], dtype=torch.float32, device=x.device) for x in (k, v))
    heads = min(group, tune.rows)
    done = lists.edges[: -1 : lists.chunks].clone()
    # A query's heads side by side: fetched from [B, HQ, TQ], each would take 32 bytes for its 4.
    shift, delta = (x.transpose(1, 2).contiguous() for x in (shift, delta))
    selected_dkv_kernel[(lists.group.numel(),)](
        boxes(q, 1, heads, BOX.value), boxes(do, 1, heads, BOX.value),
        boxes(k, size, columns=dim // pieces(dim)), boxes(v, size),
        shift, delta, k_sums, v_sums, done, dk, dv,
        lists.rows, lists.group, lists.start, lists.stop, lists.edges, lists.chunks, lists.groups,
        lists.num_blocks, lists.per_seq, lists.seq, lists.base,
        *shift.stride()[:2], *dk.stride()[:2], *dv.stride()[:2],
        spans.table, spans.q_len, spans.k_len, spans.offset, q.shape[1], softmax_scale * LOG2E.value, softmax_scale,
        G=group, D=dim, DV=v.shape[-1], ROWS=tune.rows, STAGES=tune.num_stages,
        PACKED=spans.packed, TABLE=spans.table is not None, num_warps=4, maxnreg=128,
    )  # fmt: skip
    return dk, dv
