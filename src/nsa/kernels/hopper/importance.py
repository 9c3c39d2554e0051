"""How much each selection block matters, on Hopper: the twin of ``kernels/triton/importance.py``.

The exponentials take as long as the products, so the two must run at once: one warp streams each head's queries past the
resident keys, two warpgroups multiply 64 queries each, and each takes the exponentials of one head while the matrix unit
computes the next. Programs are persistent; the next tile's keys arrive meanwhile.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa import tuning
from nsa.kernels.hopper.pipeline import (
    LOG2E,
    backward_lse,
    barriers,
    boxes,
    end_seen,
    load_async,
    locate,
    phase,
    pinned_fp32,
    span,
)
from nsa.kernels.triton.sequence import Spans, Tiles

ROWS = gl.constexpr(64)  # of a warpgroup
GROUPS = gl.constexpr(2)  # warpgroups
STAGES = gl.constexpr(3)  # heads of queries in flight
KEYS = gl.constexpr(2)  # tiles of keys


@gluon.jit
def _work(number, where, size, columns, BJ: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr):
    """Item ``number``: where it lies, the first selection block that it writes, and whether there is anything to do."""
    tile0, tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset = where
    number_of_tile = number // columns % tile_count
    hk = number // columns // tile_count
    seq, tile = locate(tile0 + number_of_tile, per_seq, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * (GROUPS * ROWS)
    first = number % columns * (BJ - 1)
    last = offset + gl.minimum(start + GROUPS * ROWS, q_len) - 1
    todo = (start < q_len) & (first <= last // size)
    return number_of_tile, hk, batch, q_row + start, start, q_len, k_row, k_len, offset, first, todo


@gluon.jit
def _load(q_desc, k_desc, q_buf, k_buf, bars, count, where, size, columns,
          G: gl.constexpr, PER: gl.constexpr, BJ: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr):  # fmt: skip
    """The loading warp: each item's keys, then its queries head by head."""
    q_full, q_empty, k_full, k_empty = bars
    used = 0
    turn = 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        _, hk, batch, q_row, start, q_len, k_row, k_len, offset, first, todo = _work(
            number, where, size, columns, BJ, PACKED, TABLE)  # fmt: skip
        if todo:
            b = batch.to(gl.int32)
            keys = turn % KEYS
            mbarrier.wait(k_empty.index(keys), phase(turn, KEYS) ^ 1)
            mbarrier.expect(k_full.index(keys), k_desc.block_type.nbytes)
            load_async(k_desc, [b, k_row.to(gl.int32) + (first - 1) * PER, hk, 0], k_full.index(keys), k_buf.index(keys))
            turn += 1
            for g in range(G):
                slot = used % STAGES
                mbarrier.wait(q_empty.index(slot), phase(used, STAGES) ^ 1)
                mbarrier.expect(q_full.index(slot), GROUPS * q_desc.block_type.nbytes)
                for c in gl.static_range(GROUPS):
                    load_async(q_desc, [b, q_row.to(gl.int32) + c * ROWS, hk * G + g, 0], q_full.index(slot),
                               q_buf.index(slot * GROUPS + c))  # fmt: skip
                used += 1


