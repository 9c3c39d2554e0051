"""Where a program's sequence lies: the device-side half of ``SeqInfo``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.layout import SeqInfo

SPAN = tl.constexpr(6)  # columns of a span table


@triton.jit
def locate(tile, tiles, tile_seq, tile_first, PACKED: tl.constexpr):
    """Sequence of a tile, and the tile's number in it. ``tiles`` a sequence, or a map for packed sequences."""
    if PACKED:
        seq = tl.load(tile_seq + tile)
        return seq, tile - tl.load(tile_first + seq)
    else:
        return tile // tiles, tile % tiles


@triton.jit
def span(seq, table, q_len, k_len, offset, TABLE: tl.constexpr):
    """Batch index, first query row, queries, first key row, keys, and the first query's position, of a sequence."""
    if TABLE:
        row = table + seq * SPAN
        batch = tl.load(row).to(tl.int64)
        q_row = tl.load(row + 1).to(tl.int64)
        q_len = tl.load(row + 2)
        k_row = tl.load(row + 3).to(tl.int64)
        k_len = tl.load(row + 4)
        offset = tl.load(row + 5)
        return batch, q_row, q_len, k_row, k_len, offset
    else:
        zero = seq.to(tl.int64) * 0
        return seq.to(tl.int64), zero, q_len, zero, k_len, offset


@dataclass(frozen=True)
class Spans:
    """The spans of a call, as arguments of ``span`` and ``locate``.

    ``table`` int32 ``[num_seqs + 1, SPAN]``, the last row empty, where lengths lie on the device; else None and the three
    numbers hold for every sequence of the batch.
    """

    num_seqs: int
    packed: bool
    rows_q: int
    rows_k: int
    table: Tensor | None
    q_len: int
    k_len: int
    offset: int

    def query_tiles(self, size: int) -> Tiles:
        """A program for each ``size`` queries of each sequence."""
        return self._tiles(size, self.rows_q, self.q_len, 2)

    def key_tiles(self, size: int) -> Tiles:
        """A program for each ``size`` keys of each sequence."""
        return self._tiles(size, self.rows_k, self.k_len, 4)

    @property
    def covers_keys(self) -> bool:
        """Whether every row of the key tensors is known to belong to a sequence."""
        return self.table is None and self.k_len == self.rows_k

    def _tiles(self, size: int, rows: int, per_seq: int, column: int) -> Tiles:
        if not self.packed:
            per_seq = triton.cdiv(per_seq if self.table is None else rows, size)
            return Tiles(self.num_seqs * per_seq, per_seq, None, None)
        assert self.table is not None
        counts = (self.table[:, column] + size - 1) // size
        ends = counts.cumsum(0, dtype=torch.int32)
        # Each sequence part-fills one tile at most: the bound needs no look at the lengths.
        most = triton.cdiv(rows, size) + self.num_seqs
        tile = torch.arange(most, device=self.table.device, dtype=torch.int32)
        seq = torch.searchsorted(ends[:-1].contiguous(), tile, right=True, out_int32=True)
        return Tiles(most, 0, seq, (ends - counts).to(torch.int32))


@dataclass(frozen=True)
class Tiles:
    """``count`` tiles: ``per_seq`` of each sequence, or where ``seq [count]`` and ``first [num_seqs + 1]`` say."""

    count: int
    per_seq: int
    seq: Tensor | None
    first: Tensor | None


def spans(rows_q: int, rows_k: int, info: SeqInfo, length: int, stride: int) -> Spans:
    """The spans of ``info`` over keys of ``length`` tokens, ``stride`` apart: compressed blocks, or with 1 and 1 the tokens.

    Never reads a length on the host. Those that lie on the device are clamped, so that wrong ones never lead out of the
    tensors, which have ``rows_q`` and ``rows_k`` rows.
    """
    if not info.packed and isinstance(info.seqlen_k, int):
        keys = 0 if info.seqlen_k < length else (info.seqlen_k - length) // stride + 1
        return Spans(info.batch_size, False, rows_q, rows_k, None, rows_q, keys, info.seqlen_k - rows_q)

    def blocks(lens: Tensor) -> Tensor:
        return torch.where(lens < length, 0, (lens - length) // stride + 1)

    if info.cu_q is not None and info.cu_k is not None:
        ends_q, ends_k = info.cu_q.clamp(0, rows_q), info.cu_k.clamp_min(0)
        q_row, q_len = ends_q[:-1], ends_q.diff().clamp_min(0)
        tokens = ends_k.diff().clamp_min(0)
        k_len = blocks(tokens)
        k_row = ends_k[:-1] if length == stride == 1 else k_len.cumsum(0, dtype=torch.int32) - k_len
        k_row = k_row.clamp_max(rows_k)
        batch = torch.zeros_like(q_row)
    else:
        assert isinstance(info.seqlen_k, Tensor)
        tokens = info.seqlen_k.clamp_min(0)
        batch = torch.arange(info.batch_size, device=tokens.device, dtype=torch.int32)
        q_row, q_len = torch.zeros_like(batch), torch.full_like(batch, rows_q)
        k_len, k_row = blocks(tokens), torch.zeros_like(batch)
    k_len = torch.minimum(k_len, rows_k - k_row)
    columns = torch.stack([batch, q_row, q_len, k_row, k_len, tokens - q_len], 1).to(torch.int32)
    table = torch.nn.functional.pad(columns, (0, 0, 0, 1))
    return Spans(len(batch), info.packed, rows_q, rows_k, table, rows_q, 0, 0)


def new_gradient(q: Tensor, spans: Spans) -> Tensor:
    """Room for the gradient of ``q``: 0 where rows may belong to no sequence, which nobody writes."""
    return torch.zeros_like(q) if spans.packed else torch.empty_like(q)


def new_shares(x: Tensor, shares: int, q: Tensor, spans: Spans) -> Tensor:
    """Room for shares of the gradient of ``x``, fp32 ``[shares, *x.shape]``: 0 where rows may be seen by no query of ``q``."""
    make = torch.empty if spans.covers_keys and q.shape[1] else torch.zeros
    return make(shares, *x.shape, dtype=torch.float32, device=x.device)
