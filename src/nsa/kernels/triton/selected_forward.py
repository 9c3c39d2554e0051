"""Selected attention: ``R`` neighbouring queries of one KV head, all their heads, over the union of their blocks.

One query alone reads n * s keys and values and multiplies them with no more than G rows: it is bound by the caches. ``R``
queries with G heads each fill the rows of one matrix product, and read the blocks they share once.

Where shared memory is short a program takes a block in ``CHUNKS`` pieces of ``BN`` keys, and ``HEADS`` of one query's heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.sequence import Spans, locate, span
from nsa.kernels.triton.tile import LOG2E, LOWEST, descriptor, dot, load_rows, load_tile, softmax_end, wide
from nsa.kernels.triton.union import UnionLists


@triton.jit
def _blocks(
    qt, k, v, batch, k_row, hk, blocks, masks, i0, i1, before, r, pos, k_len, scale, m, l, acc,
    CAUSAL: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Entries ``i0 .. i1`` of the tile's list into the running softmax."""
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
        kt = load_tile(k, batch, k_row + first, hk, end, BN, BD, False)
        s = dot(qt, kt.T)  # [BM, BN]
        if CHECK:
            s = tl.where((first + keys[None, :] <= pos[:, None]) & (chunk + keys < SIZE)[None, :], s, float("-inf"))
        vt = load_tile(v, batch, k_row + first, hk, end, BN, BDV, CHECK)
        # Rows that did not select this block keep their maximum, and their probabilities are 0.
        m_new = tl.where(wanted, tl.maximum(m, tl.max(s, 1) * scale), m)
        p = tl.exp2(s * scale - tl.where(wanted, m_new, float("inf"))[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = dot(p.to(vt.dtype), vt, acc * alpha[:, None])
        m = m_new
    return before, m, l, acc


@triton.jit
def tile_and_heads(kv_heads, G: tl.constexpr, HEADS: tl.constexpr):
    """Tile of a program, its KV head, and the first head of the group that it computes."""
    # The KV heads one after another: programs that run together read the same keys. The last queries see most: they go first.
    SHARES: tl.constexpr = (G + HEADS - 1) // HEADS
    number = tl.num_programs(0) // (kv_heads * SHARES)
    pid, part = tl.program_id(0) % number, tl.program_id(0) // number
    return number - 1 - pid, part // SHARES, part % SHARES * HEADS


@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "offset", "kv_heads", "stride_lb", "stride_lh"])
def selected_forward_kernel(
    q, k, v, o, lse, blocks, masks, counts,
    stride_qb, stride_qt, stride_qh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    tiles, tile_seq, tile_first, table, q_len, k_len, offset, kv_heads, scale,
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
    qt = load_rows(
        q + batch * stride_qb + first * stride_qt, r * stride_qt + h * stride_qh, tl.arange(0, BD), keep, D
    )  # [BM, BD]
    list_at = wide(pid) * kv_heads + hk
    blocks += list_at * LENGTH
    masks += list_at * LENGTH
    count = tl.load(counts + list_at * 2)
    past = tl.load(counts + list_at * 2 + 1)
    m = tl.full([BM], LOWEST, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    before, m, l, acc = _blocks(
        qt, k, v, batch, k_row, hk, blocks, masks, 0, past, tl.zeros([], tl.int32), r, pos, k_len, scale, m, l, acc,
        False, SIZE, BN, BD, BDV,
    )  # fmt: skip
    before, m, l, acc = _blocks(
        qt, k, v, batch, k_row, hk, blocks, masks, past, count, before, r, pos, k_len, scale, m, l, acc,
        True, SIZE, BN, BD, BDV,
    )  # fmt: skip
    out, row_lse = softmax_end(m, l, acc)
    o += batch * stride_ob + first * stride_ot
    ptrs = o + (r * stride_ot + h * stride_oh)[:, None] + tl.arange(0, BDV)[None, :]
    tl.store(ptrs, out.to(o.dtype.element_ty), mask=keep[:, None] & (tl.arange(0, BDV) < DV)[None, :])
    tl.store(lse + batch * stride_lb + h * stride_lh + first + r, row_lse, mask=keep)


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: UnionLists, spans: Spans, size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """q ``[B, TQ, HQ, D]``, k ``[B, T, HK, D]``, v ``[B, T, HK, DV]``: o ``[B, TQ, HQ, DV]`` and lse fp32 ``[B, HQ, TQ]``."""
    batch, rows, heads, dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[-1]
    o = torch.empty(batch, rows, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if spans.packed:  # rows that belong to no sequence are written by nobody
        o.zero_()
        lse.fill_(float("-inf"))
    if lists.tiles.count == 0:
        return o, lse
    group = heads // kv_heads
    tune = tuning.selected_forward(dim, value_dim, q.dtype, group, size, tuning.arch(q.device))
    side = min(group, tune.block_m)
    selected_forward_kernel[(lists.tiles.count * kv_heads * triton.cdiv(group, side),)](
        q, descriptor(k, tune.block_n), descriptor(v, tune.block_n), o, lse,
        lists.blocks, lists.masks, lists.counts, *q.stride()[:3], *o.stride()[:3], *lse.stride()[:2],
        lists.tiles.per_seq, lists.tiles.seq, lists.tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
        kv_heads, softmax_scale * LOG2E.value,
        R=lists.queries, G=group, HEADS=side, SIZE=size, LENGTH=lists.blocks.shape[2], D=dim, DV=value_dim,
        BM=tuning.padded(lists.queries * side), BN=tune.block_n,
        BD=tuning.padded_dim(dim), BDV=tuning.padded_dim(value_dim),
        PACKED=spans.packed, TABLE=spans.table is not None, num_warps=tune.num_warps, num_stages=tune.num_stages,
    )  # fmt: skip
    return o, lse
