"""The selection of a decode step: block importance out of the kept weights, then the ``n`` blocks of every query.

A weight refers to the maximum that was known when it was kept. Both together and the lse of all parts make a probability. Where
the blocks are few, the program that ranks them adds up their importance too; else that is a launch of its own.
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

TILE = 16384  # heads by selection blocks, looked at together


@triton.jit
def own_block(pos, size):
    """The selection block of position ``pos``; -1 before the first token."""
    return tl.where(pos < 0, -1, tl.maximum(pos, 0) // size)


@triton.jit
def _tile_weights(x, peaks, row, t, row_lse, inside, tiles):
    """``x [.., tiles]``, or 1, of heads ``row`` and tiles ``t`` as probabilities ``[rows, len(t)]``; 0 where not ``inside``."""
    at = row[:, None] * tiles + t[None, :]
    factor = tl.exp2(tl.load(peaks + at, mask=inside, other=float("-inf")) - row_lse[:, None])
    return factor if x is None else factor * tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def _importance(
    weights, edges, peaks, lse, first_row, stop, u0, group, parts, splits, tiles,
    PER: tl.constexpr, CELLS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """P of ``BJ`` selection blocks from ``u0 * BC`` on to the ``group`` heads from ``first_row`` on: fp32 ``[BJ]``.

    ``stop`` compressed blocks are kept, in tiles of ``BC`` selection blocks, or of a ``CELLS``-th of one.
    """
    NT: tl.constexpr = BJ // BC
    part, cell = tl.arange(0, BP), tl.arange(0, BC)
    u = u0 + tl.arange(0, NT)
    count = tl.cdiv(tl.cdiv(stop, PER) * CELLS, BC)
    total = tl.zeros([NT, BC], tl.float32)
    edge = tl.zeros([NT], tl.float32)
    for g in tl.range(0, group, BG):
        keep = g + tl.arange(0, BG) < group
        row = first_row + g + tl.arange(0, BG)
        each = tl.load(
            lse + row[:, None] * parts + part[None, :], mask=keep[:, None] & (part < splits)[None, :], other=float("-inf")
        )
        each *= LOG2E  # [BG, BP]
        most = tl.maximum(tl.max(each, 1), -1.0e30)
        row_lse = most + tl.log2(tl.maximum(tl.sum(tl.exp2(each - most[:, None]), 1), 1.0e-30))
        for i in tl.static_range(CELLS):
            t = u * CELLS + i
            inside = keep[:, None] & (t < count)[None, :]
            at = (row[:, None] * tiles + t[None, :])[:, :, None] * BC + cell[None, None, :]
            x = tl.load(weights + at, mask=inside[:, :, None], other=0.0)  # [BG, NT, BC]
            total += tl.sum(x * _tile_weights(None, peaks, row, t, row_lse, inside, tiles)[:, :, None], 0)
            before = t - CELLS
            inside = keep[:, None] & ((before >= 0) & (before < count))[None, :]
            edge += tl.sum(_tile_weights(edges, peaks, row, before, row_lse, inside, tiles), 0)
    return tl.reshape(total + tl.where(cell[None, :] == 0, edge[:, None], 0.0), [BJ])


@triton.jit(do_not_specialize=["queries", "heads", "group", "kv_heads", "parts", "splits", "tiles", "length", "stride"])
def decode_importance_kernel(
    weights, edges, peaks, lse, lengths, out, queries, heads, group, kv_heads, parts, splits, tiles, length, stride, selection,
    PER: tl.constexpr, CELLS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    dependents_may_start(DEPENDENT)
    wait_for_inputs(DEPENDENT)
    first, which = tl.program_id(0) * BJ, tl.program_id(1)
    hk, number = which % kv_heads, which // kv_heads
    tokens = tl.load(lengths + number // queries)
    if first > own_block(tokens - queries + number % queries, PER * stride):
        return
    stop = end_seen(tokens - 1, length, stride, tiles * BC // CELLS * PER)
    j = first + tl.arange(0, BJ)
    row = wide(number) * heads + hk * group
    p = _importance(weights, edges, peaks, lse, row, stop, first // BC, group, parts, splits, tiles, PER, CELLS, BC, BG, BP, BJ)
    tl.store(out + wide(which) * selection + j, p, mask=j < selection)


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
        "n",
        "num_initial",
        "num_local",
    ]
)
def decode_top_n_kernel(
    weights, edges, peaks, lse, importance, lengths, out,
    queries, heads, group, kv_heads, parts, splits, tiles, length, stride, selection, n, num_initial, num_local,
    PER: tl.constexpr, CELLS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr,
    BN: tl.constexpr, GROUPS: tl.constexpr, FUSED: tl.constexpr, WHOLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    dependents_may_start(DEPENDENT)  # not before: the window's programs should read while this one computes
    which = tl.program_id(0)
    hk, number = which % kv_heads, which // kv_heads
    tokens = tl.load(lengths + number // queries)
    mine = own_block(tokens - queries + number % queries, PER * stride)
    row, last, keep = (
        (wide(which) + tl.zeros([1], tl.int64)),
        mine + tl.zeros([1], tl.int32),
        mine + tl.zeros([1], tl.int32) >= 0,
    )
    j = tl.arange(0, BJ)
    rank = tl.zeros([1, BJ], tl.int32)
    if FUSED:
        stop = end_seen(tokens - 1, length, stride, tiles * BC // CELLS * PER)
        first_row = wide(number) * heads + hk * group
        p = _importance(weights, edges, peaks, lse, first_row, stop, 0, group, parts, splits, tiles, PER, CELLS, BC, BG, BP, BJ)
        rank = ranked(p[None, :], j, last, keep, num_initial, num_local)
    elif WHOLE:
        p = tl.load(importance + wide(which) * selection + j, mask=(j <= mine) & (j < selection), other=0.0)
        rank = ranked(p[None, :], j, last, keep, num_initial, num_local)
    store_top_n(
        rank, importance, row, last, keep, out + (row * n)[:, None], 0, 1, selection, n, num_initial, num_local,
        1, BJ, BN, GROUPS, WHOLE,
    )  # fmt: skip


def decode_select(
    kept: tuple[Tensor, ...], lse: Tensor, lengths: Tensor, importance: Tensor | None, out: Tensor, selection: int, splits: int,
    cells: Cells, length: int, stride: int, size: int, num_initial: int, num_local: int,
) -> None:  # fmt: skip
    """The blocks of every query, of at most ``selection``, into out int32 ``[B, TQ, HK, n]``.

    kept: what ``decode_compressed`` kept; the first ``splits`` of lse fp32 ``[B, TQ, HQ, parts]`` are its softmax's.
    importance: fp32 ``[B, TQ, HK, selection]`` for what ``decode_tuning.FUSED`` blocks don't hold, else None.
    """
    batch, queries, heads, parts = lse.shape
    kv_heads, n = out.shape[2:]
    fused, width = importance is None, triton.next_power_of_2(max(selection, 16, n, cells.per_tile))
    dependent, options = launch_options(lse.device)
    if importance is not None:
        decode_importance(kept, lse, lengths, importance, splits, cells, length, stride, size)
        width = min(width, decode_tuning.WIDEST)
    decode_top_n_kernel[(batch * queries * kv_heads,)](
        *kept, lse, importance, lengths, out, queries, heads, heads // kv_heads, kv_heads, parts, splits, cells.tiles,
        length, stride, selection, n, num_initial, num_local,
        PER=size // stride, CELLS=cells.per_block, BC=cells.per_tile, **_heads(heads // kv_heads, splits, width),
        BN=triton.next_power_of_2(n), GROUPS=min(width, triton.next_power_of_2(n)), FUSED=fused, WHOLE=selection <= width,
        DEPENDENT=dependent, num_warps=8 if fused else decode_tuning.ranking_warps(width), **options,
    )  # fmt: skip


def decode_importance(
    kept: tuple[Tensor, ...], lse: Tensor, lengths: Tensor, out: Tensor, splits: int, cells: Cells,
    length: int, stride: int, size: int,
) -> None:  # fmt: skip
    """P into out fp32 ``[B, TQ, HK, selection]``, as far as each query sees; the rest as for ``decode_select``."""
    batch, queries, heads, parts = lse.shape
    kv_heads, selection = out.shape[2:]
    dependent, options = launch_options(lse.device)
    width = min(256, triton.next_power_of_2(max(selection, 16, cells.per_tile)))
    decode_importance_kernel[(triton.cdiv(selection, width), batch * queries * kv_heads)](
        *kept, lse, lengths, out, queries, heads, heads // kv_heads, kv_heads, parts, splits, cells.tiles, length, stride,
        selection, PER=size // stride, CELLS=cells.per_block, BC=cells.per_tile, **_heads(heads // kv_heads, splits, width),
        DEPENDENT=dependent, num_warps=4, **options,
    )  # fmt: skip


def _heads(group: int, splits: int, width: int) -> dict[str, int]:
    """Blocks, heads and parts that are looked at together."""
    heads = max(1, min(TILE // width, triton.next_power_of_2(group), 64))
    return {"BJ": width, "BG": heads, "BP": triton.next_power_of_2(splits)}
