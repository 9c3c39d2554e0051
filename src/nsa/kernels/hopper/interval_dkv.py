"""Gradients of keys and values of attention over an interval, on Hopper: the twin of ``interval_dkv_kernel``.

A program has 128 keys of one KV head and a share of the group's query heads. One warp streams tiles of queries and of their
output's gradient, head after head; two warpgroups multiply 64 keys each.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from nsa import tuning
from nsa.kernels.hopper.dkv_step import add_queries, store_rows, zero_gradients
from nsa.kernels.hopper.interval_tiles import GROUPS, ROWS
from nsa.kernels.hopper.pipeline import (
    LOG2E,
    barriers,
    blank_past,
    boxes,
    load_async,
    load_numbers,
    load_pieces,
    locate,
    phase,
    pieces,
    span,
    tile_pieces,
)
from nsa.kernels.triton.sequence import Spans, new_shares


@gluon.jit
def _work(where, shape, BQ: gl.constexpr, WINDOWED: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr):
    """Where a program's keys and their queries lie, and the tiles of queries ``t0 .. t3`` that see some of the keys; those of
    ``t1 .. t2`` see all of them, and are whole."""
    per_seq, tile_seq, tile_first, table, q_len, k_len, offset = where
    kv_heads, group, share, length, stride, window = shape
    hk = gl.program_id(0) % kv_heads
    # The first keys are seen by most queries: they go first.
    seq, tile = locate(gl.program_id(0) // kv_heads, per_seq, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * GROUPS * ROWS
    last = gl.minimum(start + GROUPS * ROWS, k_len) - 1
    first_pos, whole_pos = start * stride + length - 1, last * stride + length - 1
    end_pos, whole_end = offset + q_len, offset + q_len
    if WINDOWED:
        end_pos, whole_end = gl.minimum(end_pos, last + window), gl.minimum(whole_end, start + window)
    t0 = gl.maximum(first_pos - offset, 0) // BQ
    t3 = gl.maximum(gl.cdiv(gl.maximum(end_pos - offset, 0), BQ), t0)
    t3 = gl.where(start < k_len, t3, t0)
    t1 = gl.maximum(gl.minimum(gl.cdiv(gl.maximum(whole_pos - offset, 0), BQ), t3), t0)
    t2 = gl.minimum(gl.maximum(gl.maximum(whole_end - offset, 0) // BQ, t1), t3)
    first_head = gl.program_id(1) * share
    heads = gl.minimum(share, group - first_head)
    return (
        batch.to(gl.int32),
        q_row.to(gl.int32),
        q_len,
        k_row.to(gl.int32) + start,
        start,
        k_len,
        offset,
        hk,
        hk * group + first_head,
        heads,
        t0,
        t1,
        t2,
        t3,
    )


@gluon.jit
def _load(where, shape, descs, shift, delta, stride_lb, stride_lh, buffers, bars,
          BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, PACKED: gl.constexpr,
          TABLE: gl.constexpr):  # fmt: skip
    """The loading warp: the keys and values, then each head's queries, their output's gradient, shift and delta."""
    NUMBERS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    q_desc, g_desc, k_desc, v_desc = descs
    q_buf, g_buf, k_buf, v_buf, shift_buf, delta_buf = buffers
    kv_full, q_full, g_full, empty, blanked = bars
    batch, q_row, q_len, k_row, start, k_len, offset, hk, h0, heads, t0, t1, t2, t3 = _work(
        where, shape, BQ, WINDOWED, PACKED, TABLE)  # fmt: skip
    mbarrier.expect(kv_full.index(0), GROUPS * (pieces(D) * k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for c in gl.static_range(GROUPS):
        load_pieces(k_desc, batch, k_row + c * ROWS, hk, kv_full.index(0), k_buf, c, pieces(D))
        load_async(v_desc, [batch, k_row + c * ROWS, hk, 0], kv_full.index(0), v_buf.index(c))
    used = 0
    for g in range(heads):
        stat = batch.to(gl.int64) * stride_lb + (h0 + g) * stride_lh + q_row
        for t in range(t0, t3):
            slot = used % STAGES
            query = t * BQ + gl.arange(0, BQ, layout=NUMBERS)
            mbarrier.wait(empty.index(slot), phase(used, STAGES) ^ 1)
            # These count themselves in, so they come before what the barrier counts on.
            load_numbers(shift_buf.index(slot), shift + stat + query, mask=query < q_len)
            load_numbers(delta_buf.index(slot), delta + stat + query, mask=query < q_len)
            async_copy.mbarrier_arrive(q_full.index(slot))
            mbarrier.expect(q_full.index(slot), pieces(D) * q_desc.block_type.nbytes)
            load_pieces(q_desc, batch, q_row + t * BQ, h0 + g, q_full.index(slot), q_buf, slot, pieces(D))
            mbarrier.expect(g_full.index(slot), g_desc.block_type.nbytes)
            load_async(g_desc, [batch, q_row + t * BQ, h0 + g, 0], g_full.index(slot), g_buf.index(slot))
            used += 1


@gluon.jit
def _step(t, used, blanks, dk, dv, kt, vt, buffers, bars, q_len, offset, lo, hi, scale,
          MASK: gl.constexpr, RAGGED: gl.constexpr, C: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
          STAGES: gl.constexpr, S_LAYOUT: gl.constexpr):  # fmt: skip
    """Tile ``t`` of a head's queries into the gradients of 64 keys and values."""
    kv_full, q_full, g_full, empty, blanked = bars
    q_buf, g_buf, k_buf, v_buf, shift_buf, delta_buf = buffers
    slot = used % STAGES
    if RAGGED and MASK:
        end = q_len - t * BQ
        if end < BQ:  # each warpgroup its share; neither reads before both are done
            qt, gt = tile_pieces(q_buf, slot, BQ, D), g_buf.index(slot).reshape([BQ, DV])
            for c in gl.static_range(pieces(D)):
                blank_past(end, qt[c], q_full.index(slot), phase(used, STAGES), C, BQ // GROUPS)
            blank_past(end, gt, g_full.index(slot), phase(used, STAGES), C, BQ // GROUPS)
            mbarrier.arrive(blanked.index(0), count=1)
            mbarrier.wait(blanked.index(0), blanks & 1)
            blanks += 1
    pos = offset + t * BQ + gl.arange(0, BQ, layout=gl.SliceLayout(0, S_LAYOUT))
    dk, dv = add_queries(
        used, dk, dv, kt, vt, (q_buf, g_buf, shift_buf, delta_buf), (q_full, g_full, empty), pos, lo, hi, scale,
        MASK, BQ, D, DV, STAGES, S_LAYOUT)  # fmt: skip
    return dk, dv, blanks


@gluon.jit
def _gradients(where, shape, scale, softmax_scale, dk_out, dv_out, strides, buffers, bars,
               C: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
               WINDOWED: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr, RAGGED: gl.constexpr):  # fmt: skip
    """Warpgroup ``C``: keys ``64 * C ..`` of the program's."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BQ, 16])
    kv_heads, group, share, length, stride, window = shape
    q_buf, g_buf, k_buf, v_buf, shift_buf, delta_buf = buffers
    kv_full, q_full, g_full, empty, blanked = bars
    stride_ds, stride_db, stride_dt, stride_es, stride_eb, stride_et = strides
    batch, q_row, q_len, k_row, start, k_len, offset, hk, h0, heads, t0, t1, t2, t3 = _work(
        where, shape, BQ, WINDOWED, PACKED, TABLE)  # fmt: skip
    # A key is seen by the positions lo .. hi - 1.
    key = start + C * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    lo = key * stride + length - 1
    hi = key * 0 + (offset + q_len)
    if WINDOWED:
        hi = gl.minimum(hi, key + window)
    kt, vt = tile_pieces(k_buf, C, ROWS, D), v_buf.index(C).reshape([ROWS, DV])
    dk, dv = zero_gradients(D, DV)
    mbarrier.wait(kv_full.index(0), 0)
    used = 0
    blanks = 0
    for _g in range(heads):
        for t in range(t0, t1):
            dk, dv, blanks = _step(t, used, blanks, dk, dv, kt, vt, buffers, bars, q_len, offset, lo, hi, scale,
                                   True, RAGGED, C, BQ, D, DV, STAGES, S_LAYOUT)  # fmt: skip
            used += 1
        for t in range(t1, t2):
            dk, dv, blanks = _step(t, used, blanks, dk, dv, kt, vt, buffers, bars, q_len, offset, lo, hi, scale,
                                   False, RAGGED, C, BQ, D, DV, STAGES, S_LAYOUT)  # fmt: skip
            used += 1
        for t in range(t2, t3):
            dk, dv, blanks = _step(t, used, blanks, dk, dv, kt, vt, buffers, bars, q_len, offset, lo, hi, scale,
                                   True, RAGGED, C, BQ, D, DV, STAGES, S_LAYOUT)  # fmt: skip
            used += 1
    part = gl.program_id(1).to(gl.int64)
    row = (k_row + C * ROWS).to(gl.int64)
    out_k = dk_out + part * stride_ds + batch.to(gl.int64) * stride_db + row * stride_dt + hk * D
    out_v = dv_out + part * stride_es + batch.to(gl.int64) * stride_eb + row * stride_et + hk * DV
    for c in gl.static_range(pieces(D)):
        store_rows(out_k + c * (D // pieces(D)), dk[c] * softmax_scale, stride_dt, k_len - start - C * ROWS)
    store_rows(out_v, dv, stride_et, k_len - start - C * ROWS)


@gluon.jit(do_not_specialize=["per_seq", "q_len", "k_len", "offset", "kv_heads", "group", "share", "length", "stride", "window",
                              "stride_lb", "stride_lh"])  # fmt: skip
def interval_dkv_kernel(
    q_desc, g_desc, k_desc, v_desc, shift, delta, dk, dv,
    stride_lb, stride_lh, stride_ds, stride_db, stride_dt, stride_es, stride_eb, stride_et,
    per_seq, tile_seq, tile_first, table, q_len, k_len, offset,
    kv_heads, group, share, length, stride, window, scale, softmax_scale,
    D: gl.constexpr, DV: gl.constexpr, BQ: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q_desc.dtype
    PIECES: gl.constexpr = pieces(D)
    q_buf = gl.allocate_shared_memory(TYPE, [STAGES * PIECES, 1, BQ, 1, D // PIECES], q_desc.layout)
    g_buf = gl.allocate_shared_memory(TYPE, [STAGES, 1, BQ, 1, DV], g_desc.layout)
    k_buf = gl.allocate_shared_memory(TYPE, [GROUPS * PIECES, 1, ROWS, 1, D // PIECES], k_desc.layout)
    v_buf = gl.allocate_shared_memory(TYPE, [GROUPS, 1, ROWS, 1, DV], v_desc.layout)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shift_buf = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], NUMBERS)
    delta_buf = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], NUMBERS)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(1, GROUPS))
    fence_async_shared()
    where = (per_seq, tile_seq, tile_first, table, q_len, k_len, offset)
    shape = (kv_heads, group, share, length, stride, window)
    strides = (stride_ds, stride_db, stride_dt, stride_es, stride_eb, stride_et)
    buffers = (q_buf, g_buf, k_buf, v_buf, shift_buf, delta_buf)
    gl.warp_specialize(
        [
            (_gradients, (where, shape, scale, softmax_scale, dk, dv, strides, buffers, bars,
                          0, BQ, D, DV, STAGES, WINDOWED, PACKED, TABLE, RAGGED)),
            (_gradients, (where, shape, scale, softmax_scale, dk, dv, strides, buffers, bars,
                          1, BQ, D, DV, STAGES, WINDOWED, PACKED, TABLE, RAGGED)),
            (_load, (where, shape, (q_desc, g_desc, k_desc, v_desc), shift, delta, stride_lb, stride_lh, buffers, bars,
                     BQ, D, STAGES, WINDOWED, PACKED, TABLE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def interval_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, spans: Spans,
    length: int, stride: int, window: int, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``kernels.triton.interval_backward.interval_dkv``."""
    kv_heads, group, dim = k.shape[2], q.shape[2] // k.shape[2], q.shape[-1]
    columns = dim // pieces(dim)
    tune = tuning.hopper_interval_dkv(dim)
    tiles = spans.key_tiles(GROUPS.value * ROWS.value)
    parts = tuning.head_shares(tiles.count * kv_heads, group)
    dk_parts, dv_parts = (new_shares(x, parts, q, spans) for x in (k, v))
    if tiles.count and q.shape[1]:
        interval_dkv_kernel[(tiles.count * kv_heads, parts)](
            boxes(q, tune.block_m, columns=columns), boxes(do, tune.block_m),
            boxes(k, ROWS.value, columns=columns), boxes(v, ROWS.value),
            shift, delta, dk_parts, dv_parts, *shift.stride()[:2], *dk_parts.stride()[:3], *dv_parts.stride()[:3],
            tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
            kv_heads, group, triton.cdiv(group, parts), length, stride, window, softmax_scale * LOG2E.value, softmax_scale,
            D=dim, DV=v.shape[-1], BQ=tune.block_m, STAGES=tune.num_stages,
            WINDOWED=window > 0, PACKED=spans.packed, TABLE=spans.table is not None, RAGGED=spans.packed,
            num_warps=4,
        )  # fmt: skip
    return dk_parts, dv_parts
