"""What a sequence leaves behind for its next token: all keys of one branch, blocks of another, a window of the third."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nsa import _dispatch, _validate
from nsa.cache_store import BLOCKS, POOLS, RINGS, STEP, TAIL, TOKENS, WINDOW, CacheStore
from nsa.cache_view import CacheView, WindowChunk
from nsa.config import NSAConfig
from nsa.decode_ops import decode_append, decode_blocks
from nsa.paging import BlockTable, PageAllocator

Compress = Callable[[Tensor], Tensor]


class NSACache:
    """Keys and values of ``batch_size`` sequences of up to ``max_seq_len`` tokens, for one layer.

    The selected branch is kept whole. Of the window branch a ring holds the newest ``w`` tokens; of the compressed branch the
    blocks are kept, and the last ``l - 1`` raw tokens for the blocks to come. Both rings have slack for ``max_crop`` and for a
    step of 16 tokens. All of it is allocated here; only what an ``append`` of more than 16 tokens brings to the window branch
    is held beside it, until the next call that changes the cache.

    Contiguous, every sequence has rows of its own. Paged, it has pages of ``page_size`` tokens out of a pool, and forked
    sequences share the pages of their common past; a page is copied when one of them writes to it. A compressed block lies in
    the page where it ends.

    Inside a CUDA graph ``append`` takes up to 16 tokens, and the host learns nothing: call ``reserve`` before each replay and
    ``advance`` after it, or let ``nsa.DecodeGraph`` do both. A replay without room writes nothing, and the next call that
    changes the cache raises.

    Args:
        cfg: the layer's configuration.
        batch_size: B, sequences.
        max_seq_len: tokens each sequence has room for.
        dtype, device: of every tensor that will be appended; default torch's.
        page_size: tokens of a page, a multiple of ``selection_block_size``; None is contiguous.
        max_crop: the most tokens that ``crop`` may roll back.
        allocator: hands out the pages of this cache alone, and says how many there are; default one for ``batch_size`` full
            sequences. Anything with the methods of ``PageAllocator`` will do.

    Raises:
        ValueError: a size that is not positive, a negative ``max_crop``, a ``page_size`` that cuts a selection block, an
            ``allocator`` without ``page_size``.
    """

    MAX_STEP = STEP  # tokens that may be appended at once inside a graph

    def __init__(
        self,
        cfg: NSAConfig,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        page_size: int | None = None,
        max_crop: int = 0,
        allocator: PageAllocator | None = None,
    ) -> None:
        _validate.config(cfg)
        if batch_size < 1 or max_seq_len < 1:
            raise ValueError(f"batch_size and max_seq_len must be positive, got {batch_size} and {max_seq_len}")
        if max_crop < 0:
            raise ValueError(f"max_crop must be at least 0, got {max_crop}")
        if page_size is not None and (page_size < 1 or page_size % cfg.selection_block_size):
            raise ValueError(
                f"page_size must be a multiple of selection_block_size={cfg.selection_block_size}, got {page_size}"
            )
        if page_size is None and allocator is not None:
            raise ValueError("allocator must be None without page_size: a contiguous cache has no pages")
        self.cfg, self.batch_size, self.max_seq_len = cfg, batch_size, max_seq_len
        self.page_size, self.max_crop = page_size, max_crop
        rows = page_size or cfg.num_selection_blocks(max_seq_len) * cfg.selection_block_size
        most = -(-max_seq_len // rows)
        if page_size is not None and allocator is None:
            allocator = PageAllocator(batch_size * most)
        self._store = CacheStore(cfg, BlockTable(batch_size, most, rows, allocator, device), max_crop, dtype, device)
        self._lengths, self._longest = [0] * batch_size, [0] * batch_size
        self._limit = torch.full((1,), max_seq_len, dtype=torch.int32, device=device)
        self._overflow = torch.zeros(1, dtype=torch.int32, device=device)
        self._chunk: WindowChunk | None = None
        self._dry = self._captured = False
        self._kernels = self._limit.is_cuda and _dispatch.supports("triton", self._limit.device, self.dtype, cfg) is None

    @property
    def device(self) -> torch.device:
        """Of all keys and values."""
        return self._limit.device

    @property
    def dtype(self) -> torch.dtype:
        """Of all keys and values."""
        return self._store.tensors["k_slc"].dtype

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, as far as the host was told."""
        return tuple(self._lengths)

    @property
    def allocator(self) -> PageAllocator:
        """Who holds which page."""
        return self._store.table.allocator

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: the kernels compute on this device, dtype and configuration."""
        return self._kernels and self.device.type == "cuda"

    @property
    def frozen(self) -> bool:
        """Whether the host learns nothing of what is appended: inside a CUDA graph's capture or a ``dry_run``."""
        return self._dry or (self._limit.is_cuda and torch.cuda.is_current_stream_capturing())

    def next_positions(self, count: int) -> Tensor:
        """Positions of the next ``count`` tokens of each sequence: int64 ``[B, count]``, on the device."""
        return self._store.positions(count)

    @torch.no_grad()
    def append(
        self,
        k_cmp: Tensor,
        v_cmp: Tensor,
        k_slc: Tensor,
        v_slc: Tensor,
        k_win: Tensor,
        v_win: Tensor,
        compress_k: Compress,
        compress_v: Compress,
    ) -> None:
        """Add ``T_new`` tokens to every sequence, and compress the blocks that they complete.

        Args:
            k_cmp, k_slc, k_win: keys ``[B, T_new, HK, D]``, none of them compressed yet.
            v_cmp, v_slc, v_win: values ``[B, T_new, HK, DV]``.
            compress_k, compress_v: what makes ``[b, N, HK, D]`` of ``[b, T, HK, D]``: the layer's ``BlockCompressor``.

        Raises:
            TypeError, ValueError: wrong shape, dtype or device, no room or too few free pages; nothing is written then.
            RuntimeError: a replayed graph had no room, or appended tokens that ``advance`` was not told of.
        """
        new = {"k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
        for name, x in new.items():
            like = self._store.tensors[name]
            shape = (self.batch_size, "T_new" if name == "k_cmp" else k_cmp.shape[1], *like.shape[2:])
            _validate.tensor(name, x, shape, ("the cache", like))
        added, frozen = k_cmp.shape[1], self.frozen
        if added == 0:
            return
        if frozen and added > STEP:
            raise ValueError(f"T_new must be at most {STEP} inside a graph, got {added}")
        if frozen:
            self._captured = self._captured or not self._dry
        else:
            self._check_replays()
            self.reserve(added)
        if self._kernels and added <= STEP:
            self._append_step(list(new.values()), compress_k, compress_v, frozen)
        else:
            self._append_rows(new, compress_k, compress_v, frozen)
        if not frozen:
            self._grow(added)

    def reserve(self, count: int) -> None:
        """Make sure of room for ``count`` more tokens of each sequence, in pages of its own; ``append`` does so itself.

        Raises:
            ValueError: no room, or too few free pages; nothing is changed then.
        """
        if max(self._lengths) + count > self.max_seq_len:
            raise ValueError(
                f"the cache has room for max_seq_len={self.max_seq_len} tokens, got {max(self._lengths)} + {count}"
            )
        self._store.copy_pages(self._store.table.reserve(self._lengths, [n + count for n in self._lengths]))

    def advance(self, count: int) -> None:
        """Note that a replayed graph has appended ``count`` tokens to every sequence."""
        self._chunk = None
        self._grow(count)

    def _grow(self, count: int) -> None:
        self._lengths = [n + count for n in self._lengths]
        self._longest = [max(a, b) for a, b in zip(self._longest, self._lengths)]

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Inside, ``append`` does what it does in a graph, but writes nothing: to warm up what will be captured."""
        self._dry = True
        self._limit.zero_()
        try:
            yield
        finally:
            self._dry = False
            self._limit.fill_(self.max_seq_len)
            self._overflow.zero_()

    def give_pages(self, sequence: int, pages: Sequence[int]) -> None:
        """Let ``sequence`` go on in ``pages``, which the caller took from ``allocator`` and leaves to the cache.

        Raises:
            ValueError: a contiguous cache; no such sequence; a page outside the pool, one that is free or given twice, or
                more pages than ``max_seq_len`` needs.
        """
        if self.page_size is None:
            raise ValueError("pages can only be given to a paged cache, got one without page_size")
        self._check_number("sequence", sequence)
        self._store.table.give(sequence, pages)

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Forget all but the first ``lengths`` tokens: one number for all sequences, or one each.

        Raises:
            ValueError: longer than the sequence is, negative, or further back than ``max_crop`` from its longest (a
                length of 0, a fresh start, is always allowed).
            RuntimeError: as ``append``.
        """
        self._check_replays()
        wanted = [lengths] * self.batch_size if isinstance(lengths, int) else [int(n) for n in lengths]
        if len(wanted) != self.batch_size:
            raise ValueError(f"lengths must be one number or {self.batch_size}, got {len(wanted)}")
        for b, n in enumerate(wanted):
            if not 0 <= n <= self._lengths[b]:
                raise ValueError(f"lengths must be between 0 and sequence {b}'s {self._lengths[b]} tokens, got {n}")
            if 0 < n < self._longest[b] - self.max_crop:
                raise ValueError(
                    f"crop from {self._longest[b]} tokens to {n} needs max_crop >= {self._longest[b] - n}, got {self.max_crop}"
                )
        self._store.table.keep(wanted)
        self._set_lengths(wanted, [high if n else 0 for n, high in zip(wanted, self._longest)])

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Sequence ``b`` becomes what sequence ``index[b]`` was (beam search); paged, sequences share pages.

        Raises:
            ValueError: ``index`` is anything but ``batch_size`` sequence numbers.
            RuntimeError: as ``append``.
        """
        self._check_replays()
        order = [int(i) for i in index]
        if len(order) != self.batch_size or not all(0 <= i < self.batch_size for i in order):
            raise ValueError(f"index must hold {self.batch_size} sequence numbers below {self.batch_size}, got {order}")
        self._store.become(order, self._lengths)
        self._set_lengths([self._lengths[i] for i in order], [self._longest[i] for i in order])

    def fork(self, src: int, dst: int) -> None:
        """Sequence ``dst`` becomes a copy of sequence ``src``; paged, it shares the pages.

        Raises:
            ValueError: ``src`` or ``dst`` is no sequence's number.
            RuntimeError: as ``append``.
        """
        self._check_number("src", src)
        self._check_number("dst", dst)
        self.reorder([src if b == dst else b for b in range(self.batch_size)])

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all that the sequences hold, for ``load_state_dict`` of a cache of the same configuration and ``max_crop``.

        Contiguous and paged caches have the same state.

        Raises:
            RuntimeError: as ``append``.
        """
        self._check_replays()
        view = self.view()
        held = dict(zip(POOLS, (*view.selected(), *view.compressed()))) | {name: self._store.tensors[name] for name in RINGS}
        state = {name: x.clone() for name, x in held.items()}
        return {**state, "lengths": torch.tensor(self._lengths), "longest": torch.tensor(self._longest)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold what ``state_dict`` returned.

        Raises:
            ValueError: a key is missing or of another shape, or the sequences don't fit; nothing is written then.
        """
        missing = [name for name in (*POOLS, *RINGS, "lengths", "longest") if name not in state]
        if missing:
            raise ValueError(f"state must hold {', '.join(missing)}")
        lengths, longest = state["lengths"].tolist(), state["longest"].tolist()
        tokens, store = max(lengths), self._store
        if tokens > self.max_seq_len:
            raise ValueError(f"state must have at most max_seq_len={self.max_seq_len} tokens, got {tokens}")
        rows = dict.fromkeys(TOKENS, tokens) | dict.fromkeys(BLOCKS, self.cfg.num_compressed_blocks(tokens))
        for name in (*POOLS, *RINGS):
            mine = store.tensors[name]
            shape = [self.batch_size, rows.get(name, mine.shape[1]), *mine.shape[2:]]
            if list(state[name].shape) != shape:
                raise ValueError(f"state[{name!r}] must have shape {shape}, got {list(state[name].shape)}")
        store.table.replace(lengths)
        self._set_lengths(lengths, longest)
        for name in RINGS:
            store.tensors[name].copy_(state[name])
        for name in POOLS:
            tokens_a_row, lead = (1, 0) if name in TOKENS else (self.cfg.block_stride, store.lead)
            at = (torch.arange(rows[name], device=store.lengths.device) + lead).expand(self.batch_size, -1)
            keep = (at + 1) * tokens_a_row <= store.lengths[:, None]
            store.write_pages(name, at, state[name].to(store.tensors[name]), keep)

    def view(self) -> CacheView:
        """What an attention over the cache reads."""
        t, table = self._store.tensors, self._store.table
        return CacheView(
            self.cfg, t["k_slc"], t["v_slc"], t["k_cmp"], t["v_cmp"], t["k_win"], t["v_win"], table.device,
            self._store.lengths, self.lengths, tuple(self._longest), self.max_seq_len, table.fixed, self._chunk,
        )  # fmt: skip

    def _append_step(self, new: list[Tensor], compress_k: Compress, compress_v: Compress, frozen: bool) -> None:
        """A step by kernels: one launch where blocks are means, and one more before a compressor that learned."""
        t, store, cfg, added = self._store.tensors, self._store, self.cfg, new[0].shape[1]
        made = None
        if not all(getattr(compress, "kind", None) == "mean" for compress in (compress_k, compress_v)):
            count = (added - 1) // cfg.block_stride + 1 if frozen else self._blocks_completed_by(added)
            made = [x[:, :0] for x in new[:2]]
            if count:
                tails = (t[name] for name in TAIL)
                raw = decode_blocks(new[0], new[1], *tails, store.lengths, count, cfg.block_length, cfg.block_stride)
                made = [
                    self._compressed(name, compress, x.flatten(0, 1)).view(self.batch_size, count, *x.shape[3:])
                    for name, compress, x in zip("kv", (compress_k, compress_v), raw)
                ]
        decode_append(
            new, made, [t[name] for name in POOLS], [t[name] for name in RINGS], store.table.device, store.lengths, self._limit,
            self._overflow, not store.table.fixed, cfg.block_length, cfg.block_stride,
        )  # fmt: skip
        self._chunk = None

    def _append_rows(self, new: dict[str, Tensor], compress_k: Compress, compress_v: Compress, frozen: bool) -> None:
        """Any number of tokens; ``frozen``, what the device finds no room for goes nowhere."""
        store, added, keep = self._store, new["k_cmp"].shape[1], None
        if frozen:
            room = store.room(added, self._limit)
            self._overflow |= (~room).any()
            keep = room[:, None]
        chunk = self._window_of_chunk(new["k_win"], new["v_win"]) if added > STEP else None
        self._append_blocks("k", new["k_cmp"], compress_k, keep)
        self._append_blocks("v", new["v_cmp"], compress_v, keep)
        positions = store.positions(added)
        for name in TOKENS:
            store.write_pages(name, positions, new[name], keep)
        for ring, name in zip((*WINDOW, *TAIL), (*WINDOW, *BLOCKS)):
            store.write_ring(ring, positions, new[name], keep)
        store.lengths += added if keep is None else added * keep[:, 0]
        self._chunk = chunk

    def _append_blocks(self, name: str, new: Tensor, compress: Compress, keep: Tensor | None) -> None:
        """Compress the blocks that ``new`` completes in the sequences of ``keep [B, 1]``; None where the host knows lengths."""
        cfg, store, added = self.cfg, self._store, new.shape[1]
        length, stride = cfg.block_length, cfg.block_stride
        count, held = (added - 1) // stride + 1, length - 1
        if keep is None:
            count, held = self._blocks_completed_by(added), min(held, max(self._lengths))
        if count == 0:
            return
        blocks = store.next_blocks(count)
        start: Tensor | int = blocks[:, 0] * stride - store.lengths + held
        if keep is None and self._level:
            start = cfg.num_compressed_blocks(self._lengths[0]) * stride - self._lengths[0] + held
        made = self._compressed(name, compress, store.newest(f"{name}_tail", held, new, start, (count - 1) * stride + length))
        done = blocks * stride + length <= store.lengths[:, None] + added
        store.write_pages(f"{name}_cmp", blocks + store.lead, made, done if keep is None else done & keep)

    def _blocks_completed_by(self, added: int) -> int:
        """The most blocks that ``added`` tokens complete in a sequence."""
        blocks = self.cfg.num_compressed_blocks
        return max(blocks(n + added) - blocks(n) for n in self._lengths)

    def _compressed(self, name: str, compress: Compress, tokens: Tensor) -> Tensor:
        """What the caller's compressor makes of ``tokens [b, T, HK, D]``, checked."""
        made, shape = compress(tokens), (len(tokens), self.cfg.num_compressed_blocks(tokens.shape[1]), *tokens.shape[2:])
        return _validate.tensor(f"compress_{name}'s blocks", made, shape, ("the cache", tokens))

    def _window_of_chunk(self, k_win: Tensor, v_win: Tensor) -> WindowChunk:
        """What the windows of a chunk's queries reach: the chunk, and ``w - 1`` tokens before it."""
        most, lengths, tokens = self.cfg.window_size - 1, self._store.lengths, k_win.shape[1]
        held = min(most, max(self._lengths))
        rows = held + tokens
        start: Tensor | int = 0 if self._level else (held - lengths.long()).clamp_min(0)
        k, v = (self._store.newest(name, held, x, start, rows) for name, x in zip(WINDOW, (k_win, v_win)))
        return WindowChunk(k, v, rows if self._level else lengths.clamp_max(most) + tokens, tokens)

    @property
    def _level(self) -> bool:
        """Whether all sequences are equally long."""
        return len(set(self._lengths)) == 1

    def _set_lengths(self, lengths: list[int], longest: list[int]) -> None:
        self._lengths, self._longest, self._chunk = lengths, longest, None
        self._store.set_lengths(lengths)

    def _check_number(self, name: str, sequence: int) -> None:
        if not 0 <= sequence < self.batch_size:
            raise ValueError(f"{name} must be a sequence number below {self.batch_size}, got {sequence}")

    def _check_replays(self) -> None:
        """Compare with the device, which may have appended without the host. Only a cache that was captured waits for that."""
        if not self._captured:
            return
        overflow, lengths, told = bool(self._overflow.item()), self._store.lengths.tolist(), self._lengths
        if overflow or lengths != told:
            self._overflow.zero_()
            self._lengths = lengths
            self._longest = [max(a, b) for a, b in zip(self._longest, lengths)]
        if overflow:
            raise RuntimeError(f"a replayed graph had no room or no page and wrote nothing; the lengths are {lengths}")
        if lengths != told:
            raise RuntimeError(f"replayed graphs appended tokens that advance() was not told of: {lengths} after {told}")
