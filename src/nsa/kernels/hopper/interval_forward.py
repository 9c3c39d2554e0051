"""Attention over an interval of the keys on Hopper: the twin of ``kernels/triton/interval_forward.py``.

One warp streams tiles of keys and values; two warpgroups multiply 64 rows each. A warpgroup's softmax of one tile runs beside
its product of the tile before with the values, so that the exponentials hide behind the matrix unit. Programs are persistent.
A row is a query and one of ``HEADS`` heads that lie side by side: more heads make fewer queries a tile, and so less of the
window's tiles that is masked.

Source: the pipeline of FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa import tuning
from nsa.kernels.hopper.interval_tiles import GROUPS, ROWS, operands, query_tile, scores, store_tile
from nsa.kernels.hopper.pipeline import (
    LN2,
    LOG2E,
    LOWEST,
    barriers,
    blank_past,
    boxes,
    end_seen,
    first_seen,
    load_async,
    load_pieces,
    phase,
    pieces,
    pinned,
)
from nsa.kernels.triton.sequence import Spans


@gluon.jit
def _load(count, where, shape, descs, buffers, bars,
          HEADS: gl.constexpr, BN: gl.constexpr, PIECES: gl.constexpr, HELD: gl.constexpr, SIDES: gl.constexpr,
          STAGES: gl.constexpr, WINDOWED: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr):  # fmt: skip
    """The loading warp: each tile's queries, then its keys and values from the last tile down, values one tile behind."""
    q_desc, k_desc, v_desc = descs
    q_buf, k_buf, v_buf = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, blanked = bars
    used = 0
    turn = 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        batch, q_row, start, q_len, k_row, k_len, offset, h, low, mid0, mid1, high = query_tile(
            number, where, shape, HEADS, BN, WINDOWED, PACKED, TABLE)  # fmt: skip
        hk = h // shape[1]
        if HELD:
            _load_queries(q_desc, q_buf, q_full, q_empty, batch, q_row, h, turn, HEADS, PIECES, SIDES)
        for i in range(high - low):
            n = k_row + (high - 1 - i) * BN
            slot = used % STAGES
            mbarrier.wait(k_empty.index(slot), phase(used, STAGES) ^ 1)
            mbarrier.expect(k_full.index(slot), PIECES * k_desc.block_type.nbytes)
            load_pieces(k_desc, batch, n, hk, k_full.index(slot), k_buf, slot, PIECES)
            if not HELD and i == 0:  # the tile before is read from its buffer to the end: keys have room sooner
                _load_queries(q_desc, q_buf, q_full, q_empty, batch, q_row, h, turn, HEADS, PIECES, SIDES)
            if i > 0:
                _load_values(v_desc, v_buf, v_full, v_empty, batch, n + BN, hk, used - 1, STAGES)
            used += 1
        _load_values(v_desc, v_buf, v_full, v_empty, batch, k_row + low * BN, hk, used - 1, STAGES)
        turn += 1


