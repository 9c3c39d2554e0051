"""Selected attention on Hopper: the twin of ``kernels/triton/selected_forward.py``, over the same union lists.

One warp reads the list and streams the blocks; one warpgroup multiplies. So neither the list's latency nor a block's keeps the
matrix unit waiting, and what is bound by the L2 runs at the speed of the L2. Two programs share a multiprocessor: one's softmax
runs beside the other's products. The gated sum of the branches rides in the epilogue, which has this branch's rows at hand.
"""

from __future__ import annotations

import torch
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
    LN2,
    LOG2E,
    LOWEST,
    barriers,
    blank_past,
    boxes,
    load_async,
    locate,
    phase,
    span,
    thread_barrier,
)
from nsa.kernels.triton.combine import Mix
from nsa.kernels.triton.sequence import Spans
from nsa.kernels.triton.union import UnionLists

ROWS = gl.constexpr(64)


@gluon.jit
def _load(k_desc, v_desc, k_buf, v_buf, k_full, v_full, empty, blocks, count, batch, k_row, hk,
          SIZE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The loading warp: keys and values of the ``count`` blocks of the list."""
    block = gl.load(blocks)
    for i in range(count):
        following = gl.load(blocks + gl.minimum(i + 1, count - 1))
        slot = i % STAGES
        row = k_row + block * SIZE
        mbarrier.wait(empty.index(slot), phase(i, STAGES) ^ 1)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        load_async(k_desc, [batch, row, hk, 0], k_full.index(slot), k_buf.index(slot))
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        load_async(v_desc, [batch, row, hk, 0], v_full.index(slot), v_buf.index(slot))
        block = following


@gluon.jit
def _blocks(qt, k_buf, v_buf, k_full, v_full, empty, blocks, masks, i0, i1, before, r, pos, k_len, scale, m, l, acc,
            CAUSAL: gl.constexpr, RAGGED: gl.constexpr, SIZE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
            S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr):  # fmt: skip
    """Entries ``i0 .. i1`` of the tile's list into the running softmax."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    mask = gl.load(masks + i0, mask=i0 < i1, other=0)  # an empty stretch may start at the list's end
    for i in range(i0, i1):
        following = gl.load(masks + gl.minimum(i + 1, i1 - 1))
        slot = i % STAGES
        wanted = ((mask - before) >> r) & 1 != 0
        before = mask
        mask = following
        mbarrier.wait(k_full.index(slot), phase(i, STAGES))
        kt = k_buf.index(slot).reshape([SIZE, D]).permute((1, 0))
        s = warpgroup_mma(qt, kt, gl.zeros([ROWS, SIZE], gl.float32, S_LAYOUT), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        if CAUSAL:
            first = gl.load(blocks + i) * SIZE
            keys = first + gl.arange(0, SIZE, layout=gl.SliceLayout(0, S_LAYOUT))
            s = gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(pos, 1), s, float("-inf"))
            if RAGGED:
                if k_len - first < SIZE:
                    vt = v_buf.index(slot).reshape([SIZE, D])
                    blank_past(k_len - first, vt, v_full.index(slot), phase(i, STAGES), 0, SIZE)
        # Rows that did not select this block keep their maximum, and their probabilities are 0.
        m_new = gl.where(wanted, gl.maximum(m, gl.max(s, axis=1) * scale), m)
        p = gl.exp2(s * scale - gl.expand_dims(gl.where(wanted, m_new, float("inf")), 1))
        alpha = gl.exp2(m - m_new)
        l = l * alpha + gl.sum(p, axis=1)
        m = m_new
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True), 1)
        mbarrier.wait(v_full.index(slot), phase(i, STAGES))
        pt = gl.convert_layout(p.to(v_buf.dtype), P_LAYOUT, assert_trivial=True)
        acc = warpgroup_mma(pt, v_buf.index(slot).reshape([SIZE, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
    return before, m, l, acc


@gluon.jit
def _attend(q_buf, k_buf, v_buf, k_full, v_full, empty, blocks, masks, past, count, start, q_len, k_len, offset, scale,
            o, lse, mixed, others, stride_ot, stride_oh, stride_lh, RAGGED: gl.constexpr, MIX: gl.constexpr, SAVE: gl.constexpr,
            G: gl.constexpr, R: gl.constexpr, SIZE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The multiplying warpgroup; ``o`` and ``lse`` at the tile's first query and head."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIZE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    qt = q_buf.load(gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    r = row // G
    pos = offset + start + r
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    before, m, l, acc = _blocks(
        qt, k_buf, v_buf, k_full, v_full, empty, blocks, masks, 0, past, start * 0, r, pos, k_len, scale, m, l, acc,
        False, RAGGED, SIZE, D, STAGES, S_LAYOUT, O_LAYOUT)  # fmt: skip
    before, m, l, acc = _blocks(
        qt, k_buf, v_buf, k_full, v_full, empty, blocks, masks, past, count, before, r, pos, k_len, scale, m, l, acc,
        True, RAGGED, SIZE, D, STAGES, S_LAYOUT, O_LAYOUT)  # fmt: skip
    seen = l > 0
    inverse = gl.where(seen, 1.0 / l, 0.0)
    row_lse = gl.where(seen, (m + gl.log2(l)) * LN2, float("-inf"))
    keep = (row < R * G) & (start + r < q_len)
    gl.store(lse + row % G * stride_lh + r, row_lse, mask=keep)
    acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True), 1)
    # Through shared memory, which the queries no longer need, so that whole rows are written.
    q_buf.store(acc.to(q_buf.dtype))
    thread_barrier()
    _store_rows(q_buf, o, mixed, others, start, q_len, stride_ot, stride_oh, MIX, SAVE, G, R, D)


@gluon.jit
def _rows(G: gl.constexpr, R: gl.constexpr, D: gl.constexpr, start, q_len, stride_t, stride_h):
    """Offsets of a tile's rows, and whether each is one."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    keep = (row < R * G) & (start + row // G < q_len)
    at = row // G * stride_t + row % G * stride_h
    col = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    return gl.expand_dims(at, 1) + gl.expand_dims(col, 0), gl.expand_dims(keep, 1)


@gluon.jit
def _store_rows(buffer, o, mixed, others, start, q_len, stride_t, stride_h,
                MIX: gl.constexpr, SAVE: gl.constexpr, G: gl.constexpr, R: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Write the branch's rows (with ``SAVE``) and the gated sum of all branches (with ``MIX``), which are laid out alike."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    at, keep = _rows(G, R, D, start, q_len, stride_t, stride_h)
    rows = buffer.load(LAYOUT)
    if SAVE:
        gl.store(o + at, rows, mask=keep)
    if MIX:
        o_cmp, o_win, gates = others
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        gate = gates + (row // G * stride_t + row % G * stride_h) // D * 3
        inside = (row < R * G) & (start + row // G < q_len)
        total = gl.expand_dims(gl.load(gate, mask=inside, other=0.0).to(gl.float32), 1) * gl.load(
            o_cmp + at, mask=keep, other=0.0).to(gl.float32)  # fmt: skip
        total += gl.expand_dims(gl.load(gate + 1, mask=inside, other=0.0).to(gl.float32), 1) * rows.to(gl.float32)
        total += gl.expand_dims(gl.load(gate + 2, mask=inside, other=0.0).to(gl.float32), 1) * gl.load(
            o_win + at, mask=keep, other=0.0).to(gl.float32)  # fmt: skip
        gl.store(mixed + at, total.to(buffer.dtype), mask=keep)


@gluon.jit(do_not_specialize=["per_seq", "q_len", "k_len", "offset", "kv_heads", "stride_lb", "stride_lh"])
def selected_forward_kernel(
    q, k_desc, v_desc, o, lse, o_cmp, o_win, gates, mixed, blocks, masks, counts,
    stride_qb, stride_qt, stride_qh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    per_seq, tile_seq, tile_first, table, q_len, k_len, offset, kv_heads, scale,
    R: gl.constexpr, G: gl.constexpr, SIZE: gl.constexpr, LENGTH: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, TABLE: gl.constexpr, RAGGED: gl.constexpr, MIX: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    # The KV heads one after another: programs that run together read the same keys.
    number = gl.num_programs(0) // kv_heads
    pid, hk = gl.program_id(0) % number, gl.program_id(0) // number
    pid = number - 1 - pid
    seq, tile = locate(pid, per_seq, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * R
    if start < q_len:
        TYPE: gl.constexpr = k_desc.dtype
        q_buf = gl.allocate_shared_memory(
            TYPE, [ROWS, D], gl.NVMMASharedLayout.get_default_for([64, D], TYPE))  # fmt: skip
        k_buf = gl.allocate_shared_memory(TYPE, [STAGES, 1, SIZE, 1, D], k_desc.layout)
        v_buf = gl.allocate_shared_memory(TYPE, [STAGES, 1, SIZE, 1, D], v_desc.layout)
        k_full, v_full, empty = barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 1)
        first = q_row + start
        at, keep = _rows(G, R, D, start, q_len, stride_qt, stride_qh)
        q_buf.store(gl.load(q + batch * stride_qb + first * stride_qt + hk * G * stride_qh + at, mask=keep, other=0.0))
        fence_async_shared()
        thread_barrier()
        list_at = pid.to(gl.int64) * kv_heads + hk
        count = gl.load(counts + list_at * 2)
        past = gl.load(counts + list_at * 2 + 1)
        blocks += list_at * LENGTH
        masks += list_at * LENGTH
        origin = batch * stride_ob + first * stride_ot + hk * G * stride_oh
        others = (o_cmp, o_win, gates)
        if SAVE:
            o += origin
        if MIX:
            mixed += origin
            others = (o_cmp + origin, o_win + origin, gates + origin // D * 3)
        lse += batch * stride_lb + hk * G * stride_lh + first
        gl.warp_specialize(
            [
                (_attend, (q_buf, k_buf, v_buf, k_full, v_full, empty, blocks, masks, past, count, start, q_len, k_len, offset,
                           scale, o, lse, mixed, others, stride_ot, stride_oh, stride_lh,
                           RAGGED, MIX, SAVE, G, R, SIZE, D, STAGES)),
                (_load, (k_desc, v_desc, k_buf, v_buf, k_full, v_full, empty, blocks, count, batch.to(gl.int32),
                         k_row.to(gl.int32), hk, SIZE, STAGES)),
            ],
            [1],
            [24],
        )  # fmt: skip


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: UnionLists, spans: Spans, size: int, softmax_scale: float, mix: Mix | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``kernels.triton.selected_forward.selected_forward``, and with ``mix`` the gated sum of all branches.

    The first output is empty where it is not wanted.
    """
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    save = mix is None or mix.save
    make = torch.zeros if spans.packed else torch.empty  # rows that belong to no sequence are written by nobody
    o = make((batch, rows, heads, dim) if save else (0,), dtype=q.dtype, device=q.device)
    mixed = None if mix is None else make((batch, rows, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if spans.packed:
        lse.fill_(float("-inf"))
    if lists.tiles.count == 0:
        return o, lse, mixed
    selected_forward_kernel[(lists.tiles.count * kv_heads,)](
        q, boxes(k, size), boxes(v, size), o, lse,
        None if mix is None else mix.o_cmp, None if mix is None else mix.o_win, None if mix is None else mix.gates, mixed,
        lists.blocks, lists.masks, lists.counts, *q.stride()[:3], rows * heads * dim, heads * dim, dim, *lse.stride()[:2],
        lists.tiles.per_seq, lists.tiles.seq, lists.tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
        kv_heads, softmax_scale * LOG2E.value,
        R=lists.queries, G=heads // kv_heads, SIZE=size, LENGTH=lists.blocks.shape[2], D=dim,
        STAGES=tuning.HOPPER_SELECTED_STAGES, PACKED=spans.packed, TABLE=spans.table is not None, RAGGED=not spans.covers_keys,
        MIX=mix is not None, SAVE=save, num_warps=4, maxnreg=128,
    )  # fmt: skip
    return o, lse, mixed
