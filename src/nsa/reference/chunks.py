"""Work through the queries in chunks, so that memory stays bounded whatever the length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa.config import NSAConfig
from nsa.layout import Segment, SeqInfo

# Scores held at a time. A chunk of 2^21 (8 MiB in fp32) stays in the caches of a CPU: twice as fast as 2^23.
CHUNK_SCORES = 1 << 21
# Past this many scores a call forgets them and its backward computes them again.
KEPT_SCORES = 1 << 25


@dataclass(frozen=True)
class Chunk:
    """Queries ``rows`` of a segment, at positions ``start .. stop - 1`` of its sequences."""

    rows: slice
    start: int
    stop: int

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.start, self.stop, device=device)


def chunks(segment: Segment, keys_seen: int, heads: int) -> Iterator[Chunk]:
    """Cut a segment so that ``heads`` heads over ``keys_seen`` keys a query stay within ``CHUNK_SCORES``."""
    batch = segment.batch.stop - segment.batch.start
    size = max(1, CHUNK_SCORES // max(1, batch * heads * keys_seen))
    for row in range(segment.q_start, segment.q_start + segment.q_len, size):
        stop = min(row + size, segment.q_start + segment.q_len)
        shift = segment.offset - segment.q_start
        yield Chunk(slice(row, stop), row + shift, stop + shift)


def bounded(step: Callable[..., Any], segment: Segment, keys_seen: int, heads: int) -> Callable[..., Any]:
    """``step``, or for a long segment a ``step`` whose intermediates are recomputed in the backward pass."""
    batch = segment.batch.stop - segment.batch.start
    if not torch.is_grad_enabled() or batch * heads * segment.q_len * keys_seen <= KEPT_SCORES:
        return step

    def recomputed(*args: Any) -> Any:
        return checkpoint(step, *args, use_reentrant=False, preserve_rng_state=False)

    return recomputed


def last_first(step: Callable[[Chunk], Tensor], pieces: Iterable[Chunk]) -> list[Tensor]:
    """``step`` of every chunk, in their order, computed from the last to the first.

    Causal chunks grow. Going down, each fits where the one before lay; going up, none does, and the holes between the results
    that are kept took three times the memory at 16,384 tokens.
    """
    return [step(chunk) for chunk in reversed(list(pieces))][::-1]


def over_segments(
    info: SeqInfo,
    cfg: NSAConfig,
    read: tuple[Tensor, ...],
    step: Callable[[Segment], list[Tensor]],
    fill: float,
    width: tuple[int, ...],
) -> Tensor:
    """Join what ``step`` returns for each segment, a list of ``[b, rows, *width]``, to one ``[B, TQ, *width]``.

    ``read``: the tensors that ``step`` reads, q first. Rows of q that belong to no sequence are filled with ``fill``.
    """
    q = read[0]
    parts = []
    for segment in info.segments(cfg):
        pieces = step(segment)
        if pieces:
            parts.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1))
    out = torch.cat(parts, 1 if info.packed else 0) if parts else None
    if out is not None and out.shape[1] == q.shape[1]:
        return out
    missing = q.shape[1] - (0 if out is None else out.shape[1])
    rest = torch.full(
        (q.shape[0], missing, *width), fill, device=q.device, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    if out is None:  # nothing was read: gradients are zero all the same, not missing
        return rest + sum(x[:, :0].sum().to(rest.dtype) for x in read)
    return torch.cat([out, rest.to(out.dtype)], 1)
