"""The overlapping blocks of keys or values: their means, or a copy of each for the compressor's matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning

TOKENS = 32  # of a program


@dataclass(frozen=True)
class BlockRows:
    """Which tokens each output row covers.

    Batched: row ``i`` starts at token ``i * stride``. Packed: at ``start[i]``, which is ``-length`` for a row that covers none;
    and the rows ``low[t] .. high[t] - 1`` cover token ``t``.
    """

    rows: int
    start: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


def block_rows(tokens: int, cu_seqlens: Tensor | None, length: int, stride: int) -> BlockRows:
    """Packed sequences get ``tokens // stride`` rows, at least as many as they need; no length is read on the host."""
    if cu_seqlens is None:
        return BlockRows(0 if tokens < length else (tokens - length) // stride + 1)
    edges = cu_seqlens.clamp(0, tokens)
    lens = edges.diff().clamp_min(0)
    owned = torch.where(lens < length, 0, (lens - length) // stride + 1)
    ends = owned.cumsum(0)
    rows = torch.arange(tokens // stride, device=edges.device)
    # One empty sequence behind the last takes rows and tokens that belong to none.
    firsts, counts, begins = (torch.nn.functional.pad(x, (0, 1)) for x in (ends - owned, owned, edges[:-1]))
    seq = torch.searchsorted(ends, rows, right=True)
    start = torch.where(seq < len(lens), begins[seq] + (rows - firsts[seq]) * stride, -length)
    token = torch.arange(tokens, device=edges.device)
    seq = torch.searchsorted(edges[1:].contiguous(), token, right=True)
    place = token - begins[seq]
    low = torch.where(place >= length, (place - length) // stride + 1, 0)
    high = torch.minimum(place // stride + 1, counts[seq])
    low, high = (firsts[seq] + torch.minimum(low, high)).int(), (firsts[seq] + high).int()
    return BlockRows(len(rows), start.int(), low, high)


@triton.jit(do_not_specialize=["rows", "heads", "length", "stride"])
def blocks_kernel(
    x, out, start, stride_xb, stride_xt, stride_xh, rows, heads, length, stride,
    D: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, MEAN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row, h, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, dims = tl.arange(0, BL), tl.arange(0, BD)
    keep = token < length
    first = row * stride
    if PACKED:
        first = tl.load(start + row)
        keep = keep & (first + token >= 0)  # a row that covers nothing starts at -length
    inside = keep[:, None] & (dims < D)[None, :]
    base = x + batch * stride_xb + h * stride_xh
    tile = tl.load(base + (first + token).to(tl.int64)[:, None] * stride_xt + dims[None, :], mask=inside, other=0.0)
    place = (batch * rows + row) * heads + h
    if MEAN:
        mean = tl.sum(tile.to(tl.float32), 0) / length
        tl.store(out + place * D + dims, mean.to(out.dtype.element_ty), mask=dims < D)
    else:
        at = out + (place * length + token[:, None]) * D + dims[None, :]
        tl.store(at, tile, mask=(token < length)[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["tokens", "rows", "heads", "length", "stride"])
def blocks_backward_kernel(
    dout, dx, low, high, tokens, rows, heads, length, stride,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, COVERS: tl.constexpr, MEAN: tl.constexpr, PACKED: tl.constexpr,
    start,
):  # fmt: skip
    """Each token adds up the blocks that cover it: at most ``COVERS = length / stride``, in order."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    h, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, BD)
    keep = token < tokens
    if PACKED:
        first = tl.load(low + token, mask=keep, other=0)
        end = tl.load(high + token, mask=keep, other=0)
    else:
        first = tl.where(token >= length, (token - length) // stride + 1, 0)
        end = tl.minimum(token // stride + 1, rows)
    acc = tl.zeros([BM, BD], tl.float32)
    for c in tl.static_range(COVERS):
        row = first + c
        inside = keep & (row < end)
        place = (batch * rows + row) * heads + h
        if MEAN:
            at = place[:, None] * D
        else:
            begin = row * stride
            if PACKED:
                begin = tl.load(start + row, mask=inside, other=0)
            at = (place * length + token - begin)[:, None] * D
        acc += tl.load(dout + at + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)
    if MEAN:
        acc = acc / length
    out = dx + ((batch * tokens + token) * heads + h)[:, None] * D + dims[None, :]
    tl.store(out, acc.to(dx.dtype.element_ty), mask=keep[:, None] & (dims < D)[None, :])


def blocks(x: Tensor, cu_seqlens: Tensor | None, length: int, stride: int, mean: bool) -> Tensor:
    """x ``[B, T, HK, D]``: the blocks ``[B, N, HK, l, D]``, or with ``mean`` their means ``[B, N, HK, D]``."""
    batch, tokens, heads, dim = x.shape
    where = block_rows(tokens, cu_seqlens, length, stride)
    shape = (batch, where.rows, heads, dim) if mean else (batch, where.rows, heads, length, dim)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.numel():
        blocks_kernel[(where.rows, heads, batch)](
            x, out, where.start, *x.stride()[:3], where.rows, heads, length, stride,
            D=dim, BL=triton.next_power_of_2(length), BD=tuning.padded_dim(dim), MEAN=mean, PACKED=cu_seqlens is not None,
            num_warps=4,
        )  # fmt: skip
    return out


def blocks_backward(dout: Tensor, cu_seqlens: Tensor | None, tokens: int, length: int, stride: int, mean: bool) -> Tensor:
    """Gradient of ``x [B, tokens, HK, D]`` from that of ``blocks``, contiguous."""
    batch, _, heads = dout.shape[:3]
    dim = dout.shape[-1]
    where = block_rows(tokens, cu_seqlens, length, stride)
    dx = torch.empty(batch, tokens, heads, dim, dtype=dout.dtype, device=dout.device)
    if dx.numel():
        blocks_backward_kernel[(triton.cdiv(tokens, TOKENS), heads, batch)](
            dout, dx, where.low, where.high, tokens, where.rows, heads, length, stride,
            D=dim, BM=TOKENS, BD=tuning.padded_dim(dim), COVERS=length // stride, MEAN=mean, PACKED=cu_seqlens is not None,
            start=where.start, num_warps=4,
        )  # fmt: skip
    return dx
