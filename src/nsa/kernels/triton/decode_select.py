"""The selection of a decode step: block importance out of the kept weights, then the ``n`` blocks of every query.

A weight refers to the maximum that was known when it was kept. Both together and the lse of all parts make a probability. A
program adds up the importance of some blocks and chooses ``n`` of them. Where there are more of these programs for a query, the
next launch chooses among what they chose: the ``n`` highest of all blocks are among the ``n`` highest of their chunks, and so
are the lowest of those that tie. A query before the first token, which a graph's first run without an append has, is told that
there are none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import decode_tuning
from nsa.decode_tuning import Cells
from nsa.kernels.triton.dependent import dependents_may_start, launch_options, wait_for_inputs
from nsa.kernels.triton.interval_forward import end_seen
from nsa.kernels.triton.tile import LOG2E, wide
from nsa.kernels.triton.top_n import ranked, store_top_n

TILE = 2048  # heads by selection blocks, looked at together
# Threads that hold the same sum must agree on its last bit: none may fuse its own product with another's sum.
UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def own_block(pos, size):
    """The selection block of position ``pos``; -1 before the first token."""
    return tl.where(pos < 0, -1, tl.maximum(pos, 0) // size)


@triton.jit
def _load_kept(
    weights, edges, peaks, lse, first_row, turn, u, count, group, parts, splits, tiles, cells,
    BC: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """What was kept of ``BG`` heads and a cell of each selection block, in one turn: the lse of all parts, the weights with the
    maximum that they refer to, and the same of what the tile before hands on. No load waits for another."""
    part, cell = tl.arange(0, BP), tl.arange(0, BC)
    head = turn // cells * BG + tl.arange(0, BG)
    row = first_row + head
    t = u * cells + turn % cells
    before = t - cells
    keep = (head < group)[:, None]
    inside = keep & (t < count)[None, :]
    handed = keep & ((before >= 0) & (before < count))[None, :]
    at, at_before = row[:, None] * tiles + t[None, :], row[:, None] * tiles + before[None, :]
    each = tl.load(lse + row[:, None] * parts + part[None, :], mask=keep & (part < splits)[None, :], other=float("-inf"))
    x = tl.load(weights + at[:, :, None] * BC + cell[None, None, :], mask=inside[:, :, None], other=0.0)  # [BG, NT, BC]
    peak = tl.load(peaks + at, mask=inside, other=float("-inf"))
    edge = tl.load(edges + at_before, mask=handed, other=0.0)
    edge_peak = tl.load(peaks + at_before, mask=handed, other=float("-inf"))
    return each, x, peak, edge, edge_peak


@triton.jit
def _importance(
    weights, edges, peaks, lse, first_row, stop, u0, group, parts, splits, tiles,
    per_block, cells, BC: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """P of ``BJ`` selection blocks from ``u0 * BC`` on to the ``group`` heads from ``first_row`` on: fp32 ``[BJ]``.

    ``stop`` compressed blocks are kept, in tiles of ``BC`` selection blocks, or of one of the ``cells`` of one. With ``AHEAD``
    1 rather than 0 a turn's loads come before the turn before it: that hides memory's time, and takes more registers.
    """
    NT: tl.constexpr = BJ // BC
    cell = tl.arange(0, BC)
    u = u0 + tl.arange(0, NT)
    count = tl.cdiv(tl.cdiv(stop, per_block) * cells, BC)
    total = tl.zeros([NT, BC], tl.float32)
    handed = tl.zeros([NT], tl.float32)
    if AHEAD:
        each, x, peak, edge, edge_peak = _load_kept(
            weights, edges, peaks, lse, first_row, 0, u, count, group, parts, splits, tiles, cells, BC, BG, BP
        )
    for turn in tl.range(0, tl.cdiv(group, BG) * cells):
        following = _load_kept(
            weights, edges, peaks, lse, first_row, turn + AHEAD, u, count, group, parts, splits, tiles, cells, BC, BG, BP
        )
        if not AHEAD:
            each, x, peak, edge, edge_peak = following
        each *= LOG2E  # [BG, BP]
        most = tl.maximum(tl.max(each, 1), -1.0e30)
        row_lse = (most + tl.log2(tl.maximum(tl.sum(tl.exp2(each - most[:, None]), 1), 1.0e-30)))[:, None]
        total += tl.sum(x * tl.exp2(peak - row_lse)[:, :, None], 0)
        handed += tl.sum(edge * tl.exp2(edge_peak - row_lse), 0)
        if AHEAD:
            each, x, peak, edge, edge_peak = following
    return tl.reshape(total + tl.where(cell[None, :] == 0, handed[:, None], 0.0), [BJ])


@triton.jit(
    do_not_specialize=[
        "queries",
        "heads",
        "group",
        "kv_heads",
        "parts",
        "splits",
        "tiles",
        "length",
        "stride",
        "size",
        "cells",
        "n",
        "num_initial",
        "num_local",
    ]
)
def decode_choose_kernel(
    weights, edges, peaks, lse, lengths, importance, out, queries, heads, group, kv_heads, parts, splits, tiles, length, stride,
    size, cells, selection, n, num_initial, num_local,
    BC: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr,
    AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    dependents_may_start(DEPENDENT)  # not before: the window's programs should read while this one computes
    chunk, which = tl.program_id(0), tl.program_id(1)
    hk, number = which % kv_heads, which // kv_heads
    tokens = tl.load(lengths + number // queries)
    last = own_block(tokens - queries + number % queries, size)
    first = chunk * BJ
    out += (wide(which) * tl.num_programs(0) + chunk) * n
    if first <= last:
        per_block = size // stride
        stop = end_seen(tokens - 1, length, stride, tiles * BC // cells * per_block)
        row = wide(number) * heads + hk * group
        p = _importance(
            weights, edges, peaks, lse, row, stop, first // BC, group, parts, splits, tiles, per_block, cells,
            BC, BG, BP, BJ, AHEAD,
        )  # fmt: skip
        j = first + tl.arange(0, BJ)
        tl.store(importance + wide(which) * selection + j, p, mask=j < selection)
        own = last + tl.zeros([1], tl.int32)
        rank = ranked(p[None, :], j, own, own >= 0, num_initial, num_local)
        store_top_n(
            rank, j[None, :], importance, row, own - first, own >= 0, out + tl.zeros([1, 1], tl.int64), 0, 1, selection, n,
            num_initial, num_local, 1, BJ, BN, GROUPS, True,
        )  # fmt: skip
    else:  # a cache has room for more than it holds
        place = tl.arange(0, BN)
        tl.store(out + place, tl.full([BN], -1, tl.int32), mask=place < n)


@triton.jit(do_not_specialize=["queries", "kv_heads", "count", "size", "n", "num_initial", "num_local"])
def decode_choose_again_kernel(
    importance, chosen, lengths, out, queries, kv_heads, count, selection, size, n, num_initial, num_local,
    BJ: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    dependents_may_start(DEPENDENT)
    wait_for_inputs(DEPENDENT)
    chunk, which = tl.program_id(0), tl.program_id(1)
    number = which // kv_heads
    own = own_block(tl.load(lengths + number // queries) - queries + number % queries, size) + tl.zeros([1], tl.int32)
    at = chunk * BJ + tl.arange(0, BJ)
    j = tl.load(chosen + wide(which) * count + at, mask=at < count, other=-1)
    p = tl.load(importance + wide(which) * selection + j, mask=j >= 0, other=0.0)
    rank = tl.where(j[None, :] >= 0, ranked(p[None, :], j, own, own >= 0, num_initial, num_local), -1)
    held = tl.sum((rank >= 0).to(tl.int32), 1)
    place = (wide(which) * tl.num_programs(0) + chunk) * n + tl.zeros([1, 1], tl.int64)
    always = tl.full([1], True, tl.int1)
    store_top_n(
        rank, j[None, :], importance, place, held - 1, always, out + place, 0, 1, selection, n, num_initial, num_local,
        1, BJ, BN, GROUPS, True,
    )  # fmt: skip


def decode_select(
    kept: tuple[Tensor, ...], lse: Tensor, lengths: Tensor, importance: Tensor, out: Tensor, splits: int, cells: Cells,
    length: int, stride: int, size: int, num_initial: int, num_local: int, alone: bool,
) -> None:  # fmt: skip
    """P into importance fp32 ``[B, TQ, HK, M]``, and the blocks of every query into out int32 ``[B, TQ, HK, n]``.

    kept: what ``decode_compressed`` kept; the first ``splits`` of lse fp32 ``[B, TQ, HQ, parts]`` are its softmax's. ``alone``:
    nothing else runs meanwhile that could take the multiprocessors' registers.
    """
    batch, queries, heads, parts = lse.shape
    kv_heads, selection = importance.shape[2:]
    n, group, rows = out.shape[-1], heads // kv_heads, batch * queries * kv_heads
    dependent, options = launch_options(lse.device)
    told = {"BN": triton.next_power_of_2(n), "GROUPS": triton.next_power_of_2(n), "DEPENDENT": dependent, **options}
    width, warps = decode_tuning.ranking(n, False, selection, cells.per_tile)
    chunks = triton.cdiv(selection, width)
    chosen = out if chunks == 1 else out.new_empty(*out.shape[:3], chunks, n)
    decode_choose_kernel[(chunks, rows)](
        *kept, lse, lengths, importance, chosen, queries, heads, group, kv_heads, parts, splits, cells.tiles, length, stride,
        size, cells.per_block, selection, n, num_initial, num_local, BC=cells.per_tile, BJ=width,
        BG=max(1, min(TILE // width, triton.next_power_of_2(group))), BP=triton.next_power_of_2(splits),
        AHEAD=int(alone), num_warps=warps, **UNFUSED, **told,
    )  # fmt: skip
    while chunks > 1:
        count = chunks * n
        width, warps = decode_tuning.ranking(n, True, count)
        chunks = triton.cdiv(count, width)
        before, chosen = chosen, out if chunks == 1 else out.new_empty(*out.shape[:3], chunks, n)
        decode_choose_again_kernel[(chunks, rows)](
            importance, before, lengths, chosen, queries, kv_heads, count, selection, size, n, num_initial, num_local,
            BJ=width, num_warps=warps, **told,
        )  # fmt: skip
