"""Which keys a tile of queries sees: what the forward on Hopper and the gradient of its queries share.

A row is a query and one of ``HEADS`` heads that lie side by side.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsa.kernels.hopper.pipeline import end_seen, first_seen, locate, span

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
