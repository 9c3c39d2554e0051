"""How much each selection block matters to a query: equations 8-10 of the paper, fp32 from the product to the sum.

A compressed block covers ``l / d`` strides, so it touches its own selection block and perhaps the next. A program holds the
compressed blocks of ``BJ`` selection blocks and lets the group's heads pass by; the first of the ``BJ`` is only there for
what it hands to the second, so that programs need not add to each other's results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import decode_tuning, tuning
from nsa.kernels.triton.dependent import wait_for_inputs
from nsa.kernels.triton.interval_forward import end_seen
from nsa.kernels.triton.sequence import Spans, Tiles, locate, span
from nsa.kernels.triton.tile import LOG2E, backward_lse, direct_descriptor, dot, load_direct, wide


@triton.jit
def _keys(k, keys, inside, first, stride_kt, D: tl.constexpr, BD: tl.constexpr):
    """``[BD, len(keys)]``, the dims from ``first`` on."""
    dims = first + tl.arange(0, BD)
    at = k + keys.to(tl.int64)[:, None] * stride_kt + dims[None, :]
    # Turned here: Triton 3.9 would keep the tile in registers and store it to shared memory anew for every head.
    return tl.load(at, mask=inside[:, None] & (dims < D)[None, :], other=0.0).T


@triton.jit
def importance_of(
    q, k, lse, batch, row, hk, seen, keep, first, k_len, scale, stride_kt, stride_lh,
    G: tl.constexpr, PER: tl.constexpr, COVERS: tl.constexpr, BJ: tl.constexpr, SUB: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """``[BM, BJ]`` of the selection blocks from ``first - 1`` on, without the first of them, which lacks its due.

    ``row`` the tile's first row of q; ``k`` at the sequence's first block; ``lse [BM]`` at the group's first head. Dims are
    held in ``PIECES``, 1 or 3, of ``BD``.
    """
    col = tl.arange(0, BJ * SUB)
    own = tl.zeros([BM, BJ], tl.float32)
    following = tl.zeros([BM, BJ], tl.float32)
    for m0 in tl.static_range(0, PER, SUB):
        m = m0 + col % SUB  # a block's place among those that start in its selection block
        i = (first - 1 + col // SUB) * PER + m
        inside = (m < PER) & (i >= 0) & (i < k_len)
        keys = tl.where(inside, i, 0)
        kt = _keys(k, keys, inside, 0, stride_kt, D, BD)
        if PIECES == 3:
            kt1 = _keys(k, keys, inside, BD, stride_kt, D, BD)
            kt2 = _keys(k, keys, inside, 2 * BD, stride_kt, D, BD)
        p = tl.zeros([BM, BJ * SUB], tl.float32)
        # A head ahead: the product would wait for what is loaded in its own turn.
        following_lse = tl.load(lse, mask=keep, other=float("-inf"))
        for g in tl.range(0, G):
            row_lse = backward_lse(following_lse)
            following_lse = tl.load(lse + tl.minimum(g + 1, G - 1) * stride_lh, mask=keep, other=float("-inf"))
            s = dot(load_direct(q, batch, row, hk * G + g, 0, BM, BD), kt)
            if PIECES == 3:
                s = dot(load_direct(q, batch, row, hk * G + g, BD, BM, BD), kt1, s)
                s = dot(load_direct(q, batch, row, hk * G + g, 2 * BD, BM, BD), kt2, s)
            p += tl.exp2(s * scale - row_lse[:, None])
        p = tl.where(inside[None, :] & (i[None, :] < seen[:, None]), p, 0.0)
        p = tl.reshape(p, [BM, BJ, SUB])
        weight = tl.minimum(PER - m0 - tl.arange(0, SUB), COVERS)[None, None, :]  # strides in the block's own selection block
        own += tl.sum(p * weight, 2)
        following += tl.sum(p * (COVERS - weight), 2)
    j = tl.arange(0, BJ)
    return own + tl.gather(following, tl.broadcast_to(tl.maximum(j - 1, 0)[None, :], [BM, BJ]), 1)


@triton.jit(
    do_not_specialize=[
        "tiles",
        "q_len",
        "k_len",
        "offset",
        "tile0",
        "kv_heads",
        "length",
        "stride",
        "size",
        "stride_lb",
        "stride_lh",
    ]
)
def importance_kernel(
    q, k, lse, out, stride_kb, stride_kt, stride_kh, stride_lb, stride_lh, stride_lt,
    tile0, tiles, tile_seq, tile_first, table, q_len, k_len, offset, kv_heads, blocks, length, stride, size, scale,
    G: tl.constexpr, PER: tl.constexpr, COVERS: tl.constexpr, BJ: tl.constexpr, SUB: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PIECES: tl.constexpr, PACKED: tl.constexpr,
    TABLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    hk = tl.program_id(2)
    # Nothing here is of the launch before. But one program waits, so that this launch ends after that one: who then waits for
    # this one has waited for both, in a captured graph too.
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (hk == 0):
        wait_for_inputs(DEPENDENT)
    seq, tile = locate(tile0 + tl.program_id(1), tiles, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * BM
    first = tl.program_id(0) * (BJ - 1)  # the first selection block that this program writes
    last = offset + tl.minimum(start + BM, q_len) - 1
    if (start >= q_len) | (first > last // size):
        return
    rows, j = tl.arange(0, BM), tl.arange(0, BJ)
    seen = end_seen(offset + start + rows, length, stride, k_len)
    keep = start + rows < q_len
    lse += batch * stride_lb + (q_row + start + rows) * stride_lt + hk * G * stride_lh
    k += batch * stride_kb + k_row * stride_kt + hk * stride_kh
    found = importance_of(
        q, k, lse, batch, q_row + start, hk, seen, keep, first, k_len, scale, stride_kt, stride_lh,
        G, PER, COVERS, BJ, SUB, D, BM, BD, PIECES,
    )  # fmt: skip
    block = first - 1 + j
    at = out + ((wide(tl.program_id(1)) * BM + rows)[:, None] * kv_heads + hk) * blocks + block[None, :]
    tl.store(at, found, mask=keep[:, None] & ((j >= 1) & (block < blocks))[None, :])


def block_importance(
    q: Tensor, k: Tensor, lse: Tensor, out: Tensor, spans: Spans, tiles: Tiles, tile0: int, count: int, seen: int,
    length: int, stride: int, size: int, softmax_scale: float, early: bool = False,
) -> None:  # fmt: skip
    """P of ``count`` tiles of queries from ``tile0`` on, which see ``seen`` blocks at most, into out fp32
    ``[count * BM, HK, blocks]``.

    q ``[B, TQ, HQ, D]``, k ``[B, N, HK, D]``, lse ``[B, TQ, HQ]``. Blocks past a query's own are left as they are. ``early``:
    the launch before lets this one start as it does itself, and shares no memory with it.
    """
    kv_heads, dim, blocks = k.shape[2], q.shape[-1], out.shape[-1]
    tune = tuning.importance(dim, q.dtype, tuning.arch(q.device))
    per = size // stride
    sub = min(triton.next_power_of_2(per), tune.block_n // 2)
    blocks_a_tile = tune.block_n // sub
    width, pieces = tuning.dim_pieces(dim)
    registers = tuning.importance_registers(dim, q.dtype, per, tuning.arch(q.device))
    options = ({"maxnreg": registers} if registers else {}) | ({"launch_pdl": True} if early else {})
    importance_kernel[(triton.cdiv(seen, blocks_a_tile - 1), count, kv_heads)](
        direct_descriptor(q, tune.block_m, width), k, lse, out, *k.stride()[:3], lse.stride(0), lse.stride(2), lse.stride(1),
        tile0, tiles.per_seq, tiles.seq, tiles.first, spans.table, spans.q_len, spans.k_len, spans.offset,
        kv_heads, blocks, length, stride, size, softmax_scale * LOG2E.value,
        G=q.shape[2] // kv_heads, PER=per, COVERS=length // stride, BJ=blocks_a_tile, SUB=sub,
        D=dim, BM=tune.block_m, BD=width, PIECES=pieces,
        PACKED=spans.packed, TABLE=spans.table is not None,
        DEPENDENT=decode_tuning.dependent_launch(tuning.arch(q.device)), num_warps=tune.num_warps,
        num_stages=tune.num_stages, **options,
    )  # fmt: skip
