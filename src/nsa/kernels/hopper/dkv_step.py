"""A tile of queries into the gradients of 64 keys and values: what the two kernels that make such gradients share.

Keys are the rows of every product, so that probabilities go from one product to the next in registers, and both gradients stay
in registers to the end. Keys, their gradient and queries come in pieces of some of the columns, see ``pipeline.pieces``.

Source: FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.hopper.pipeline import gated, phase, pieces, pinned, tile_pieces

KEYS = gl.constexpr(64)


@gluon.jit
def add_queries(used, dk, dv, kt, vt, buffers, bars, pos, lo, hi, scale, MASK: gl.constexpr, BQ: gl.constexpr,
                D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr):  # fmt: skip
    """The ring's ``used``-th tile. With ``MASK`` a key is seen by the positions ``lo .. hi - 1``; ``pos`` are the queries'."""
    PIECES: gl.constexpr = pieces(D)
    K_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk[0].type.layout, k_width=2)
    V_OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv.type.layout, k_width=2)
    q_buf, g_buf, shift_buf, delta_buf = buffers
    q_full, g_full, empty = bars
    slot = used % STAGES
    qt, gt = tile_pieces(q_buf, slot, BQ, D), g_buf.index(slot).reshape([BQ, DV])
    zeros = gl.zeros([KEYS, BQ], gl.float32, S_LAYOUT)
    mbarrier.wait(q_full.index(slot), phase(used, STAGES))
    s = zeros
    for c in gl.static_range(PIECES):
        s = warpgroup_mma(kt[c], qt[c].permute((1, 0)), s, use_acc=c > 0, is_async=True)
    mbarrier.wait(g_full.index(slot), phase(used, STAGES))
    dp = warpgroup_mma(vt, gt.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    its_shift = gl.expand_dims(shift_buf.index(slot).load(gl.SliceLayout(0, S_LAYOUT)), 0)
    p = gated(gl.exp2(s * scale - its_shift), its_shift)  # [keys, queries]
    if MASK:
        pos = gl.expand_dims(pos, 0)
        p = gl.where((pos >= gl.expand_dims(lo, 1)) & (pos < gl.expand_dims(hi, 1)), p, 0.0)
    pt = pinned(gl.convert_layout(p.to(g_buf.dtype), V_OPERAND, assert_trivial=True))
    dv = warpgroup_mma(pt, gt, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = p * (dp - gl.expand_dims(delta_buf.index(slot).load(gl.SliceLayout(0, S_LAYOUT)), 0))
    dst = pinned(gl.convert_layout(ds.to(q_buf.dtype), K_OPERAND, assert_trivial=True))
    sums = (dv,)
    for c in gl.static_range(PIECES):
        sums += (warpgroup_mma(dst, qt[c], dk[c], is_async=True),)  # type: ignore[assignment]
    # Carried over the loop's end in flight, the sums would be serialised by the compiler.
    sums = warpgroup_mma_wait(0, deps=sums)
    pt, dst = pinned(pt), pinned(dst)
    mbarrier.arrive(empty.index(slot), count=1)
    return sums[1:], sums[0]


@gluon.jit
def zero_gradients(D: gl.constexpr, DV: gl.constexpr):
    """Of 64 keys, in pieces, and of their values."""
    PIECES: gl.constexpr = pieces(D)
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // PIECES, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    dk = ()
    for _c in gl.static_range(PIECES):
        dk += (gl.zeros([KEYS, D // PIECES], gl.float32, K_LAYOUT),)  # type: ignore[assignment]
    return dk, gl.zeros([KEYS, DV], gl.float32, V_LAYOUT)


@gluon.jit
def store_rows(out, x, stride, rows):
    """The first ``rows`` rows of ``x``."""
    WIDTH: gl.constexpr = x.shape[1]
    LAYOUT: gl.constexpr = x.type.layout
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    at = gl.expand_dims(row * stride, 1) + gl.expand_dims(column, 0)
    gl.store(out + at, x, mask=gl.expand_dims(row < rows, 1))
