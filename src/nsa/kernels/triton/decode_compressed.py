"""The compressed branch of a decode step: all query rows of a KV head over a part of its blocks.

A part's output and lse go to a buffer, ``decode_merge`` adds the parts up. The selection needs the probabilities, and these the
lse of all parts; so each tile's weights are kept, added up over the blocks of a cell, with the maximum that they refer to. That
is less than the scores, and reading the keys twice would cost four times the bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.decode_tuning import Cells
from nsa.kernels.triton.dependent import dependents_may_start, launch_options, wait_for_inputs
from nsa.kernels.triton.interval_forward import end_seen
from nsa.kernels.triton.tile import LOG2E, LOWEST, dot, load_rows, softmax_end, weighted_softmax_step, wide
from nsa.tuning import Tile


@triton.jit
def pool_place(index, keep, batch, table, max_pages, PER_PAGE: tl.constexpr):
    """In which page, and which row of it, rows ``index`` of a sequence lie.

    ``PER_PAGE`` rows make a page; 0 says that page ``batch`` holds them all.
    """
    if PER_PAGE > 0:
        page = tl.load(table + batch * max_pages + index // PER_PAGE, mask=keep, other=0)
        return page.to(tl.int64), (index % PER_PAGE).to(tl.int64)
    else:
        return tl.zeros_like(index).to(tl.int64) + batch, index.to(tl.int64)


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
        "queries",
        "heads",
        "group",
        "kv_heads",
        "parts",
        "splits",
        "tiles",
        "length",
        "stride",
        "per_block",
        "cells",
    ]
)
def decode_compressed_kernel(
    q, k, v, table, lengths, o, lse, weights, edges, peaks,
    stride_kp, stride_kr, stride_kh, stride_vp, stride_vr, stride_vh,
    max_pages, queries, heads, group, kv_heads, parts, splits, tiles, length, stride, per_block, cells, scale,
    CELL: tl.constexpr, PER_PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    dependents_may_start(DEPENDENT)
    part, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, hk = pair // kv_heads, wide(pair % kv_heads)
    number = tile * BM + tl.arange(0, BM)  # of a query row among those of this KV head: query by query, head by head
    keep = number < queries * group
    query = number // group
    row = wide(batch * queries) * heads + query * heads + hk * group + number % group
    pos = tl.load(lengths + batch) - queries + query
    BC: tl.constexpr = BN // CELL  # cells of a tile
    most = tiles * BC // cells * per_block
    seen = end_seen(pos, length, stride, most)
    stop = end_seen(tl.load(lengths + batch) - 1, length, stride, most)
    first, last = part_of_tiles(part, splits, stop, per_block, cells, BC)

    dims, dims_v = tl.arange(0, BD), tl.arange(0, BDV)
    column, cell = tl.arange(0, BN), tl.arange(0, BC)
    m = tl.full([BM], LOWEST, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    if first < last:
        qt = load_rows(q, row * D, dims, keep, D)  # [BM, BD]
        lead = length // stride - 1
        for t in tl.range(first, last):
            # A block's place among those that start in its selection block, which a tile holds some of or a part of one.
            if BC > 1:
                place = column % CELL
                block = (t * BC + column // CELL) * per_block + place
            else:
                place = t % cells * CELL + column
                block = t // cells * per_block + place
            inside = (place < per_block) & (block < stop)
            page, at = pool_place(block + lead, inside, batch, table, max_pages, PER_PAGE)
            kt = stream_rows(k, page * stride_kp + at * stride_kr + hk * stride_kh, dims, inside, D)  # [BN, BD]
            s = dot(qt, kt.T)  # [BM, BN]
            s = tl.where(inside[None, :] & (block[None, :] < seen[:, None]), s, float("-inf"))
            vt = stream_rows(v, page * stride_vp + at * stride_vr + hk * stride_vh, dims_v, inside, DV)  # [BN, BDV]
            p, m, l, acc = weighted_softmax_step(s, scale, vt, m, l, acc)
            strides = tl.minimum(
                per_block - place, lead + 1
            )  # of a block that lie in its own selection block, the others follow
            weight = tl.sum(tl.reshape(p * strides[None, :], [BM, BC, CELL]), 2)
            following = tl.sum(tl.reshape(p * (lead + 1 - strides)[None, :], [BM, BC, CELL]), 2)
            if BC > 1:
                before = tl.gather(following, tl.broadcast_to(tl.maximum(cell - 1, 0)[None, :], [BM, BC]), 1)
                weight += tl.where(cell[None, :] > 0, before, 0.0)
            tl.store(weights + (row * tiles + t)[:, None] * BC + cell[None, :], weight, mask=keep[:, None])
            tl.store(edges + row * tiles + t, tl.sum(tl.where(cell[None, :] == BC - 1, following, 0.0), 1), mask=keep)
            tl.store(peaks + row * tiles + t, m, mask=keep)
    out, row_lse = softmax_end(m, l, acc)
    store_part(o, lse, row, part, parts, keep, out, row_lse, DV, BDV)


@triton.jit
def part_of_tiles(part, splits, stop, per_block, cells, BC: tl.constexpr):
    """The tiles of a part where ``stop`` compressed blocks are seen."""
    count = tl.cdiv(tl.cdiv(stop, per_block) * cells, BC)
    size = tl.cdiv(count, splits)
    return part * size, tl.minimum(part * size + size, count)


def decode_compressed(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, o: Tensor, lse: Tensor, kept: tuple[Tensor, ...],
    splits: int, tile: Tile, cells: Cells, paged: bool, length: int, stride: int, size: int, softmax_scale: float,
) -> None:  # fmt: skip
    """Parts ``0 .. splits - 1`` of o fp32 ``[B, TQ, HQ, parts, DV]`` and lse fp32 ``[B, TQ, HQ, parts]``.

    q ``[B, TQ, HQ, D]`` contiguous, k ``[pages, rows, HK, D]``, v likewise, table int32 ``[B, max_pages]``, lengths int32
    ``[B]``. kept, in fp32: the weights of each cell's selection block ``[B, TQ, HQ, cells]``, what each tile hands to the first
    one of the next, and the maximum that a tile's weights refer to, in units of log2, both ``[B, TQ, HQ, tiles]``.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, value_dim, group = k.shape[2], v.shape[-1], heads // k.shape[2]
    dependent, options = launch_options(q.device)
    decode_compressed_kernel[(splits, triton.cdiv(queries * group, tile.block_m), batch * kv_heads)](
        q, k, v, table, lengths, o, lse, *kept, *k.stride()[:3], *v.stride()[:3],
        table.shape[1], queries, heads, group, kv_heads, lse.shape[-1], splits, cells.tiles, length, stride, size // stride,
        cells.per_block, softmax_scale * LOG2E.value,
        CELL=cells.width, PER_PAGE=k.shape[1] if paged else 0, D=dim, DV=value_dim,
        BM=tile.block_m, BN=tile.block_n, BD=tuning.padded_dim(dim), BDV=tuning.padded_dim(value_dim), DEPENDENT=dependent,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **options,
    )  # fmt: skip
