"""Gradients of queries of attention over an interval, on Hopper: the twin of ``interval_dq_kernel``.

Built like the forward: one warp streams tiles of keys and values, two warpgroups have 64 rows each, programs are persistent.

Source: FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

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
    LOG2E,
    barriers,
    blank_past,
    boxes,
    end_seen,
    first_seen,
    gated,
    load_async,
    load_pieces,
    phase,
    pieces,
    pinned,
)
from nsa.kernels.triton.sequence import Spans, new_gradient


@gluon.jit
def _load(count, where, shape, descs, buffers, bars,
          HEADS: gl.constexpr, BN: gl.constexpr, PIECES: gl.constexpr, HELD: gl.constexpr, STAGES: gl.constexpr,
          WINDOWED: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr):  # fmt: skip
    """The loading warp: each tile's queries and gradients, then its keys and values from the last tile down."""
    q_desc, g_desc, k_desc, v_desc = descs
    q_buf, g_buf, k_buf, v_buf, out_buf = buffers
    q_full, q_empty, kv_full, kv_empty, blanked = bars
    into = (q_buf, g_buf, q_full.index(0), q_empty.index(0))
    used = 0
    turn = 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        batch, q_row, start, q_len, k_row, k_len, offset, h, low, mid0, mid1, high = query_tile(
            number, where, shape, HEADS, BN, WINDOWED, PACKED, TABLE)  # fmt: skip
        hk = h // shape[1]
        if HELD:
            _load_queries(q_desc, g_desc, into, batch, q_row, h, turn, HEADS, PIECES)
        for i in range(high - low):
            n = k_row + (high - 1 - i) * BN
            slot = used % STAGES
            mbarrier.wait(kv_empty.index(slot), phase(used, STAGES) ^ 1)
            mbarrier.expect(kv_full.index(slot), PIECES * k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            load_pieces(k_desc, batch, n, hk, kv_full.index(slot), k_buf, slot, PIECES)
            load_async(v_desc, [batch, n, hk, 0], kv_full.index(slot), v_buf.index(slot))
            if not HELD and i == 0:  # the tile before is read from its buffer to the end: keys have room sooner
                _load_queries(q_desc, g_desc, into, batch, q_row, h, turn, HEADS, PIECES)
            used += 1
        turn += 1


@gluon.jit
def _load_queries(q_desc, g_desc, into, batch, q_row, h, turn, HEADS: gl.constexpr, PIECES: gl.constexpr):
    q_buf, g_buf, full, empty = into
    mbarrier.wait(empty, (turn & 1) ^ 1)
    mbarrier.expect(full, GROUPS * (PIECES * q_desc.block_type.nbytes + g_desc.block_type.nbytes))
    for c in gl.static_range(GROUPS):
        load_pieces(q_desc, batch, q_row + c * (ROWS // HEADS), h, full, q_buf, c, PIECES)
        load_async(g_desc, [batch, q_row + c * (ROWS // HEADS), h, 0], full, g_buf.index(c))


@gluon.jit
def _step(j, low, used, acc, queries, gt, k_buf, v_buf, bars, row_shift, row_delta, lo, hi, scale,
          MASK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr, HELD: gl.constexpr,
          STAGES: gl.constexpr, S_LAYOUT: gl.constexpr):  # fmt: skip
    """Tile ``j`` of the keys into the gradient of 64 rows, in pieces ``acc``."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc[0].type.layout, k_width=2)
    q_full, q_empty, kv_full, kv_empty, blanked = bars
    slot = used % STAGES
    vt = v_buf.index(slot).reshape([BN, DV])
    zeros = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    mbarrier.wait(kv_full.index(slot), phase(used, STAGES))
    s = scores(queries, k_buf, slot, BN, PIECES, S_LAYOUT)
    dp = warpgroup_mma(gt, vt.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    if not HELD:  # the last that reads them
        mbarrier.arrive(q_empty.index(0), count=1, pred=j == low)
    p = gl.exp2(s * scale - gl.expand_dims(row_shift, 1))
    if MASK:
        keys = gl.expand_dims(j * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT)), 0)
        p = gl.where((keys >= gl.expand_dims(lo, 1)) & (keys < gl.expand_dims(hi, 1)), p, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = p * (dp - gl.expand_dims(row_delta, 1))
    dst = pinned(gl.convert_layout(ds.to(k_buf.dtype), OPERAND, assert_trivial=True))
    sums = ()
    for c in gl.static_range(PIECES):
        kt = k_buf.index(slot * PIECES + c).reshape([BN, D])
        sums += (warpgroup_mma(dst, kt, acc[c], is_async=True),)  # type: ignore[assignment]
    acc = [warpgroup_mma_wait(0, deps=(x,)) for x in sums]  # type: ignore[var-annotated]
    dst = pinned(dst)
    mbarrier.arrive(kv_empty.index(slot), count=1)
    return acc


@gluon.jit
def _gradients(count, where, shape, scale, softmax_scale, shift, delta, dq_desc, dq, add, strides, buffers, bars,
               C: gl.constexpr, HEADS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, PIECES: gl.constexpr,
               DV: gl.constexpr, HELD: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr, PACKED: gl.constexpr,
               TABLE: gl.constexpr, RAGGED: gl.constexpr):  # fmt: skip
    """Warpgroup ``C``: rows ``64 * C ..`` of every tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    READ: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    heads, group, length, stride, window = shape
    q_buf, g_buf, k_buf, v_buf, out_buf = buffers
    q_full, q_empty, kv_full, kv_empty, blanked = bars
    stride_db, stride_dt, stride_dh, stride_lb, stride_lh = strides
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
        keep = start + query < q_len
        stat = batch.to(gl.int64) * stride_lb + (h + row % HEADS) * stride_lh + (q_row + query)
        row_shift = gl.load(shift + stat, mask=keep, other=float("inf"))
        row_delta = gl.load(delta + stat, mask=keep, other=0.0)
        acc = (gl.zeros([ROWS, D], gl.float32, Q_LAYOUT),) * PIECES
        mbarrier.wait(q_full.index(0), turn & 1)
        queries = operands(q_buf, C, PIECES, HELD, READ)
        gt = g_buf.index(C).reshape([ROWS, DV]).load(READ)
        if HELD:
            mbarrier.arrive(q_empty.index(0), count=1)
        if RAGGED:
            end = k_len - (high - 1) * BN
            if end < BN:  # each warpgroup its share; neither reads before both are done
                slot = used % STAGES
                for c in gl.static_range(PIECES):
                    kt = k_buf.index(slot * PIECES + c).reshape([BN, D])
                    blank_past(end, kt, kv_full.index(slot), phase(used, STAGES), C, BN // GROUPS)
                vt = v_buf.index(slot).reshape([BN, DV])
                blank_past(end, vt, kv_full.index(slot), phase(used, STAGES), C, BN // GROUPS)
                mbarrier.arrive(blanked.index(0), count=1)
                mbarrier.wait(blanked.index(0), blanks & 1)
                blanks += 1
        for i in range(high - mid1):
            acc = _step(high - 1 - i, low, used, acc, queries, gt, k_buf, v_buf, bars, row_shift, row_delta, lo, hi, scale,
                        True, BN, D, PIECES, DV, HELD, STAGES, S_LAYOUT)  # fmt: skip
            used += 1
        for i in range(mid1 - mid0):
            acc = _step(mid1 - 1 - i, low, used, acc, queries, gt, k_buf, v_buf, bars, row_shift, row_delta, lo, hi, scale,
                        False, BN, D, PIECES, DV, HELD, STAGES, S_LAYOUT)  # fmt: skip
            used += 1
        if WINDOWED:
            for i in range(mid0 - low):
                acc = _step(mid0 - 1 - i, low, used, acc, queries, gt, k_buf, v_buf, bars, row_shift, row_delta, lo, hi, scale,
                            True, BN, D, PIECES, DV, HELD, STAGES, S_LAYOUT)  # fmt: skip
                used += 1
        its_shift = gl.expand_dims(gl.convert_layout(row_shift, gl.SliceLayout(1, Q_LAYOUT), assert_trivial=True), 1)
        acc = [gated(x * softmax_scale, its_shift) for x in acc]
        first = C * (ROWS // HEADS)
        if (add == 0) & (start + first + ROWS // HEADS <= q_len):
            store_tile(dq_desc, batch, q_row + first, h, out_buf.index(C), acc)
        else:  # to what is there, or past the sequence's end, of which a descriptor knows nothing
            row_q = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_LAYOUT))
            at = dq + batch.to(gl.int64) * stride_db + (q_row + first + row_q // HEADS).to(gl.int64) * stride_dt
            at = gl.expand_dims(at + (h + row_q % HEADS) * stride_dh, 1)
            at += gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, Q_LAYOUT)), 0)
            inside = gl.expand_dims(start + first + row_q // HEADS < q_len, 1)
            for c in gl.static_range(PIECES):
                x = acc[c]
                if add != 0:
                    x += gl.load(at + c * D, mask=inside, other=0.0).to(gl.float32)
                gl.store(at + c * D, x.to(out_buf.dtype), mask=inside)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["add", "count", "tile_count", "per_seq", "q_len", "k_len", "offset", "heads", "group", "length",
                              "stride", "window", "stride_lb", "stride_lh"])  # fmt: skip
def interval_dq_kernel(
    q_desc, g_desc, k_desc, v_desc, dq_desc, shift, delta, dq, add, stride_db, stride_dt, stride_dh, stride_lb, stride_lh,
    count, tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset,
    heads, group, length, stride, window, scale, softmax_scale,
    D: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr, HEADS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q_desc.dtype
    HELD: gl.constexpr = PIECES == 1  # queries are in registers, of which more sums leave too few
    q_buf = gl.allocate_shared_memory(TYPE, [GROUPS * PIECES, 1, ROWS // HEADS, HEADS, D], q_desc.layout)
    g_buf = gl.allocate_shared_memory(TYPE, [GROUPS, 1, ROWS // HEADS, HEADS, DV], g_desc.layout)
    k_buf = gl.allocate_shared_memory(TYPE, [STAGES * PIECES, 1, BN, 1, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(TYPE, [STAGES, 1, BN, 1, DV], v_desc.layout)
    out_buf = gl.allocate_shared_memory(TYPE, [GROUPS, 1, ROWS // HEADS, HEADS, D], dq_desc.layout)
    bars = (barriers(1, 1), barriers(1, GROUPS), barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(1, GROUPS))
    fence_async_shared()
    where = (tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset)
    shape = (heads, group, length, stride, window)
    strides = (stride_db, stride_dt, stride_dh, stride_lb, stride_lh)
    buffers = (q_buf, g_buf, k_buf, v_buf, out_buf)
    gl.warp_specialize(
        [
            (_gradients, (count, where, shape, scale, softmax_scale, shift, delta, dq_desc, dq, add, strides, buffers, bars,
                          0, HEADS, BN, D, PIECES, DV, HELD, STAGES, WINDOWED, PACKED, TABLE, RAGGED)),
            (_gradients, (count, where, shape, scale, softmax_scale, shift, delta, dq_desc, dq, add, strides, buffers, bars,
                          1, HEADS, BN, D, PIECES, DV, HELD, STAGES, WINDOWED, PACKED, TABLE, RAGGED)),
            (_load, (count, where, shape, (q_desc, g_desc, k_desc, v_desc), buffers, bars,
                     HEADS, BN, PIECES, HELD, STAGES, WINDOWED, PACKED, TABLE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def interval_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, spans: Spans,
    length: int, stride: int, window: int, softmax_scale: float, dq: Tensor | None,
) -> Tensor:  # fmt: skip
    """As ``kernels.triton.interval_backward.interval_dq``."""
    add = dq is not None
    dq = new_gradient(q, spans) if dq is None else dq
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    tune = tuning.hopper_interval_dq(window > 0, group)
    side = tune.heads
    queries = GROUPS.value * ROWS.value // side
    tiles = spans.query_tiles(queries)
    count = tiles.count * (heads // side)
    if count == 0:
        return dq
    columns = q.shape[-1] // pieces(q.shape[-1])
    box = queries // GROUPS.value, side
    interval_dq_kernel[(min(count, tuning.multiprocessors(q.device)),)](
        boxes(q, *box, columns), boxes(do, *box), boxes(k, tune.block_n, columns=columns), boxes(v, tune.block_n),
        boxes(dq, *box, columns),
        shift, delta, dq, int(add), *dq.stride()[:3], *shift.stride()[:2],
        count, tiles.count, tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
        heads, group, length, stride, window, softmax_scale * LOG2E.value, softmax_scale,
        D=columns, PIECES=q.shape[-1] // columns, DV=v.shape[-1], HEADS=side, BN=tune.block_n, STAGES=tune.num_stages,
        WINDOWED=window > 0, PACKED=spans.packed, TABLE=spans.table is not None, RAGGED=not spans.covers_keys,
        num_warps=4,
    )  # fmt: skip
    return dq
