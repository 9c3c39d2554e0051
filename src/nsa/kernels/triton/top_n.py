"""The ``n`` blocks of every query: the forced ones, then the most important, ties to the lowest.

Importance is never negative, so its bits as an integer rank like its value: counting how many blocks reach a rank, again and
again, finds the n-th highest exactly, whatever ``n`` is. The counts fall about exponentially with the rank, so a good guess
takes a few. A running count of what lies above it writes the indices in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import decode_tuning, tuning
from nsa.kernels.triton.dependent import dependents_may_start
from nsa.kernels.triton.importance import block_importance
from nsa.kernels.triton.sequence import Spans, Tiles, locate, span
from nsa.kernels.triton.tile import wide

INFINITY = tl.constexpr(0x7F800000)
WORKSPACE = 240 << 20  # bytes of importance that are alive at a time
WIDEST = 16384  # blocks that a program ranks without going back to memory


@triton.jit
def ranked(value, j, own, keep, num_initial, num_local):
    """``[rows, len(j)]`` integers that rank the blocks ``j`` of importance ``value``: -1 for none, ``INFINITY`` for forced."""
    j = j[None, :]
    candidate = (j <= own[:, None]) & keep[:, None]
    forced = (j < num_initial) | (j > own[:, None] - num_local)
    return tl.where(candidate, tl.where(forced, INFINITY, value.to(tl.int32, bitcast=True)), -1)


@triton.jit
def load_ranks(importance, row, own, keep, j0, hk, kv_heads, blocks, num_initial, num_local, BJ: tl.constexpr):
    """``ranked`` of the blocks from ``j0`` on, out of importance ``[rows, HK, blocks]``."""
    j = j0 + tl.arange(0, BJ)
    inside = (j[None, :] <= own[:, None]) & keep[:, None] & (j < blocks)[None, :]
    value = tl.load(importance + (row[:, None] * kv_heads + hk) * blocks + j[None, :], mask=inside, other=0.0)
    return ranked(value, j, own, keep, num_initial, num_local)


@triton.jit
def _top_and_forced(rank, top, forced):
    """The highest rank that is not forced, and the count of those that are, taken on."""
    highest = tl.max(tl.where(rank < INFINITY, rank, -1), 1)
    return tl.maximum(top, highest), forced + tl.sum((rank == INFINITY).to(tl.int32), 1)


@triton.jit
def _trial(low, high, c_low, c_high, n, step):
    """A rank between ``low`` and ``high``: where the n-th is if counts fall exponentially, every other time the middle."""
    # Of a settled row the counts may be 0 or equal; its trial is not used, but must be a number.
    above, below = tl.log2(tl.maximum(c_low, 1).to(tl.float32)), tl.log2(tl.maximum(c_high.to(tl.float32), 0.5))
    share = (above - tl.log2(n.to(tl.float32))) / tl.maximum(above - below, 1e-6)
    gap = high - low
    ahead = (gap.to(tl.float32) * tl.where(step % 2 == 0, share, 0.5)).to(tl.int32)
    return low + tl.minimum(tl.maximum(ahead, 1), gap - 1)


@triton.jit
def store_top_n(
    rank, name, importance, row, own, keep, out, hk, kv_heads, blocks, n, num_initial, num_local,
    BM: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The ``n`` blocks of every row to its pointer ``out [BM, 1]``, ascending; all ``own + 1`` where these are fewer.

    ``WHOLE``, ``rank [BM, BJ]`` are all ranks, of the blocks ``name [1, BJ]``, which ascend; else they are those of the first
    blocks and loaded, ``BJ`` at a time, as often as it takes.
    """
    end = tl.minimum(tl.max(tl.where(keep, own, -1), 0) + 1, blocks)
    # Bracket the n-th rank: ``low`` is reached by n blocks or more, ``high`` by fewer.
    low = tl.zeros([BM], tl.int32)
    top = tl.full([BM], -1, tl.int32)
    c_high = tl.zeros([BM], tl.int32)
    c_low = own + 1
    if WHOLE:
        top, c_high = _top_and_forced(rank, top, c_high)
        # At least n groups of blocks have a highest rank, and n blocks or more reach the lowest of those.
        low = tl.maximum(tl.min(tl.max(tl.reshape(rank, [BM, BJ // GROUPS, GROUPS]), 1), 1), 0)
        c_low = tl.sum((rank >= low[:, None]).to(tl.int32), 1)
    else:
        for j0 in tl.range(0, end, BJ):
            ranks = load_ranks(importance, row, own, keep, j0, hk, kv_heads, blocks, num_initial, num_local, BJ)
            top, c_high = _top_and_forced(ranks, top, c_high)
    high = top + 1
    low, c_low = tl.where(c_high == n, INFINITY, low), tl.where(c_high == n, n, c_low)
    few = (own < n) | (keep == 0)
    unsettled = (few == 0) & (c_low != n) & (high - low > 1)
    step = 0
    while tl.max(unsettled.to(tl.int32), 0) > 0:
        trial = _trial(low, high, c_low, c_high, n, step)
        reached = tl.zeros([BM], tl.int32)
        if WHOLE:
            reached += tl.sum((rank >= trial[:, None]).to(tl.int32), 1)
        else:
            for j0 in tl.range(0, end, BJ):
                ranks = load_ranks(importance, row, own, keep, j0, hk, kv_heads, blocks, num_initial, num_local, BJ)
                reached += tl.sum((ranks >= trial[:, None]).to(tl.int32), 1)
        up, down = unsettled & (reached >= n), unsettled & (reached < n)
        low, c_low = tl.where(up, trial, low), tl.where(up, reached, c_low)
        high, c_high = tl.where(down, trial, high), tl.where(down, reached, c_high)
        unsettled = unsettled & (c_low != n) & (high - low > 1)
        step += 1
    # Blocks above the threshold are in; of those at it, the lowest fill the places that are left.
    exact = few | (c_low == n)
    threshold = tl.where(few, -1, tl.where(exact, low - 1, low))
    ties = tl.where(exact, 0, n - c_high)
    written = tl.zeros([BM], tl.int32)
    tied = tl.zeros([BM], tl.int32)
    for j0 in tl.range(0, BJ if WHOLE else end, BJ):
        if not WHOLE:
            rank = load_ranks(importance, row, own, keep, j0, hk, kv_heads, blocks, num_initial, num_local, BJ)
            name = j0 + tl.arange(0, BJ)[None, :]
        over = (rank > threshold[:, None]).to(tl.int32)
        level = ((rank == threshold[:, None]) & (rank >= 0)).to(tl.int32)
        # Both counts in one scan: BJ is at most 2^15 and some blocks are forced, so fewer than 2^15 are level.
        both = over + level * 65536
        before = tl.cumsum(both, 1) - both
        level_before = (before >> 16) + tied[:, None]
        place = (before & 65535) + written[:, None] + tl.minimum(level_before, ties[:, None])
        taken = (over > 0) | ((level > 0) & (level_before < ties[:, None]))
        tl.store(out + place, tl.broadcast_to(name, [BM, BJ]), mask=taken)
        counts = tl.sum(both, 1)
        written += counts & 65535
        tied += counts >> 16
    total = written + tl.minimum(tied, ties)
    place = tl.arange(0, BN)[None, :]
    empty = (place >= total[:, None]) & (place < n) & keep[:, None]
    tl.store(out + place, tl.full([BM, BN], -1, tl.int32), mask=empty)


@triton.jit(
    do_not_specialize=[
        "tiles",
        "q_len",
        "k_len",
        "offset",
        "tile0",
        "rows_q",
        "kv_heads",
        "size",
        "n",
        "num_initial",
        "num_local",
    ]
)
def top_n_kernel(
    importance, out, tile0, tiles, tile_seq, tile_first, table, q_len, k_len, offset, rows_q, kv_heads, blocks,
    size, n, num_initial, num_local,
    TILE: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    PACKED: tl.constexpr, TABLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    dependents_may_start(DEPENDENT)
    pid, hk = tl.program_id(0), tl.program_id(1)
    number = pid // (TILE // BM)
    seq, tile = locate(tile0 + number, tiles, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    within = pid % (TILE // BM) * BM + tl.arange(0, BM)
    query = tile * TILE + within
    keep = query < q_len
    own = (offset + query) // size
    row = wide(number) * TILE + within
    rank = tl.zeros([BM, BJ], tl.int32)
    if WHOLE:
        rank = load_ranks(importance, row, own, keep, 0, hk, kv_heads, blocks, num_initial, num_local, BJ)
    out += ((batch * rows_q + q_row + query) * kv_heads + hk)[:, None] * n
    store_top_n(
        rank, tl.arange(0, BJ)[None, :], importance, row, own, keep, out, hk, kv_heads, blocks, n, num_initial, num_local,
        BM, BJ, BN, GROUPS, WHOLE,
    )  # fmt: skip


def select_blocks(
    q: Tensor, k: Tensor, lse: Tensor, spans: Spans, length: int, stride: int, size: int, n: int,
    num_initial: int, num_local: int, softmax_scale: float, rank: Callable[..., None],
) -> Tensor:  # fmt: skip
    """q ``[B, TQ, HQ, D]``, k ``[B, N, HK, D]``, lse ``[B, TQ, HQ]``: int32 ``[B, TQ, HK, n]``.

    ``rank``: ``top_n`` or its twin.
    """
    batch, rows, _, dim = q.shape
    kv_heads = k.shape[2]
    out = torch.full((batch, rows, kv_heads, n), -1, dtype=torch.int32, device=q.device)
    tile = tuning.importance(dim, q.dtype, tuning.arch(q.device)).block_m
    tiles = spans.query_tiles(tile)
    # No sequence has more tokens than these: its compressed blocks, and less than a block behind the last.
    tokens = spans.q_len + spans.offset if spans.table is None else (k.shape[1] + 1) * stride + length
    blocks = triton.cdiv(triton.cdiv(tokens, size), 16) * 16  # rows of the workspace stay aligned
    step = max(1, WORKSPACE // (tile * kv_heads * max(blocks, 1) * 4))
    # A chunk is ranked while the importance of the next is computed, in the other half: one waits for memory, and the other
    # for the matrix unit. Importance ends after the ranking beside it, and the next ranking starts after importance: so nobody
    # writes what is still read.
    beside = decode_tuning.dependent_launch(tuning.arch(q.device)) and tiles.count > step > 1
    if beside:
        step //= 2
    room = min(step, tiles.count) * tile
    halves = torch.empty(2 if beside else 1, room, kv_heads, blocks, dtype=torch.float32, device=q.device)
    for i, tile0 in enumerate(range(0, tiles.count, step)):
        count, space = min(step, tiles.count - tile0), halves[i % len(halves)]
        # The queries of one sequence see no block past their last: fewer in the first chunks.
        alone = spans.table is None and spans.num_seqs == 1
        seen = max(0, min(blocks, triton.cdiv(spans.offset + (tile0 + count) * tile, size))) if alone else blocks
        early = beside and i > 0
        block_importance(q, k, lse, space, spans, tiles, tile0, count, seen, length, stride, size, softmax_scale, early)
        rank(space, out, spans, tiles, tile, tile0, count, seen, size, n, num_initial, num_local, beside)
    return out


def top_n(
    importance: Tensor, out: Tensor, spans: Spans, tiles: Tiles, tile: int, tile0: int, count: int, ranked: int,
    size: int, n: int, num_initial: int, num_local: int, beside: bool,
) -> None:  # fmt: skip
    """Rank the first ``ranked`` blocks for ``count`` tiles of ``tile`` queries from ``tile0`` on.

    importance ``[rows, HK, blocks]``, out ``[B, TQ, HK, n]``. ``beside``: the next launch may start.
    """
    kv_heads, blocks = importance.shape[1:]
    width = min(WIDEST, triton.next_power_of_2(max(ranked, 16)))
    # A warp to a row as long as its registers last: counting then needs no exchange between warps.
    warps = max(1, width // 2048)
    rows = max(1, min(tile, 256 // width))
    top_n_kernel[(count * (tile // rows), kv_heads)](
        importance, out, tile0, tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
        spans.rows_q, kv_heads, blocks, size, n, num_initial, num_local,
        TILE=tile, BM=rows, BJ=width, BN=triton.next_power_of_2(n), GROUPS=min(width, triton.next_power_of_2(n)),
        WHOLE=ranked <= width,
        PACKED=spans.packed, TABLE=spans.table is not None, DEPENDENT=beside, num_warps=warps,
    )  # fmt: skip
