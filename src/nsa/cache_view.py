"""Where an attention finds what a cache holds: in place for kernels that follow the block table, or as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.config import NSAConfig

Lengths = int | Tensor


@dataclass(frozen=True)
class WindowChunk:
    """The window branch of an append that was longer than a step, and up to ``w - 1`` tokens before it.

    Attributes:
        k, v: ``[B, rows, HK, D]`` and ``[B, rows, HK, DV]``.
        lengths: how many of the rows count.
        tokens: of the append, the last ones.
    """

    k: Tensor
    v: Tensor
    lengths: Lengths
    tokens: int


@dataclass(frozen=True)
class CacheView:
    """A cache as it is now; valid until the cache changes. In memory the heads of all keys and values come before the rows.

    Attributes:
        cfg: the cache's configuration.
        k_slc, v_slc: ``[pages, P, HK, D]`` and ``[pages, P, HK, DV]``: token ``t`` of a sequence is row ``t % P`` of its page
            ``t // P``. A contiguous cache has one page a sequence.
        k_cmp, v_cmp: ``[pages, P / d, HK, D]`` and ``[pages, P / d, HK, DV]``: block ``i`` lies with the stride in which it
            ends, stride ``i + l / d - 1`` of the sequence, so in the page where it ends.
        k_win, v_win: ``[B, R, HK, D]`` and ``[B, R, HK, DV]``: the newest tokens in a ring, token ``t`` in slot ``t % R``.
        table: int32 ``[B, max_pages]``, the pages of each sequence, -1 where there is none.
        lengths: int32 ``[B]`` on the device, tokens of each sequence.
        host_lengths: the same numbers on the host; inside a graph those of the time of capture.
        longest: the most tokens that each sequence had before it was cropped: the ring holds no older than ``longest - R``.
        max_seq_len: what no length passes.
        contiguous: whether sequence ``b`` is page ``b``.
        chunk: of the newest append, if it was longer than a step.
    """

    cfg: NSAConfig
    k_slc: Tensor
    v_slc: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor
    table: Tensor
    lengths: Tensor
    host_lengths: tuple[int, ...]
    longest: tuple[int, ...]
    max_seq_len: int
    contiguous: bool
    chunk: WindowChunk | None

    @property
    def seqlen_k(self) -> Lengths:
        """One number where all sequences have the same length, else ``lengths``."""
        return self.host_lengths[0] if len(set(self.host_lengths)) == 1 else self.lengths

    def selected(self) -> tuple[Tensor, Tensor]:
        """``[B, T, HK, D]`` and ``[B, T, HK, DV]``: as long as the longest sequence; a view if contiguous."""
        tokens = max(self.host_lengths)
        return self._unpaged(self.k_slc, 0, tokens), self._unpaged(self.v_slc, 0, tokens)

    def compressed(self) -> tuple[Tensor, Tensor]:
        """``[B, N, HK, D]`` and ``[B, N, HK, DV]``, likewise."""
        lead = self.cfg.block_length // self.cfg.block_stride - 1  # strides before the one in which block 0 ends
        stop = lead + self.cfg.num_compressed_blocks(max(self.host_lengths))
        return self._unpaged(self.k_cmp, lead, stop), self._unpaged(self.v_cmp, lead, stop)

    def window(self, queries: int) -> tuple[Tensor, Tensor, Lengths]:
        """Keys, values and their lengths, on which the window branch of the newest ``queries`` tokens is what it is on all.

        A window looks no further back than ``w - 1`` tokens, and only differences of positions matter to it.

        Raises:
            ValueError: the ring no longer holds all that these queries see.
        """
        if self.chunk is not None and queries <= self.chunk.tokens:
            return self.chunk.k, self.chunk.v, self.chunk.lengths
        longest = self.cfg.window_size + queries - 1
        for n, high in zip(self.host_lengths, self.longest):
            lost = max(0, high - self.k_win.shape[1]) - max(0, n - longest)
            if lost > 0:
                raise ValueError(
                    f"q must be at most the {queries - lost} tokens whose windows the cache still holds, got {queries}"
                )
        rows = min(longest, max(self.host_lengths))
        lens = self.seqlen_k
        lens = min(lens, longest) if isinstance(lens, int) else lens.clamp_max(longest)
        slots = (self.lengths - self.lengths.clamp_max(longest))[:, None] + torch.arange(rows, device=self.table.device)
        slots, batch = slots.long() % self.k_win.shape[1], torch.arange(len(slots), device=self.table.device)[:, None]
        return self.k_win[batch, slots], self.v_win[batch, slots], lens

    def _unpaged(self, pool: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop - 1`` of every sequence."""
        if self.contiguous:
            return pool[:, start:stop]
        pages = self.table[:, : -(-stop // pool.shape[1])].clamp_min(0)  # rows past a sequence's length may be anybody's
        return pool[pages.long()].flatten(1, 2)[:, start:stop]
