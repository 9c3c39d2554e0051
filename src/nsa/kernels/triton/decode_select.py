"""The selection of a decode step: block importance out of the kept scores, then the ``n`` blocks of every query.

The first kernel weighs the lse of all parts together, for the probabilities, and sums the strides of each selection block over
the group's heads. The second is the top-n of ``top_n`` for one query a program: the bits of a number that is never negative
rank like the number, so counting finds the n-th highest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.triton.interval_forward import end_seen
from nsa.kernels.triton.tile import LOG2E, wide

HEADS = 16  # of a group, looked at together
FORCED = tl.constexpr(0x7F800000)  # the bits of infinity
WIDEST = 16384  # blocks that a program ranks without going back to memory


@triton.jit
def own_block(pos, size):
    """The selection block of position ``pos``; -1 before the first token."""
    return tl.where(pos < 0, -1, tl.maximum(pos, 0) // size)


@triton.jit(do_not_specialize=["queries", "heads", "group", "kv_heads", "parts", "splits", "length", "stride", "blocks"])
def decode_importance_kernel(
    scores, lse, lengths, out, queries, heads, group, kv_heads, parts, splits, length, stride, blocks, selection, scale,
    PER: tl.constexpr, COVERS: tl.constexpr, BJ: tl.constexpr, BW: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    first, which = tl.program_id(0) * BJ, tl.program_id(1)
    hk, number = which % kv_heads, which // kv_heads
    pos = tl.load(lengths + number // queries) - queries + number % queries
    if first > own_block(pos, PER * stride):
        return
    j, m = tl.arange(0, BJ * BW) // BW, tl.arange(0, BJ * BW) % BW
    block = (first + j) * PER - (COVERS - 1) + m  # compressed blocks that touch selection block first + j
    inside = (m < PER + COVERS - 1) & (block >= 0) & (block < end_seen(pos, length, stride, blocks))
    part = tl.arange(0, BP)
    total = tl.zeros([BJ * BW], tl.float32)
    for g in tl.range(0, group, BG):
        head = g + tl.arange(0, BG)
        keep = head < group
        row = wide(number) * heads + hk * group + head
        at = lse + row[:, None] * parts + part[None, :]
        each = tl.load(at, mask=keep[:, None] & (part < splits)[None, :], other=float("-inf")) * LOG2E  # [BG, BP]
        most = tl.maximum(tl.max(each, 1), -1.0e30)
        row_lse = most + tl.log2(tl.maximum(tl.sum(tl.exp2(each - most[:, None]), 1), 1.0e-30))
        seen = keep[:, None] & inside[None, :]
        s = tl.load(scores + row[:, None] * blocks + block[None, :], mask=seen, other=float("-inf"))
        total += tl.sum(tl.exp2(s * scale - row_lse[:, None]), 0)
    # Strides m - (COVERS - 1) .. m of the selection block, those of them that it has.
    weight = tl.minimum(m, PER - 1) - tl.maximum(m - (COVERS - 1), 0) + 1
    p = tl.sum(tl.reshape(tl.where(inside, total * weight, 0.0), [BJ, BW]), 1)
    j = first + tl.arange(0, BJ)
    tl.store(out + wide(which) * selection + j, p, mask=j < selection)


@triton.jit
def _ranks(importance, j, own, num_initial, num_local):
    """Integers that rank the blocks ``j``: -1 for none, ``FORCED`` for forced."""
    value = tl.load(importance + j, mask=j <= own, other=0.0).to(tl.int32, bitcast=True)
    forced = (j < num_initial) | (j > own - num_local)
    return tl.where(j <= own, tl.where(forced, FORCED, value), -1)


@triton.jit(do_not_specialize=["queries", "kv_heads", "n", "num_initial", "num_local", "size"])
def decode_top_n_kernel(
    importance, lengths, out, queries, kv_heads, selection, size, n, num_initial, num_local,
    BJ: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    number = which // kv_heads
    own = own_block(tl.load(lengths + number // queries) - queries + number % queries, size)
    importance += wide(which) * selection
    out += wide(which) * n
    column = tl.arange(0, BJ)
    end = own + 1
    threshold = own * 0
    if WHOLE:
        rank = _ranks(importance, column, own, num_initial, num_local)
    bit = tl.where(end > n, 30, -1)  # no more blocks than places: all of them
    while bit >= 0:
        trial = threshold | (1 << bit)
        reached = own * 0
        if WHOLE:
            reached += tl.sum((rank >= trial).to(tl.int32), 0)
        else:
            for j0 in tl.range(0, end, BJ):
                reached += tl.sum((_ranks(importance, j0 + column, own, num_initial, num_local) >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= n, trial, threshold)
        bit = tl.where(reached == n, -1, bit - 1)
    higher = own * 0
    if WHOLE:
        higher += tl.sum((rank > threshold).to(tl.int32), 0)
    else:
        for j0 in tl.range(0, end, BJ):
            higher += tl.sum((_ranks(importance, j0 + column, own, num_initial, num_local) > threshold).to(tl.int32), 0)

    ties = n - higher  # places left for blocks at the threshold, the lowest first
    written = own * 0
    tied = own * 0
    for j0 in tl.range(0, BJ if WHOLE else end, BJ):
        if not WHOLE:
            rank = _ranks(importance, j0 + column, own, num_initial, num_local)
        over = (rank > threshold).to(tl.int32)
        level = ((rank == threshold) & (rank >= 0)).to(tl.int32)
        # Both counts in one scan: BJ is at most 2^14, so each fits 16 bits.
        both = over + level * 65536
        before = tl.cumsum(both, 0) - both
        level_before = (before >> 16) + tied
        place = (before & 65535) + written + tl.minimum(level_before, ties)
        taken = (over > 0) | ((level > 0) & (level_before < ties))
        tl.store(out + place, j0 + column, mask=taken)
        counts = tl.sum(both, 0)
        written += counts & 65535
        tied += counts >> 16
    place = tl.arange(0, BN)
    tl.store(out + place, tl.full([BN], -1, tl.int32), mask=(place >= written + tl.minimum(tied, ties)) & (place < n))


def decode_importance(
    scores: Tensor, lse: Tensor, lengths: Tensor, out: Tensor, splits: int, tile: tuple[int, int],
    length: int, stride: int, size: int, softmax_scale: float,
) -> None:  # fmt: skip
    """P into out fp32 ``[B, TQ, HK, M]``, as far as each query sees.

    scores fp32 ``[B, TQ, HQ, blocks]``, of which the first ``splits`` of lse fp32 ``[B, TQ, HQ, parts]`` are the softmax's.
    """
    batch, queries, heads, blocks = scores.shape
    kv_heads, selection = out.shape[2:]
    group = heads // kv_heads
    decode_importance_kernel[(triton.cdiv(selection, tile[0]), batch * queries * kv_heads)](
        scores, lse, lengths, out, queries, heads, group, kv_heads, lse.shape[-1], splits,
        length, stride, blocks, selection, softmax_scale * LOG2E.value,
        PER=size // stride, COVERS=length // stride, BJ=tile[0], BW=tile[1], BG=HEADS, BP=triton.next_power_of_2(splits),
        num_warps=4,
    )  # fmt: skip


def decode_top_n(importance: Tensor, lengths: Tensor, out: Tensor, size: int, num_initial: int, num_local: int) -> None:
    """The blocks of every query into out int32 ``[B, TQ, HK, n]`` from importance fp32 ``[B, TQ, HK, M]``."""
    batch, queries, kv_heads, selection = importance.shape
    n = out.shape[-1]
    width = min(WIDEST, triton.next_power_of_2(max(selection, 16)))
    decode_top_n_kernel[(batch * queries * kv_heads,)](
        importance, lengths, out, queries, kv_heads, selection, size, n, num_initial, num_local,
        BJ=width, BN=triton.next_power_of_2(n), WHOLE=selection <= width, num_warps=max(1, min(8, width // 512)),
    )  # fmt: skip
