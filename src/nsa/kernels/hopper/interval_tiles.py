"""Tiles of queries and keys: what the forward on Hopper and the gradient of its queries share.

A row is a query and one of ``HEADS`` heads that lie side by side. A tensor's sides are powers of two: where the head dim of
queries and keys is not, a tile of them is ``PIECES`` buffers of ``D`` columns each.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma

from nsa.kernels.hopper.pipeline import end_seen, first_seen, locate, span, store_async

ROWS = gl.constexpr(64)  # of a warpgroup
GROUPS = gl.constexpr(2)  # warpgroups


@gluon.jit
def query_tile(number, where, shape, HEADS: gl.constexpr, BN: gl.constexpr, WINDOWED: gl.constexpr,
               PACKED: gl.constexpr, TABLE: gl.constexpr):  # fmt: skip
    """Tile ``number``: where its queries and keys lie, and the tiles of keys ``low .. high``, of which those from ``mid1`` on
    and those before ``mid0`` are not seen whole by all of its queries."""
    tile_count, per_seq, tile_seq, tile_first, table, q_len, k_len, offset = where
    heads, group, length, stride, window = shape
    QUERIES: gl.constexpr = GROUPS * ROWS // HEADS
    h = number % (heads // HEADS) * HEADS
    # The last queries see most: they go first, so that the launch ends with short programs.
    seq, tile = locate(tile_count - 1 - number // (heads // HEADS), per_seq, tile_seq, tile_first, PACKED)
    batch, q_row, q_len, k_row, k_len, offset = span(seq, table, q_len, k_len, offset, TABLE)
    start = tile * QUERIES
    first, last = offset + start, offset + gl.minimum(start + QUERIES, q_len) - 1
    low = first_seen(first, window, WINDOWED) // BN
    high = gl.maximum(gl.cdiv(end_seen(last, length, stride, k_len), BN), low + 1)
    mid1 = gl.minimum(gl.maximum(end_seen(first, length, stride, k_len) // BN, low), high - 1)
    mid0 = low
    if WINDOWED:
        mid0 = gl.minimum(gl.maximum(gl.cdiv(first_seen(last, window, WINDOWED), BN), low), mid1)
    return (
        batch.to(gl.int32),
        (q_row + start).to(gl.int32),
        start,
        q_len,
        k_row.to(gl.int32),
        k_len,
        offset,
        h,
        low,
        mid0,
        mid1,
        high,
    )


@gluon.jit
def operands(buf, tile, PIECES: gl.constexpr, HELD: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile's pieces as left operands: in registers if ``HELD``, else where they are."""
    pieces = ()
    for c in gl.static_range(PIECES):
        x = buf.index(tile * PIECES + c).reshape([ROWS, buf.shape[4]])
        pieces += (x.load(LAYOUT) if HELD else x,)  # type: ignore[assignment]
    return pieces


@gluon.jit
def scores(queries, k_buf, tile, BN: gl.constexpr, PIECES: gl.constexpr, LAYOUT: gl.constexpr):
    """The products of ``queries``, operands, with a tile of keys: in flight."""
    s = gl.zeros([ROWS, BN], gl.float32, LAYOUT)
    for c in gl.static_range(PIECES):
        kt = k_buf.index(tile * PIECES + c).reshape([BN, k_buf.shape[4]]).permute((1, 0))
        s = warpgroup_mma(queries[c], kt, s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def store_tile(desc, batch, row, h, buf, pieces):
    """Start the copies of ``pieces``, side by side in ``desc``'s tensor, all through one buffer."""
    for c in gl.static_range(len(pieces)):
        tma.store_wait(0)
        buf.reshape([ROWS, buf.shape[3]]).store(pieces[c].to(buf.dtype))
        fence_async_shared()
        store_async(desc, [batch, row, h, c * buf.shape[3]], buf)
