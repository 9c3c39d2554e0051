"""Where the sequences of a call lie in its tensors: the one object in which batched, packed and cached calls differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nsa.config import NSAConfig


@dataclass(frozen=True)
class Segment:
    """Sequences of equal lengths, side by side in the tensors. Rows count along the tensors' second axis."""

    batch: slice
    q_start: int
    q_len: int
    k_start: int
    k_len: int
    cmp_start: int

    @property
    def offset(self) -> int:
        """Position of the first query: the queries are the last ``q_len`` of ``k_len`` positions."""
        return self.k_len - self.q_len


@dataclass(frozen=True)
class SeqInfo:
    """Offsets and lengths of every sequence of a call.

    Batched (``cu_q is None``): ``batch_size`` sequences of ``num_queries`` queries each and ``seqlen_k`` keys, an int or
    int32 ``[B]``. Packed: ``cu_q`` and ``cu_k`` int32 ``[num_seqs + 1]`` are row offsets into tensors with ``B == 1``.
    """

    batch_size: int
    num_queries: int
    seqlen_k: int | Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    def segments(self, cfg: NSAConfig) -> Iterator[Segment]:
        """The call as plain ranges. Reads lengths on the host: on a GPU this waits for the device."""
        if self.cu_q is not None and self.cu_k is not None:
            cu_q, cu_k, cmp_start = self.cu_q.tolist(), self.cu_k.tolist(), 0
            for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
                yield Segment(slice(0, 1), q0, q1 - q0, k0, k1 - k0, cmp_start)
                cmp_start += cfg.num_compressed_blocks(k1 - k0)
        elif isinstance(self.seqlen_k, int):
            if self.batch_size:
                yield Segment(slice(0, self.batch_size), 0, self.num_queries, 0, self.seqlen_k, 0)
        else:
            assert self.seqlen_k is not None
            for b, k_len in enumerate(self.seqlen_k.tolist()):
                yield Segment(slice(b, b + 1), 0, self.num_queries, 0, k_len, 0)
