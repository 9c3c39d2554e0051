"""Gradients of ``interval_forward``.

Two kernels. Gradients of queries: one program a tile of queries of one head, over the keys they see, like the forward.
Gradients of keys and values: one program a tile of keys of one KV head and a share of the group's query heads, over the
queries that see them; the shares are added up afterwards in a fixed order, so the result is the same on every run. That
kernel loads by pointers: descriptors made it 10% slower on an H100.

Source: the recomputation scheme of FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.interval_forward import end_seen, first_seen, seen_by_tile
from nsa.kernels.triton.sequence import Spans, locate, new_gradient, new_shares, span
from nsa.kernels.triton.tile import LOG2E, descriptor, dot, gated, load_rows, load_tile, store_tile, wide


@triton.jit
def _query_range(
    qt, gt, k, v, batch, k_row, hk, lo, hi, n0, n1, k_len, scale, shift, delta, acc,
    MASK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Keys ``n0 .. n1`` into the gradient of a tile of queries."""
    for n in tl.range(n0, n1, BN):
        kt = load_tile(k, batch, k_row + n, hk, k_len - n, BN, BD, MASK)
        vt = load_tile(v, batch, k_row + n, hk, k_len - n, BN, BDV, MASK)
        p = tl.exp2(dot(qt, kt.T) * scale - shift[:, None])  # [BM, BN]
        if MASK:
            keys = (n + tl.arange(0, BN))[None, :]
            p = tl.where((keys >= lo[:, None]) & (keys < hi[:, None]), p, 0.0)
        ds = p * (dot(gt, vt.T) - delta[:, None])
        acc = dot(ds.to(kt.dtype), kt, acc)
    return acc