@gluon.jit
def _multiply(q_buf, kt, q_full, used, C: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin the products of one head."""
    slot = used % STAGES
    mbarrier.wait(q_full.index(slot), phase(used, STAGES))
    qt = q_buf.index(slot * GROUPS + C).reshape([ROWS, D])
    return warpgroup_mma(qt, kt, gl.zeros([ROWS, BN], gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def _probability(p, s, scale, lse):
    """``p`` plus one head's, computed here and not later, when the next products have been waited for."""
    return pinned_fp32(p + gl.exp2(s * scale - gl.expand_dims(lse, 1)))


@gluon.jit
def _head_lse(lse, g, stride_lh, keep):
    return backward_lse(gl.load(lse + g * stride_lh, mask=keep, other=float("-inf")))


@gluon.jit
def _score(q_buf, k_buf, bars, lse, out, strides, count, where, kv_heads, blocks, length, stride, size, columns, scale,
           C: gl.constexpr, G: gl.constexpr, PER: gl.constexpr, COVERS: gl.constexpr, BJ: gl.constexpr, BN: gl.constexpr,
           D: gl.constexpr, PACKED: gl.constexpr, TABLE: gl.constexpr):  # fmt: skip
    """Warpgroup ``C``: queries ``64 * C ..`` of every item."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    q_full, q_empty, k_full, k_empty = bars
    stride_lb, stride_lh, stride_lt = strides
    row = C * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    used = 0
    turn = 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        tile, hk, batch, q_row, start, q_len, k_row, k_len, offset, first, todo = _work(
            number, where, size, columns, BJ, PACKED, TABLE)  # fmt: skip
        if todo:
            keep = start + row < q_len
            lse_at = lse + batch * stride_lb + (q_row + row) * stride_lt + hk * G * stride_lh
            keys = turn % KEYS
            even_lse = _head_lse(lse_at, 0, stride_lh, keep)
            mbarrier.wait(k_full.index(keys), phase(turn, KEYS))
            kt = k_buf.index(keys).reshape([BN, D]).permute((1, 0))
            p = gl.zeros([ROWS, BN], gl.float32, LAYOUT)
            even = _multiply(q_buf, kt, q_full, used, C, BN, D, LAYOUT)
            even = warpgroup_mma_wait(0, deps=(even,))
            mbarrier.arrive(q_empty.index(used % STAGES), count=1)
            used += 1
            # Two heads a turn, so that neither accumulator is ever copied.
            for i in range((G - 1) // 2):
                odd_lse = _head_lse(lse_at, 2 * i + 1, stride_lh, keep)
                odd = _multiply(q_buf, kt, q_full, used, C, BN, D, LAYOUT)
                p = _probability(p, even, scale, even_lse)
                odd = warpgroup_mma_wait(0, deps=(odd,))
                mbarrier.arrive(q_empty.index(used % STAGES), count=1)
                used += 1
                even_lse = _head_lse(lse_at, 2 * i + 2, stride_lh, keep)
                even = _multiply(q_buf, kt, q_full, used, C, BN, D, LAYOUT)
                p = _probability(p, odd, scale, odd_lse)
                even = warpgroup_mma_wait(0, deps=(even,))
                mbarrier.arrive(q_empty.index(used % STAGES), count=1)
                used += 1
            if G % 2 == 0:
                odd_lse = _head_lse(lse_at, G - 1, stride_lh, keep)
                odd = _multiply(q_buf, kt, q_full, used, C, BN, D, LAYOUT)
                p = _probability(p, even, scale, even_lse)
                odd = warpgroup_mma_wait(0, deps=(odd,))
                mbarrier.arrive(q_empty.index(used % STAGES), count=1)
                mbarrier.arrive(k_empty.index(keys), count=1)
                used += 1
                p = _probability(p, odd, scale, odd_lse)
            else:
                mbarrier.arrive(k_empty.index(keys), count=1)
                p = _probability(p, even, scale, even_lse)
            turn += 1
            seen = end_seen(offset + start + row, length, stride, k_len)
            i = (first - 1) * PER + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
            inside = gl.expand_dims((i >= 0) & (i < k_len), 0) & (gl.expand_dims(i, 0) < gl.expand_dims(seen, 1))
            p = gl.where(inside, p, 0.0)
            _store(p, out, tile, hk, start, q_len, kv_heads, blocks, first, C, PER, COVERS, BJ)


@gluon.jit
def _store(p, out, tile, hk, start, q_len, kv_heads, blocks, first,
           C: gl.constexpr, PER: gl.constexpr, COVERS: gl.constexpr, BJ: gl.constexpr):  # fmt: skip
    """Equation 9: each compressed block's strides in its own selection block, and in the following one."""
    # A thread holds two rows whole: sums and the shift by a block stay inside it.
    FLAT: gl.constexpr = gl.BlockedLayout([1, BJ * PER // 8], [4, 8], [4, 1], [1, 0])
    x = gl.reshape(gl.convert_layout(p, FLAT), [ROWS, BJ, PER])
    m = gl.arange(0, PER, layout=gl.SliceLayout(0, gl.SliceLayout(1, x.type.layout)))
    weight = gl.minimum(PER - m, COVERS).to(gl.float32)[None, None, :]
    own = gl.sum(x * weight, 2)
    following = gl.sum(x * (COVERS - weight), 2)
    OUT: gl.constexpr = gl.BlockedLayout([1, BJ], [32, 1], [4, 1], [1, 0])
    own, following = gl.convert_layout(own, OUT), gl.convert_layout(following, OUT)
    j = gl.arange(0, BJ, layout=gl.SliceLayout(0, OUT))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    before = gl.gather(following, gl.maximum(j - 1, 0)[None, :] + row[:, None] * 0, 1)
    block = first - 1 + j
    at = out + ((tile.to(gl.int64) * (GROUPS * ROWS) + C * ROWS + row)[:, None] * kv_heads + hk) * blocks + block[None, :]
    keep = (start + C * ROWS + row < q_len)[:, None] & ((j >= 1) & (block < blocks))[None, :]
    gl.store(at, own + before, mask=keep)


@gluon.jit(do_not_specialize=["count", "tile0", "tile_count", "per_seq", "q_len", "k_len", "offset", "kv_heads", "blocks",
                              "length", "stride", "size", "columns", "stride_lb", "stride_lh"])  # fmt: skip
def importance_kernel(
    q_desc, k_desc, lse, out, stride_lb, stride_lh, stride_lt, count,
    tile0, tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset,
    kv_heads, blocks, length, stride, size, columns, scale,
    G: gl.constexpr, PER: gl.constexpr, COVERS: gl.constexpr, BJ: gl.constexpr, D: gl.constexpr,
    PACKED: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = BJ * PER
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [STAGES * GROUPS, 1, ROWS, 1, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(q_desc.dtype, [KEYS, 1, BN, 1, D], k_desc.layout)
    bars = (barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(KEYS, 1), barriers(KEYS, GROUPS))
    fence_async_shared()
    where = (tile0, tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset)
    strides = (stride_lb, stride_lh, stride_lt)
    gl.warp_specialize(
        [
            (_score, (q_buf, k_buf, bars, lse, out, strides, count, where, kv_heads, blocks, length, stride, size, columns,
                      scale, 0, G, PER, COVERS, BJ, BN, D, PACKED, TABLE)),
            (_score, (q_buf, k_buf, bars, lse, out, strides, count, where, kv_heads, blocks, length, stride, size, columns,
                      scale, 1, G, PER, COVERS, BJ, BN, D, PACKED, TABLE)),
            (_load, (q_desc, k_desc, q_buf, k_buf, bars, count, where, size, columns, G, PER, BJ, PACKED, TABLE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def block_importance(
    q: Tensor, k: Tensor, lse: Tensor, out: Tensor, spans: Spans, tiles: Tiles, tile0: int, count: int,
    length: int, stride: int, size: int, softmax_scale: float,
) -> None:  # fmt: skip
    """As ``kernels.triton.importance.block_importance``, on tiles of 128 queries and for a power of two of strides a block."""
    kv_heads, blocks, per = k.shape[2], out.shape[-1], size // stride
    bj = tuning.HOPPER_IMPORTANCE_KEYS // per
    columns = triton.cdiv(blocks, bj - 1)
    items = columns * count * kv_heads
    importance_kernel[(min(items, tuning.multiprocessors(q.device)),)](
        boxes(q, ROWS.value), boxes(k, bj * per), lse, out, lse.stride(0), lse.stride(2), lse.stride(1), items,
        tile0, count, tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len,
        spans.offset, kv_heads, blocks, length, stride, size, columns, softmax_scale * LOG2E.value,
        G=q.shape[2] // kv_heads, PER=per, COVERS=length // stride, BJ=bj, D=q.shape[-1],
        PACKED=spans.packed, TABLE=spans.table is not None, num_warps=4,
    )  # fmt: skip
