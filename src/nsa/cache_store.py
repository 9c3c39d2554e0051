"""The tensors of a cache, and in which row of them a token or a block lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.paging import BlockTable

STEP = 16  # tokens that a step may append inside a graph; the rings have slack for it
TOKENS, BLOCKS = ("k_slc", "v_slc"), ("k_cmp", "v_cmp")
POOLS = (*TOKENS, *BLOCKS)
WINDOW, TAIL = ("k_win", "v_win"), ("k_tail", "v_tail")
RINGS = (*WINDOW, *TAIL)


class CacheStore:
    """Pools ``[pages, rows, HK, D or DV]`` that the block table leads into, and rings ``[B, slots, HK, D or DV]``.

    In memory the heads come before the rows, but in the tails.

    Rows are computed on the device from lengths on the device, so that a graph that was captured once writes to the right ones
    at every replay.

    Attributes:
        table: the pages of each sequence.
        lengths: int32 ``[B]``, on the device.
        tensors: the pools and rings by name.
    """

    def __init__(
        self, cfg: NSAConfig, table: BlockTable, max_crop: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.cfg, self.table = cfg, table
        pages, batch = table.allocator.num_pages, len(table.pages)
        shapes = {
            "slc": (pages, table.page_size),
            "cmp": (pages, table.page_size // cfg.block_stride),
            "win": (batch, cfg.window_size + max_crop + STEP - 1),
            "tail": (batch, cfg.block_length - 1 + max_crop + STEP),
        }
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.tensors: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}  # the same memory, and one more row for what must not be written
        for name in (*POOLS, *RINGS):
            first, rows = shapes[name[2:]]
            heads, dim = cfg.num_kv_heads, cfg.head_dim if name[0] == "k" else cfg.value_dim
            self._rows[name] = torch.zeros(first * rows * heads + 1, dim, dtype=dtype, device=device)
            held = self._rows[name][:-1]
            # An attention reads rows of one head: they lie side by side. A tail is read for all heads.
            apart = name not in TAIL
            self.tensors[name] = (
                held.view(first, heads, rows, dim).transpose(1, 2) if apart else held.view(first, rows, heads, dim)
            )

    @property
    def lead(self) -> int:
        """Strides before the one in which block 0 ends."""
        return self.cfg.block_length // self.cfg.block_stride - 1

    def positions(self, count: int) -> Tensor:
        """Of the next ``count`` tokens: int64 ``[B, count]``."""
        return self.lengths.long()[:, None] + torch.arange(count, device=self.lengths.device)

    def next_blocks(self, count: int) -> Tensor:
        """The next ``count`` compressed blocks of each sequence: int64 ``[B, count]``."""
        done = ((self.lengths.long() - self.cfg.block_length) // self.cfg.block_stride + 1).clamp_min(0)
        return done[:, None] + torch.arange(count, device=self.lengths.device)

    def write_pages(self, name: str, index: Tensor, x: Tensor, keep: Tensor | None) -> None:
        """Rows ``index [B, n]`` of each sequence, tokens or strides, become ``x [B, n, HK, D]`` where ``keep [B, n]`` holds."""
        per_page = self.tensors[name].shape[1]
        pages = self.table.device.gather(1, (index // per_page).clamp_max(self.table.max_pages - 1))
        self._write(name, pages.clamp_min(0), index % per_page, x, keep)

    def write_ring(self, name: str, positions: Tensor, x: Tensor, keep: Tensor | None) -> None:
        """The slots of tokens ``positions [B, n]`` become ``x [B, n, HK, D]``; of more than a ring holds, only the newest."""
        batch, slots = self.tensors[name].shape[:2]
        old = max(0, positions.shape[1] - slots)
        self._write(name, torch.arange(batch, device=positions.device)[:, None], positions[:, old:] % slots, x[:, old:], keep)

    def newest(self, name: str, count: int, new: Tensor, start: Tensor | int, rows: int) -> Tensor:
        """``[B, rows, HK, D]`` from place ``start``, an int or int64 ``[B]``, of each sequence's last ``count`` tokens, out of
        a ring, with ``new`` behind them. Places past those hold anything.
        """
        ring = self.tensors[name]
        batch = torch.arange(len(ring), device=ring.device)[:, None]
        both = torch.cat([ring[batch, (self.positions(count) - count) % ring.shape[1]], new], 1) if count else new
        if isinstance(start, int):
            return both[:, start : start + rows]
        places = start[:, None] + torch.arange(rows, device=ring.device)
        return both[batch, places.clamp_max(both.shape[1] - 1)]

    def room(self, count: int, limit: Tensor) -> Tensor:
        """Which sequences have room and pages for ``count`` more tokens, at most ``limit [1]`` in all: bool ``[B]``."""
        ends = self.lengths + count
        last = ((ends - 1) // self.table.page_size).clamp_max(self.table.max_pages - 1)
        return (ends <= limit) & (self.table.device.gather(1, last.long()[:, None])[:, 0] >= 0)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """The second page of each pair becomes a copy of the first."""
        if pairs:
            old, new = (self._index(pages) for pages in zip(*pairs))
            for name in POOLS:
                self.tensors[name][new] = self.tensors[name][old]

    def become(self, order: Sequence[int], lengths: Sequence[int]) -> None:
        """Sequence ``b`` holds what sequence ``order[b]`` held, ``lengths[order[b]]`` tokens."""
        moved = [b for b, i in enumerate(order) if b != i]
        if not moved:
            return
        to, of = self._index(moved), self._index([order[b] for b in moved])
        rows = dict.fromkeys(TOKENS, max(lengths)) | dict.fromkeys(BLOCKS, max(lengths) // self.cfg.block_stride)
        for name in (*POOLS, *RINGS) if self.table.fixed else RINGS:
            x = self.tensors[name]
            x[to, : rows.get(name)] = x[of, : rows.get(name)]
        if not self.table.fixed:
            self.table.become(order, lengths)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)

    def _write(self, name: str, page: Tensor, row: Tensor, x: Tensor, keep: Tensor | None) -> None:
        """Row ``row`` of ``page``, for all heads: both ``[B, n]`` or broadcast to it."""
        store = self._rows[name]
        per_page, per_row, per_head = (stride // store.shape[1] for stride in self.tensors[name].stride()[:3])
        head = torch.arange(x.shape[2], device=row.device)
        at = (page * per_page + row * per_row)[..., None] + head * per_head  # [B, n, HK]
        if keep is not None:
            at = torch.where(keep[..., None], at, len(store) - 1)
        store.index_copy_(0, at.flatten(), x.flatten(0, 2))

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers).to(self.lengths.device, non_blocking=True)
