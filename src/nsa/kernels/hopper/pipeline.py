"""What the warp-specialised kernels share: barriers in a ring, and names that Triton's versions spell differently."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.triton import interval_forward, sequence, tile

ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Triton 3.9 renames all five.
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_async = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
load_numbers = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

# Arithmetic on scalars and rows is the same in both dialects.
locate, span = gluon.jit(sequence.locate.fn), gluon.jit(sequence.span.fn)
first_seen, end_seen = gluon.jit(interval_forward.first_seen.fn), gluon.jit(interval_forward.end_seen.fn)
gated = gluon.jit(tile.gated.fn)

LOG2E, LN2, LOWEST = (gl.constexpr(x.value) for x in (tile.LOG2E, tile.LN2, tile.LOWEST))


@gluon.jit
def phase(count, STAGES: gl.constexpr):
    """Parity that the ``count``-th use of a ring's slot waits for."""
    return (count // STAGES) & 1


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """``COUNT`` barriers, each complete after ``ARRIVALS``."""
    ring = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(ring.index(i), count=ARRIVALS)
    return ring


@gluon.constexpr_function
def pieces(dim):
    """In how many pieces, side by side, ``dim`` columns are held: the sides of a tile are powers of two."""
    return 1 if dim & (dim - 1) == 0 else dim // 64


@gluon.jit
def load_pieces(desc, batch, row, head, full, buffer, at, PIECES: gl.constexpr):
    """All columns of the rows from ``row`` on, into the ``at``-th place of ``buffer``."""
    for c in gl.static_range(PIECES):
        load_async(desc, [batch, row, head, c * buffer.shape[4]], full, buffer.index(at * PIECES + c))


@gluon.jit
def tile_pieces(buffer, at, ROWS: gl.constexpr, D: gl.constexpr):
    """The tile ``[ROWS, D]`` in the ``at``-th place of ``buffer``."""
    PIECES: gl.constexpr = pieces(D)
    tile = ()
    for c in gl.static_range(PIECES):
        tile += (buffer.index(at * PIECES + c).reshape([ROWS, D // PIECES]),)  # type: ignore[assignment]
    return tile


@gluon.jit
def pinned(x):
    """16-bit ``x``, which the compiler must have in registers here: nothing that makes it sinks past this point."""
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def blank_past(end, values, full, parity, C: gl.constexpr, ROWS: gl.constexpr):
    """Zero what of ``ROWS`` rows of ``values``, from row ``C * ROWS`` on, lies at ``end`` or past it, once they are there: 0
    times the NaN that may follow a sequence is not 0."""
    WIDTH: gl.constexpr = values.shape[1] // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDTH, WIDTH], [4, 1], [1, 0])
    mbarrier.wait(full, parity)
    part = values.slice(C * ROWS, ROWS)
    inside = C * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)) < end
    x = part.load(LAYOUT)
    part.store(gl.where(gl.expand_dims(inside, 1), x, gl.zeros_like(x)))
    fence_async_shared()
    thread_barrier()


def boxes(x: Tensor, rows: int, heads: int = 1, columns: int | None = None) -> TensorDescriptor:
    """Tiles of ``rows`` rows by ``heads`` heads of ``x [B, T, H, D]``, or ``columns`` of them; outside of ``x`` they are 0."""
    if x.numel() == 0:  # nobody reads it, but it must not be empty
        x = x.new_zeros(1, 1, heads, x.shape[-1])
    strides = [stride if size > 1 else 8 * x.shape[-1] for size, stride in zip(x.shape[:-1], x.stride())]
    box = [1, rows, heads, columns or x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(box, ELEMENT[x.dtype])
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box, layout)