@gluon.jit
def _load_queries(q_desc, q_buf, q_full, q_empty, batch, q_row, h, turn,
                  HEADS: gl.constexpr, PIECES: gl.constexpr, SIDES: gl.constexpr):  # fmt: skip
    side = turn % SIDES
    mbarrier.wait(q_empty.index(side), phase(turn, SIDES) ^ 1)
    mbarrier.expect(q_full.index(side), GROUPS * PIECES * q_desc.block_type.nbytes)
    for c in gl.static_range(GROUPS):
        load_pieces(q_desc, batch, q_row + c * (ROWS // HEADS), h, q_full.index(side), q_buf, side * GROUPS + c, PIECES)


@gluon.jit
def _load_values(v_desc, v_buf, v_full, v_empty, batch, n, hk, count, STAGES: gl.constexpr):
    slot = count % STAGES
    mbarrier.wait(v_empty.index(slot), phase(count, STAGES) ^ 1)
    mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
    load_async(v_desc, [batch, n, hk, 0], v_full.index(slot), v_buf.index(slot))


@gluon.jit
def _step(j, low, queries, pt, acc, m, l, k_buf, v_buf, bars, used, lo, hi, scale,
          MASK: gl.constexpr, BN: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
          S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):  # fmt: skip
    """Products of tile ``j`` and their softmax, beside the product of the tile before (``pt``) with its values."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, blanked = bars
    slot, before = used % STAGES, (used - 1) % STAGES
    s = scores(queries, k_buf, slot, BN, PIECES, S_LAYOUT)
    mbarrier.wait(v_full.index(before), phase(used - 1, STAGES))
    acc = warpgroup_mma(pt, v_buf.index(before).reshape([BN, DV]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    if MASK:
        s = _masked(s, j, lo, hi, BN, S_LAYOUT)
    m_new = gl.maximum(m, gl.max(s, axis=1) * scale)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    l = l * alpha + gl.sum(p, axis=1)
    # The exponentials must not sink below the wait for the other product: pinned, and a wait for the next keys between.
    following = pinned(gl.convert_layout(p.to(v_buf.dtype), P_LAYOUT, assert_trivial=True))
    mbarrier.wait(k_full.index((used + 1) % STAGES), phase(used + 1, STAGES), pred=j > low)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(before), count=1)
    pt = pinned(pt)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True), 1)
    return following, acc, m_new, l


@gluon.jit
def _masked(s, j, lo, hi, BN: gl.constexpr, S_LAYOUT: gl.constexpr):
    keys = gl.expand_dims(j * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT)), 0)
    return gl.where((keys >= gl.expand_dims(lo, 1)) & (keys < gl.expand_dims(hi, 1)), s, float("-inf"))


@gluon.jit
def _pieces(x, PIECES: gl.constexpr):
    """``x``, or of two pieces its left and its right columns."""
    if PIECES == 1:
        return (x,)
    else:
        return gl.split(gl.permute(gl.reshape(x, [ROWS, 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _attend(count, where, shape, scale, o_desc, o, lse, strides, buffers, o_buf, bars,
            C: gl.constexpr, HEADS: gl.constexpr, BN: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr,
            HELD: gl.constexpr, SIDES: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, PACKED: gl.constexpr,
            TABLE: gl.constexpr, RAGGED: gl.constexpr):  # fmt: skip
    """Warpgroup ``C``: rows ``64 * C ..`` of every tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    heads, group, length, stride, window = shape
    q_buf, k_buf, v_buf = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, blanked = bars
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh = strides
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    used = 0
    turn = 0
    blanks = 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        batch, q_row, start, q_len, k_row, k_len, offset, h, low, mid0, mid1, high = query_tile(
            number, where, shape, HEADS, BN, WINDOWED, PACKED, TABLE)  # fmt: skip
        query = C * (ROWS // HEADS) + row // HEADS
        pos = offset + start + query
        lo, hi = first_seen(pos, window, WINDOWED), end_seen(pos, length, stride, k_len)
        side = turn % SIDES
        mbarrier.wait(q_full.index(side), phase(turn, SIDES))
        queries = operands(q_buf, side * GROUPS + C, PIECES, HELD, Q_LAYOUT)
        if HELD:
            mbarrier.arrive(q_empty.index(side), count=1)
        # The last tile: nothing to accumulate yet.
        slot = used % STAGES
        mbarrier.wait(k_full.index(slot), phase(used, STAGES))
        s = scores(queries, k_buf, slot, BN, PIECES, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        s = _masked(s, high - 1, lo, hi, BN, S_LAYOUT)
        m = gl.maximum(gl.max(s, axis=1) * scale, LOWEST)
        p = gl.exp2(s * scale - gl.expand_dims(m, 1))
        l = gl.sum(p, axis=1)
        pt = gl.convert_layout(p.to(v_buf.dtype), P_LAYOUT, assert_trivial=True)
        acc = gl.zeros([ROWS, DV], gl.float32, O_LAYOUT)
        if RAGGED:
            end = k_len - (high - 1) * BN
            if end < BN:  # each warpgroup its share; neither reads before both are done
                vt = v_buf.index(slot).reshape([BN, DV])
                blank_past(end, vt, v_full.index(slot), phase(used, STAGES), C, BN // GROUPS)
                mbarrier.arrive(blanked.index(0), count=1)
                mbarrier.wait(blanked.index(0), blanks & 1)
                blanks += 1
        used += 1
        mbarrier.wait(k_full.index(used % STAGES), phase(used, STAGES), pred=high - 1 > low)
        for i in range(high - 1 - mid1):
            pt, acc, m, l = _step(high - 2 - i, low, queries, pt, acc, m, l, k_buf, v_buf, bars, used, lo, hi, scale,
                                  True, BN, PIECES, DV, STAGES, S_LAYOUT, P_LAYOUT)  # fmt: skip
            used += 1
        for i in range(mid1 - mid0):
            pt, acc, m, l = _step(mid1 - 1 - i, low, queries, pt, acc, m, l, k_buf, v_buf, bars, used, lo, hi, scale,
                                  False, BN, PIECES, DV, STAGES, S_LAYOUT, P_LAYOUT)  # fmt: skip
            used += 1
        if WINDOWED:
            for i in range(mid0 - low):
                pt, acc, m, l = _step(mid0 - 1 - i, low, queries, pt, acc, m, l, k_buf, v_buf, bars, used, lo, hi, scale,
                                      True, BN, PIECES, DV, STAGES, S_LAYOUT, P_LAYOUT)  # fmt: skip
                used += 1
        if not HELD:
            mbarrier.arrive(q_empty.index(side), count=1)
        slot = (used - 1) % STAGES
        mbarrier.wait(v_full.index(slot), phase(used - 1, STAGES))
        acc = warpgroup_mma(pt, v_buf.index(slot).reshape([BN, DV]), acc, is_async=True)
        seen = hi > lo
        inverse = gl.where(seen, 1.0 / l, 0.0)
        row_lse = gl.where(seen, (m + gl.log2(l)) * LN2, float("-inf"))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        keep = start + query < q_len
        head = h + row % HEADS
        gl.store(lse + batch.to(gl.int64) * stride_lb + head * stride_lh + (q_row + query), row_lse, mask=keep)
        acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True), 1)
        first = C * (ROWS // HEADS)
        if start + first + ROWS // HEADS <= q_len:
            store_tile(o_desc, batch, q_row + first, h, o_buf.index(C), _pieces(acc, DV // o_buf.shape[4]))
        else:  # a descriptor knows where the tensor ends, not where the sequence does
            row_o = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O_LAYOUT))
            at = o + batch.to(gl.int64) * stride_ob + (q_row + first + row_o // HEADS).to(gl.int64) * stride_ot
            at += (h + row_o % HEADS) * stride_oh
            col = gl.arange(0, DV, layout=gl.SliceLayout(0, O_LAYOUT))
            inside = start + first + row_o // HEADS < q_len
            gl.store(gl.expand_dims(at, 1) + gl.expand_dims(col, 0), acc.to(o_buf.dtype), mask=gl.expand_dims(inside, 1))
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["count", "tile_count", "per_seq", "q_len", "k_len", "offset", "heads", "group", "length",
                              "stride", "window", "stride_lb", "stride_lh"])  # fmt: skip
def interval_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, o, lse, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    count, tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset,
    heads, group, length, stride, window, scale,
    D: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr, HEADS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q_desc.dtype
    # Tiles of queries: the next one's come while one is computed, where it has room.
    SIDES: gl.constexpr = 2 if PIECES == 1 else 1
    HELD: gl.constexpr = PIECES * D * BN <= 128 * 128  # queries are in registers, of which larger tiles leave too few
    q_buf = gl.allocate_shared_memory(TYPE, [SIDES * GROUPS * PIECES, 1, ROWS // HEADS, HEADS, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(TYPE, [STAGES * PIECES, 1, BN, 1, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(TYPE, [STAGES, 1, BN, 1, DV], v_desc.layout)
    o_buf = gl.allocate_shared_memory(TYPE, [GROUPS, 1, ROWS // HEADS, HEADS, o_desc.block_type.shape[3]], o_desc.layout)
    bars = (barriers(SIDES, 1), barriers(SIDES, GROUPS), barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(STAGES, 1),
            barriers(STAGES, GROUPS), barriers(1, GROUPS))  # fmt: skip
    fence_async_shared()
    where = (tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset)
    shape = (heads, group, length, stride, window)
    strides = (stride_ob, stride_ot, stride_oh, stride_lb, stride_lh)
    buffers = (q_buf, k_buf, v_buf)
    gl.warp_specialize(
        [
            (_attend, (count, where, shape, scale, o_desc, o, lse, strides, buffers, o_buf, bars,
                       0, HEADS, BN, PIECES, DV, HELD, SIDES, STAGES, WINDOWED, PACKED, TABLE, RAGGED)),
            (_attend, (count, where, shape, scale, o_desc, o, lse, strides, buffers, o_buf, bars,
                       1, HEADS, BN, PIECES, DV, HELD, SIDES, STAGES, WINDOWED, PACKED, TABLE, RAGGED)),
            (_load, (count, where, shape, (q_desc, k_desc, v_desc), buffers, bars,
                     HEADS, BN, PIECES, HELD, SIDES, STAGES, WINDOWED, PACKED, TABLE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def interval_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, length: int, stride: int, window: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As ``kernels.triton.interval_forward.interval_forward``, for what ``tuning.hopper_interval_forward`` has a tile for."""
    batch, rows, heads, dim = q.shape
    value_dim, group = v.shape[-1], heads // k.shape[2]
    o = torch.empty(batch, rows, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if spans.packed:  # rows that belong to no sequence are written by nobody
        o.zero_()
        lse.fill_(float("-inf"))
    tune = tuning.hopper_interval_forward(window > 0, group)
    side, columns = tune.heads, dim // pieces(dim)
    queries = GROUPS.value * ROWS.value // side
    tiles = spans.query_tiles(queries)
    count = tiles.count * (heads // side)
    if count == 0:
        return o, lse
    box = queries // GROUPS.value, side
    interval_forward_kernel[(min(count, tuning.multiprocessors(q.device)),)](
        boxes(q, *box, columns), boxes(k, tune.block_n, columns=columns), boxes(v, tune.block_n),
        boxes(o, *box, value_dim if columns == dim else columns), o, lse, *o.stride()[:3], *lse.stride()[:2],
        count, tiles.count, tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
        heads, group, length, stride, window, softmax_scale * LOG2E.value,
        D=columns, PIECES=dim // columns, DV=value_dim, HEADS=side, BN=tune.block_n, STAGES=tune.num_stages,
        WINDOWED=window > 0, PACKED=spans.packed, TABLE=spans.table is not None, RAGGED=not spans.covers_keys,
        num_warps=4,
    )  # fmt: skip
    return o, lse