@triton.jit(
    do_not_specialize=[
        "add",
        "tiles",
        "q_len",
        "k_len",
        "offset",
        "heads",
        "group",
        "length",
        "stride",
        "window",
        "stride_lb",
        "stride_lh",
    ]
)
def interval_dq_kernel(
    q, k, v, do, shift, delta, dq, add, stride_lb, stride_lh, stride_db, stride_dt, stride_dh,
    tiles, tile_seq, tile_first, table, q_len, k_len, offset, heads, group, length, stride, window, scale, softmax_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    WINDOWED: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = pid % heads
    seq, tile = locate(tl.num_programs(0) // heads - 1 - pid // heads, tiles, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * BM
    if start >= q_len:
        return
    rows = tl.arange(0, BM)
    pos = offset + start + rows
    lo, hi = first_seen(pos, window, WINDOWED), end_seen(pos, length, stride, k_len)
    last = offset + tl.minimum(start + BM, q_len) - 1
    n0, n1, n2, n3 = seen_by_tile(offset + start, last, length, stride, window, k_len, BN, WINDOWED)

    hk = h // group
    row = q_row + start
    keep = start + rows < q_len
    qt = load_tile(q, batch, row, h, q_len - start, BM, BD, False)
    gt = load_tile(do, batch, row, h, q_len - start, BM, BDV, False)
    stat = batch * stride_lb + h * stride_lh + row
    row_shift = tl.load(shift + stat + rows, mask=keep, other=float("inf"))
    row_delta = tl.load(delta + stat + rows, mask=keep, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    if WINDOWED:
        acc = _query_range(
            qt, gt, k, v, batch, k_row, hk, lo, hi, n0, n1, k_len, scale, row_shift, row_delta, acc, True, BN, BD, BDV
        )
    acc = _query_range(
        qt, gt, k, v, batch, k_row, hk, lo, hi, n1, n2, k_len, scale, row_shift, row_delta, acc, False, BN, BD, BDV
    )
    acc = _query_range(
        qt, gt, k, v, batch, k_row, hk, lo, hi, n2, n3, k_len, scale, row_shift, row_delta, acc, True, BN, BD, BDV
    )
    acc = gated(acc * softmax_scale, row_shift[:, None])
    out, dims = dq + batch * stride_db + row * stride_dt + h * stride_dh, tl.arange(0, BD)
    if add != 0:
        acc += load_rows(out, rows * stride_dt, dims, keep, D).to(tl.float32)
    store_tile(out, rows, stride_dt, dims, keep, acc, D)


@triton.jit
def _key_range(
    kt, vt, q, do, shift, delta, stride_q, stride_g, first, end, m0, m1, q_len, offset, scale, dk, dv,
    MASK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Queries ``m0 .. m1`` of one head into the gradients of a tile of keys and values."""
    rows = tl.arange(0, BM)
    for m in tl.range(m0, m1, BM):
        keep = m + rows < q_len if MASK else rows >= 0
        qt = load_rows(q + wide(m) * stride_q, rows * stride_q, tl.arange(0, BD), keep, D)  # [BM, BD]
        gt = load_rows(do + wide(m) * stride_g, rows * stride_g, tl.arange(0, BDV), keep, DV)  # [BM, BDV]
        row_shift = tl.load(shift + m + rows, mask=keep, other=float("inf"))
        row_delta = tl.load(delta + m + rows, mask=keep, other=0.0)
        p = gated(tl.exp2(dot(kt, qt.T) * scale - row_shift[None, :]), row_shift[None, :])  # [BN, BM]
        if MASK:
            pos = (offset + m + rows)[None, :]
            p = tl.where((pos >= first[:, None]) & (pos < end[:, None]), p, 0.0)
        dv = dot(p.to(gt.dtype), gt, dv)
        ds = p * (dot(vt, gt.T) - row_delta[None, :])
        dk = dot(ds.to(qt.dtype), qt, dk)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "tiles",
        "q_len",
        "k_len",
        "offset",
        "kv_heads",
        "group",
        "share",
        "length",
        "stride",
        "window",
        "stride_lb",
        "stride_lh",
    ]
)
def interval_dkv_kernel(
    q, k, v, do, shift, delta, dk, dv,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, stride_lb, stride_lh, stride_ds, stride_db, stride_dt, stride_es, stride_eb, stride_et,
    tiles, tile_seq, tile_first, table, q_len, k_len, offset, kv_heads, group, share,
    length, stride, window, scale, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    WINDOWED: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    part = tl.program_id(1)
    hk = pid % kv_heads
    # The first keys are seen by most queries: they go first.
    seq, tile = locate(pid // kv_heads, tiles, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * BN
    if start >= k_len:
        return
    keys = tl.arange(0, BN)
    row = k_row + start
    keep = start + keys < k_len
    kt = load_rows(k + batch * stride_kb + row * stride_kt + hk * stride_kh, keys * stride_kt, tl.arange(0, BD), keep, D)
    vt = load_rows(v + batch * stride_vb + row * stride_vt + hk * stride_vh, keys * stride_vt, tl.arange(0, BDV), keep, DV)
    # A key is seen by the positions first .. end - 1.
    first = (start + keys) * stride + length - 1
    end = first * 0 + offset + q_len
    last_key = tl.minimum(start + BN, k_len) - 1
    any_first, all_first = start * stride + length - 1, last_key * stride + length - 1
    any_end, all_end = offset + q_len, offset + q_len
    if WINDOWED:
        end = tl.minimum(end, start + keys + window)
        any_end, all_end = tl.minimum(any_end, last_key + window), tl.minimum(all_end, start + window)
    m0 = tl.maximum(any_first - offset, 0) // BM * BM
    m3 = tl.maximum(any_end - offset, 0)
    m1 = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(all_first - offset, 0), BM), tl.cdiv(m3, BM)) * BM, m0)
    m2 = tl.maximum(tl.maximum(all_end - offset, 0) // BM * BM, m1)

    dkt = tl.zeros([BN, BD], tl.float32)
    dvt = tl.zeros([BN, BDV], tl.float32)
    stat = batch * stride_lb + q_row
    for g in tl.range(part * share, tl.minimum(part * share + share, group)):
        h = hk * group + g
        qh = q + batch * stride_qb + q_row * stride_qt + h * stride_qh
        gh = do + batch * stride_gb + q_row * stride_gt + h * stride_gh
        shift_h = shift + stat + h * stride_lh
        delta_h = delta + stat + h * stride_lh
        dkt, dvt = _key_range(
            kt, vt, qh, gh, shift_h, delta_h, stride_qt, stride_gt, first, end, m0, m1, q_len, offset, scale, dkt, dvt,
            True, D, DV, BM, BD, BDV,
        )  # fmt: skip
        dkt, dvt = _key_range(
            kt, vt, qh, gh, shift_h, delta_h, stride_qt, stride_gt, first, end, m1, m2, q_len, offset, scale, dkt, dvt,
            False, D, DV, BM, BD, BDV,
        )  # fmt: skip
        dkt, dvt = _key_range(
            kt, vt, qh, gh, shift_h, delta_h, stride_qt, stride_gt, first, end, m2, m3, q_len, offset, scale, dkt, dvt,
            True, D, DV, BM, BD, BDV,
        )  # fmt: skip
    out_k = dk + part * stride_ds + batch * stride_db + row * stride_dt + hk * D
    out_v = dv + part * stride_es + batch * stride_eb + row * stride_et + hk * DV
    store_tile(out_k, keys, stride_dt, tl.arange(0, BD), keep, dkt * softmax_scale, D)
    store_tile(out_v, keys, stride_et, tl.arange(0, BDV), keep, dvt, DV)


def interval_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, spans: Spans,
    length: int, stride: int, window: int, softmax_scale: float, dq: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the queries, or ``dq`` with it added."""
    add = dq is not None
    dq = new_gradient(q, spans) if dq is None else dq
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    tune = tuning.interval_dq(q.shape[-1], v.shape[-1], q.dtype, window > 0, tuning.arch(q.device))
    tiles = spans.query_tiles(tune.block_m)
    if tiles.count:
        interval_dq_kernel[(tiles.count * heads,)](
            descriptor(q, tune.block_m), descriptor(k, tune.block_n), descriptor(v, tune.block_n),
            descriptor(do, tune.block_m), shift, delta, dq, int(add), *shift.stride()[:2], *dq.stride()[:3],
            tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
            heads, group, length, stride, window, softmax_scale * LOG2E.value, softmax_scale,
            BM=tune.block_m, BN=tune.block_n, **_shared(q, v, spans, window),
            num_warps=tune.num_warps, num_stages=tune.num_stages,
        )  # fmt: skip
    return dq


def interval_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, spans: Spans,
    length: int, stride: int, window: int, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of keys and values in shares of the group's heads: fp32 ``[shares, B, T, HK, D]`` and ``[.., DV]``."""
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    tune = tuning.interval_dkv(q.shape[-1], v.shape[-1], q.dtype, window > 0, tuning.arch(q.device))
    tiles = spans.key_tiles(tune.block_n)
    parts = tuning.head_shares(tiles.count * kv_heads, group)
    dk_parts, dv_parts = (new_shares(x, parts, q, spans) for x in (k, v))
    if tiles.count and q.shape[1]:
        interval_dkv_kernel[(tiles.count * kv_heads, parts)](
            q, k, v, do, shift, delta, dk_parts, dv_parts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *shift.stride()[:2],
            *dk_parts.stride()[:3], *dv_parts.stride()[:3],
            tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
            kv_heads, group, triton.cdiv(group, parts), length, stride, window, softmax_scale * LOG2E.value, softmax_scale,
            DV=v.shape[-1], BM=tune.block_m, BN=tune.block_n, **_shared(q, v, spans, window),
            num_warps=tune.num_warps, num_stages=tune.num_stages,
        )  # fmt: skip
    return dk_parts, dv_parts


def _shared(q: Tensor, v: Tensor, spans: Spans, window: int) -> dict[str, int]:
    """Constants of both kernels."""
    return {
        "D": q.shape[-1], "BD": tuning.padded_dim(q.shape[-1]), "BDV": tuning.padded_dim(v.shape[-1]),
        "WINDOWED": window > 0, "PACKED": spans.packed, "TABLE": spans.table is not None,
    }  # fmt: skip
