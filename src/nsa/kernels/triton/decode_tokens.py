"""The selected and the window branch of a decode step: one query's heads over a part of its blocks, or of its window.

Both are short and read tokens, so one launch has programs for each: some parts take tiles of the selected blocks through the
block table, the others tiles of the window out of the ring. These come first and need no selection: where launches may overlap
they run beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.decode_tuning import TokenSplits
from nsa.kernels.triton.decode_compressed import pool_place, store_part, stream_rows
from nsa.kernels.triton.dependent import dependents_may_start, launch_options, wait_for_inputs
from nsa.kernels.triton.tile import LOG2E, LOWEST, dot, load_rows, softmax_end, softmax_step, wide
from nsa.tuning import Tile

NEVER = tl.constexpr(0x7FFFFFFF)  # past every row of a page


@triton.jit(
    do_not_specialize=[
        "max_pages",
        "queries",
        "heads",
        "group",
        "kv_heads",
        "parts",
        "first_part",
        "selected_parts",
        "tiles",
        "n",
        "size",
        "window",
        "slots",
    ]
)
def decode_tokens_kernel(
    q, k_slc, v_slc, k_win, v_win, indices, table, lengths, o, lse,
    stride_ksp, stride_ksr, stride_ksh, stride_vsp, stride_vsr, stride_vsh,
    stride_kwp, stride_kwr, stride_kwh, stride_vwp, stride_vwr, stride_vwh,
    max_pages, queries, heads, group, kv_heads, parts, first_part, selected_parts, tiles, n, size, window, slots, scale,
    TILES: tl.constexpr, PER_PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    dependents_may_start(DEPENDENT)
    which, head_tile = tl.program_id(0), tl.program_id(1)
    part = tl.num_programs(2) - 1 - tl.program_id(2)  # the window's parts are the last
    hk, number = wide(which % kv_heads), which // kv_heads  # number: batch * queries + query
    batch, query = number // queries, number % queries
    head = head_tile * BM + tl.arange(0, BM)
    keep_row = head < group
    row = wide(number) * heads + hk * group + head
    pos = tl.load(lengths + batch) - queries + query
    qt = load_rows(q, row * D, tl.arange(0, BD), keep_row, D)
    m = tl.full([BM], LOWEST, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    # One loop for both branches: two would have twice the buffers in flight, and leave room for half the programs.
    windowed = part >= selected_parts
    if windowed:
        k, v = k_win + hk * stride_kwh, v_win + hk * stride_vwh
    else:
        k, v = k_slc + hk * stride_ksh, v_slc + hk * stride_vsh
        wait_for_inputs(DEPENDENT)
    # Where each tile starts and how much of it counts is known before the loop: keys whose address had to be loaded first would
    # be asked for late.
    first = tl.maximum(pos - window + 1, 0)
    count = tl.maximum(pos + 1 - first, 0)
    per_block = tl.cdiv(size, BN)
    begin = tl.where(windowed, part - selected_parts, part) * tiles
    stop = tl.minimum(begin + tiles, tl.where(windowed, tl.cdiv(count, BN), n * per_block))
    lane = tl.arange(0, TILES)
    tile = begin + lane
    block = tl.load(indices + wide(which) * n + tile // per_block, mask=tile < tl.where(windowed, begin, stop), other=-1)
    within = tile % per_block * BN
    token = tl.maximum(block, 0) * size + within
    count_slc = tl.where(block < 0, 0, tl.minimum(size - within, pos + 1 - token))
    page, start = pool_place(token, count_slc > 0, batch, table, max_pages, PER_PAGE)
    page = tl.where(windowed, wide(batch), page)
    start = tl.where(windowed, (first % slots + tile * BN) % slots, start)
    held = tl.where(windowed, count - tile * BN, count_slc)
    end = tl.where(windowed, slots, NEVER)  # a ring goes on at its first slot
    stride_kp, stride_kr = tl.where(windowed, stride_kwp, stride_ksp), tl.where(windowed, stride_kwr, stride_ksr)
    stride_vp, stride_vr = tl.where(windowed, stride_vwp, stride_vsp), tl.where(windowed, stride_vwr, stride_vsr)
    column = tl.arange(0, BN)
    for i in tl.range(0, stop - begin):
        at = tl.sum(tl.where(lane == i, start, 0), 0) + column
        at = tl.where(at >= end, at - slots, at)
        keep = column < tl.sum(tl.where(lane == i, held, 0), 0)
        # Pages are picked out, not their addresses: that these are multiples of 16 would not survive the sum.
        its_page = tl.sum(tl.where(lane == i, page, 0), 0)
        kt = stream_rows(k, its_page * stride_kp + at * stride_kr, tl.arange(0, BD), keep, D)  # [BN, BD]
        s = tl.where(keep[None, :], dot(qt, kt.T), float("-inf"))  # [BM, BN]
        vt = stream_rows(v, its_page * stride_vp + at * stride_vr, tl.arange(0, BDV), keep, DV)  # [BN, BDV]
        m, l, acc = softmax_step(s, scale, vt, m, l, acc)
    out, row_lse = softmax_end(m, l, acc)
    store_part(o, lse, row, first_part + part, parts, keep_row, out, row_lse, DV, BDV)


def decode_tokens(
    q: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, indices: Tensor, table: Tensor, lengths: Tensor,
    o: Tensor, lse: Tensor, first_part: int, splits: TokenSplits, tile: Tile, paged: bool, size: int, window: int,
    softmax_scale: float,
) -> None:  # fmt: skip
    """Parts ``first_part ..`` of o fp32 ``[B, TQ, HQ, parts, DV]`` and lse fp32 ``[B, TQ, HQ, parts]``: selected, then window.

    q ``[B, TQ, HQ, D]`` contiguous, k_slc ``[pages, P, HK, D]``, k_win ``[B, R, HK, D]``, values likewise, indices int32
    ``[B, TQ, HK, n]`` contiguous, table int32 ``[B, max_pages]``, lengths int32 ``[B]``.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, value_dim, group = k_slc.shape[2], v_slc.shape[-1], heads // k_slc.shape[2]
    grid = (batch * queries * kv_heads, triton.cdiv(group, tile.block_m), splits.selected + splits.window)
    dependent, options = launch_options(q.device)
    decode_tokens_kernel[grid](
        q, k_slc, v_slc, k_win, v_win, indices, table, lengths, o, lse,
        *(stride for x in (k_slc, v_slc, k_win, v_win) for stride in x.stride()[:3]), table.shape[1], queries, heads, group,
        kv_heads, lse.shape[-1], first_part, splits.selected, splits.tiles, indices.shape[-1], size, window,
        k_win.shape[1], softmax_scale * LOG2E.value,
        TILES=triton.next_power_of_2(splits.tiles), PER_PAGE=k_slc.shape[1] if paged else 0, D=dim, DV=value_dim,
        BM=tile.block_m, BN=tile.block_n, BD=tuning.padded_dim(dim), BDV=tuning.padded_dim(value_dim), DEPENDENT=dependent,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **options,
    )  # fmt: skip
