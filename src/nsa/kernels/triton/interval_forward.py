"""Attention in which every query sees one interval of the keys: the compressed branch and the window.

A key ``i`` stands for tokens ``i * stride .. i * stride + length - 1`` and is seen once they all lie at or before the
query: compressed blocks with the configuration's length and stride, plain tokens with 1 and 1. ``window > 0`` also hides
tokens that lie ``window`` or more behind. One program takes ``BM`` queries of one head over that interval, first the tiles
that all of them see whole, then the ragged ones with a mask.

Source: the online softmax of FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.sequence import Spans, locate, span
from nsa.kernels.triton.tile import LOG2E, LOWEST, descriptor, dot, load_rows, load_tile, softmax_end, softmax_step, store_tile


@triton.jit
def first_seen(pos, window, WINDOWED: tl.constexpr):
    """The first key that a query at ``pos`` sees."""
    if WINDOWED:
        return tl.maximum(pos - window + 1, 0)
    else:
        return pos * 0


@triton.jit
def end_seen(pos, length, stride, k_len):
    """One past the last key that a query at ``pos`` sees."""
    return tl.minimum(tl.where(pos >= length - 1, (pos - length + 1) // stride + 1, 0), k_len)


@triton.jit
def seen_by_tile(first, last, length, stride, window, k_len, BN: tl.constexpr, WINDOWED: tl.constexpr):
    """Keys that the queries at ``first .. last`` see, cut at tiles of ``BN``: ``n0 .. n1`` and ``n2 .. n3`` are seen by some,
    ``n1 .. n2`` by all."""
    n3 = end_seen(last, length, stride, k_len)
    n0 = first_seen(first, window, WINDOWED) // BN * BN
    n1 = n0
    if WINDOWED:
        n1 = tl.minimum(tl.cdiv(first_seen(last, window, WINDOWED), BN), tl.cdiv(n3, BN)) * BN
    n2 = tl.maximum(end_seen(first, length, stride, k_len) // BN * BN, n1)
    return n0, n1, n2, n3


@triton.jit
def _range(
    qt, k, v, batch, k_row, hk, lo, hi, n0, n1, k_len, scale, m, l, acc,
    MASK: tl.constexpr, WINDOWED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Keys ``n0 .. n1`` into the running softmax; with ``MASK`` each row only its own ``lo .. hi``."""
    # The ragged end of the compressed branch is a tile or two: a pipeline there gained nothing.
    for n in tl.range(n0, n1, BN, num_stages=1 if MASK and not WINDOWED else None):
        kt = load_tile(k, batch, k_row + n, hk, k_len - n, BN, BD, False)
        s = dot(qt, kt.T)  # [BM, BN]
        if MASK:
            keys = (n + tl.arange(0, BN))[None, :]
            s = tl.where((keys >= lo[:, None]) & (keys < hi[:, None]), s, float("-inf"))
        vt = load_tile(v, batch, k_row + n, hk, k_len - n, BN, BDV, MASK)
        m, l, acc = softmax_step(s, scale, vt, m, l, acc)
    return m, l, acc


@triton.jit(
    do_not_specialize=[
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
def interval_forward_kernel(
    q, k, v, o, lse, stride_qb, stride_qt, stride_qh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    tiles, tile_seq, tile_first, table, q_len, k_len, offset, heads, group, length, stride, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    WINDOWED: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = pid % heads
    # The last queries see most: they go first, so that the end of the launch is made of short programs.
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
    if WINDOWED:
        qt = load_tile(q, batch, row, h, q_len - start, BM, BD, False)
    else:
        # By pointers the tile goes to shared memory; by a descriptor it would stay in registers, which a long loop misses.
        qt = load_rows(q + batch * stride_qb + row * stride_qt + h * stride_qh, rows * stride_qt, tl.arange(0, BD), keep, D)
    m = tl.full([BM], LOWEST, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    if WINDOWED:
        m, l, acc = _range(qt, k, v, batch, k_row, hk, lo, hi, n0, n1, k_len, scale, m, l, acc, True, WINDOWED, BN, BD, BDV)
    m, l, acc = _range(qt, k, v, batch, k_row, hk, lo, hi, n1, n2, k_len, scale, m, l, acc, False, WINDOWED, BN, BD, BDV)
    m, l, acc = _range(qt, k, v, batch, k_row, hk, lo, hi, n2, n3, k_len, scale, m, l, acc, True, WINDOWED, BN, BD, BDV)

    out, row_lse = softmax_end(m, l, acc)
    store_tile(o + batch * stride_ob + row * stride_ot + h * stride_oh, rows, stride_ot, tl.arange(0, BDV), keep, out, DV)
    tl.store(lse + batch * stride_lb + h * stride_lh + row + rows, row_lse, mask=keep)


def interval_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, length: int, stride: int, window: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """q ``[B, TQ, HQ, D]``, k ``[B, T, HK, D]``, v ``[B, T, HK, DV]``: o ``[B, TQ, HQ, DV]`` and lse fp32 ``[B, HQ, TQ]``."""
    batch, rows, heads, dim = q.shape
    value_dim = v.shape[-1]
    o = torch.empty(batch, rows, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if spans.packed:  # rows that belong to no sequence are written by nobody
        o.zero_()
        lse.fill_(float("-inf"))
    tune = tuning.interval_forward(dim, value_dim, q.dtype, window > 0, tuning.arch(q.device))
    tiles = spans.query_tiles(tune.block_m)
    if tiles.count == 0:
        return o, lse
    interval_forward_kernel[(tiles.count * heads,)](
        descriptor(q, tune.block_m) if window else q, descriptor(k, tune.block_n), descriptor(v, tune.block_n), o, lse,
        *q.stride()[:3], *o.stride()[:3], *lse.stride()[:2],
        tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
        heads, heads // k.shape[2], length, stride, window, softmax_scale * LOG2E.value,
        D=dim, DV=value_dim, BM=tune.block_m, BN=tune.block_n, BD=tuning.padded_dim(dim), BDV=tuning.padded_dim(value_dim),
        WINDOWED=window > 0, PACKED=spans.packed, TABLE=spans.table is not None,
        num_warps=tune.num_warps, num_stages=tune.num_stages,
    )  # fmt: skip
    return o, lse
