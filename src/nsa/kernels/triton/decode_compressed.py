"""The compressed branch of a decode step: all query rows of a KV head over a part of its blocks.

A part's output and lse go to a buffer, ``decode_merge`` adds the parts up; the scores are kept in fp32 for the selection, which
needs the lse of all parts first. Reading the keys twice would cost four times the bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.interval_forward import end_seen
from nsa.kernels.triton.tile import LOG2E, LOWEST, dot, load_rows, softmax_end, softmax_step, wide
from nsa.tuning import Tile


@triton.jit
def pool_rows(index, keep, batch, table, max_pages, rows, PER_PAGE: tl.constexpr):
    """Where rows ``index`` of a sequence lie in a pool of pages of ``rows`` rows.

    ``PER_PAGE`` is the same number, compiled in; 0 says that page ``batch`` holds them all.
    """
    if PER_PAGE > 0:
        page = tl.load(table + batch * max_pages + index // PER_PAGE, mask=keep, other=0)
        return page.to(tl.int64) * PER_PAGE + index % PER_PAGE
    else:
        return wide(batch) * rows + index


@triton.jit
def stream_rows(base, offsets, dims, keep, DIM: tl.constexpr):
    """``load_rows`` of what nobody reads again: it should not push out of the L2 what somebody does."""
    inside = keep[:, None] & (dims < DIM)[None, :]
    return tl.load(base + offsets[:, None] + dims[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def store_part(o, lse, row, part, parts, keep, out, row_lse, DV: tl.constexpr, BDV: tl.constexpr):
    """One part's output and lse of the query rows ``row``: o ``[rows, parts, DV]``, lse ``[rows, parts]``."""
    dims = tl.arange(0, BDV)
    at = row * parts + part
    tl.store(o + at[:, None] * DV + dims[None, :], out, mask=keep[:, None] & (dims < DV)[None, :])
    tl.store(lse + at, row_lse, mask=keep)


@triton.jit(
    do_not_specialize=[
        "max_pages",
        "rows",
        "queries",
        "heads",
        "group",
        "kv_heads",
        "parts",
        "splits",
        "length",
        "stride",
        "blocks",
    ]
)
def decode_compressed_kernel(
    q, k, v, table, lengths, o, lse, scores,
    max_pages, rows, queries, heads, group, kv_heads, parts, splits, length, stride, blocks, scale,
    PER_PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    part, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, hk = pair // kv_heads, pair % kv_heads
    number = tile * BM + tl.arange(0, BM)  # of a query row among those of this KV head: query by query, head by head
    keep = number < queries * group
    query = number // group
    row = wide(batch * queries) * heads + query * heads + hk * group + number % group
    pos = tl.load(lengths + batch) - queries + query
    seen = end_seen(pos, length, stride, blocks)
    stop = end_seen(tl.load(lengths + batch) - 1, length, stride, blocks)
    size = tl.cdiv(tl.cdiv(stop, BN), splits) * BN
    start = part * size
    stop = tl.minimum(start + size, stop)

    dims, dims_v = tl.arange(0, BD), tl.arange(0, BDV)
    m = tl.full([BM], LOWEST, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    if start < stop:
        qt = load_rows(q, row * D, dims, keep, D)  # [BM, BD]
        lead = length // stride - 1
        for n in tl.range(start, stop, BN):
            block = n + tl.arange(0, BN)
            inside = block < stop
            at = pool_rows(block + lead, inside, batch, table, max_pages, rows, PER_PAGE) * kv_heads + hk
            kt = stream_rows(k, at * D, dims, inside, D)  # [BN, BD]
            s = dot(qt, kt.T)  # [BM, BN]
            at_scores = scores + row[:, None] * blocks + block[None, :]
            tl.store(at_scores, s, mask=keep[:, None] & inside[None, :], eviction_policy="evict_last")
            s = tl.where(inside[None, :] & (block[None, :] < seen[:, None]), s, float("-inf"))
            vt = stream_rows(v, at * DV, dims_v, inside, DV)  # [BN, BDV]
            m, l, acc = softmax_step(s, scale, vt, m, l, acc)
    out, row_lse = softmax_end(m, l, acc)
    store_part(o, lse, row, part, parts, keep, out, row_lse, DV, BDV)


def decode_compressed(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, o: Tensor, lse: Tensor, scores: Tensor,
    splits: int, tile: Tile, paged: bool, length: int, stride: int, softmax_scale: float,
) -> None:  # fmt: skip
    """Parts ``0 .. splits - 1`` of o fp32 ``[B, TQ, HQ, parts, DV]`` and lse fp32 ``[B, TQ, HQ, parts]``; the raw products go
    to scores fp32 ``[B, TQ, HQ, blocks]``.

    q ``[B, TQ, HQ, D]`` contiguous, k ``[pages, rows, HK, D]``, v likewise, table int32 ``[B, max_pages]``, lengths int32
    ``[B]``.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, value_dim, group = k.shape[2], v.shape[-1], heads // k.shape[2]
    decode_compressed_kernel[(splits, triton.cdiv(queries * group, tile.block_m), batch * kv_heads)](
        q, k, v, table, lengths, o, lse, scores, table.shape[1], k.shape[1], queries, heads, group, kv_heads,
        lse.shape[-1], splits, length, stride, scores.shape[-1], softmax_scale * LOG2E.value,
        PER_PAGE=k.shape[1] if paged else 0, D=dim, DV=value_dim, BM=tile.block_m, BN=tile.block_n,
        BD=tuning.padded_dim(dim), BDV=tuning.padded_dim(value_dim), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
