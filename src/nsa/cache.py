"""What a sequence leaves behind for its next token: keys and values of the three branches, and attention over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nsa import _validate
from nsa.config import NSAConfig
from nsa.functional import nsa_attention

Compress = Callable[[Tensor], Tensor]


class NSACache:
    """Keys and values of ``batch_size`` sequences of up to ``max_seq_len`` tokens, for one layer.

    The whole history of every branch is kept, in buffers allocated at construction. Lengths are kept on the host.

    Args:
        cfg: the layer's configuration.
        batch_size: B, sequences.
        max_seq_len: tokens each sequence has room for.
        dtype, device: of every tensor that will be appended; default torch's.
        page_size: None; a paged layout is not available.
        max_crop: the most tokens that ``crop`` may roll back.

    Raises:
        ValueError: a size that is not positive, a negative ``max_crop``.
        NotImplementedError: a ``page_size``.
    """

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
    ) -> None:
        _validate.config(cfg)
        if batch_size < 1 or max_seq_len < 1:
            raise ValueError(f"batch_size and max_seq_len must be positive, got {batch_size} and {max_seq_len}")
        if max_crop < 0:
            raise ValueError(f"max_crop must be at least 0, got {max_crop}")
        if page_size is not None:
            raise NotImplementedError(f"page_size must be None: paged caches are not available, got {page_size}")
        self.cfg, self.batch_size, self.max_seq_len, self.max_crop = cfg, batch_size, max_seq_len, max_crop
        blocks = cfg.num_compressed_blocks(max_seq_len)

        def room(rows: int, dim: int) -> Tensor:
            return torch.zeros(batch_size, rows, cfg.num_kv_heads, dim, dtype=dtype, device=device)

        self._raw = {name: room(max_seq_len, cfg.head_dim if name[0] == "k" else cfg.value_dim) for name in _RAW}
        self._compressed = {"k": room(blocks, cfg.head_dim), "v": room(blocks, cfg.value_dim)}
        self._lengths = [0] * batch_size
        self._longest = [0] * batch_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(self._lengths)

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
            TypeError, ValueError: wrong shape, dtype or device, or no room; nothing is written then.
        """
        new = dict(zip(_RAW, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)))
        for name, x in new.items():
            room = self._raw[name]
            shape = (self.batch_size, "T_new" if name == "k_cmp" else k_cmp.shape[1], *room.shape[2:])
            _validate.tensor(name, x, shape, ("the cache", room))
        added = k_cmp.shape[1]
        if max(self._lengths) + added > self.max_seq_len:
            raise ValueError(
                f"the cache has room for max_seq_len={self.max_seq_len} tokens, got {max(self._lengths)} + {added}"
            )
        for batch, length in self._runs():
            for name, x in new.items():
                self._raw[name][batch, length : length + added] = x[batch]
            self._compress("k", compress_k, batch, length, length + added)
            self._compress("v", compress_v, batch, length, length + added)
        self._lengths = [n + added for n in self._lengths]
        self._longest = [max(a, b) for a, b in zip(self._longest, self._lengths)]

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Forget all but the first ``lengths`` tokens: one number for all sequences, or one each.

        Raises:
            ValueError: longer than the sequence is, negative, or further back than ``max_crop`` from its longest (a
                length of 0, a fresh start, is always allowed).
        """
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
        self._lengths = wanted
        self._longest = [high if n else 0 for n, high in zip(wanted, self._longest)]

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Sequence ``b`` becomes what sequence ``index[b]`` was (beam search)."""
        order = [int(i) for i in index]
        if len(order) != self.batch_size or not all(0 <= i < self.batch_size for i in order):
            raise ValueError(f"index must hold {self.batch_size} sequence numbers below {self.batch_size}, got {order}")
        for x in self._tensors().values():
            x.copy_(x[order])
        self._lengths = [self._lengths[i] for i in order]
        self._longest = [self._longest[i] for i in order]

    def fork(self, src: int, dst: int) -> None:
        """Sequence ``dst`` becomes a copy of sequence ``src``."""
        for name, i in (("src", src), ("dst", dst)):
            if not 0 <= i < self.batch_size:
                raise ValueError(f"{name} must be a sequence number below {self.batch_size}, got {i}")
        for x in self._tensors().values():
            x[dst] = x[src]
        self._lengths[dst], self._longest[dst] = self._lengths[src], self._longest[src]

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all that the sequences hold, for ``load_state_dict`` of a cache of the same configuration."""
        tokens = max(self._lengths)
        rows = {"compressed": self.cfg.num_compressed_blocks(tokens), "raw": tokens}
        state = {name: x[:, : rows[name.split(".")[0]]].clone() for name, x in self._tensors().items()}
        return {**state, "lengths": torch.tensor(self._lengths), "longest": torch.tensor(self._longest)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold what ``state_dict`` returned.

        Raises:
            ValueError: a key is missing or of another shape, or the sequences don't fit; nothing is written then.
        """
        mine = self._tensors()
        missing = [name for name in (*mine, "lengths", "longest") if name not in state]
        if missing:
            raise ValueError(f"state must hold {', '.join(missing)}")
        for name, x in mine.items():
            y = state[name]
            if y.shape[0] != x.shape[0] or y.shape[1] > x.shape[1] or y.shape[2:] != x.shape[2:]:
                raise ValueError(f"state[{name!r}] must fit into {list(x.shape)}, got {list(y.shape)}")
        tokens = int(state["lengths"].max())
        blocks, got = self.cfg.num_compressed_blocks(tokens), state["compressed.k"].shape[1]
        if got != blocks:
            raise ValueError(f"state['compressed.k'] must hold {blocks} blocks for {tokens} tokens, got {got}")
        for name, x in mine.items():
            x[:, : state[name].shape[1]] = state[name]
        self._lengths, self._longest = state["lengths"].tolist(), state["longest"].tolist()

    def view(self) -> tuple[dict[str, Tensor], int | Tensor]:
        """What ``nsa_attention`` reads: its key and value arguments by name, and ``seqlen_k``."""
        tokens = max(self._lengths)
        blocks = self.cfg.num_compressed_blocks(tokens)
        tensors = {name: self._raw[name][:, :tokens] for name in ("k_slc", "v_slc", "k_win", "v_win")}
        tensors |= {f"{name}_cmp": x[:, :blocks] for name, x in self._compressed.items()}
        if min(self._lengths) == tokens:
            return tensors, tokens
        return tensors, torch.tensor(self._lengths, dtype=torch.int32, device=self._raw["k_slc"].device)

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """Sequences that can be written together, and their length."""
        if len(set(self._lengths)) == 1:
            yield slice(0, self.batch_size), self._lengths[0]
        else:
            for b, length in enumerate(self._lengths):
                yield slice(b, b + 1), length

    def _compress(self, name: str, compress: Compress, batch: slice, before: int, after: int) -> None:
        first, last = self.cfg.num_compressed_blocks(before), self.cfg.num_compressed_blocks(after)
        if last > first:
            tokens = self._raw[f"{name}_cmp"][batch, first * self.cfg.block_stride : after]
            self._compressed[name][batch, first:last] = compress(tokens)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"raw.{k}": x for k, x in self._raw.items()} | {f"compressed.{k}": x for k, x in self._compressed.items()}


_RAW = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")


def cached_attention(
    q: Tensor, gates: Tensor, cache: NSACache, *, return_block_indices: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention of the newest tokens over all that the cache holds.

    Args:
        q: ``[B, TQ, HQ, D]``, queries of the last TQ tokens, which were appended before.
        gates: ``[B, TQ, HQ, 3]``, already through the sigmoid.
        cache: the layer's cache.
        return_block_indices: also return int32 ``[B, TQ, HK, n]``.
        backend: as in ``nsa_attention``.

    Returns:
        ``[B, TQ, HQ, DV]``: what the full forward over the same tokens gives at these positions.

    Raises:
        TypeError, ValueError: wrong shape, dtype or device, or more queries than a sequence has tokens.
    """
    if not isinstance(cache, NSACache):
        raise TypeError(f"cache must be an nsa.NSACache, got {type(cache).__name__}")
    tensors, seqlen_k = cache.view()
    if isinstance(q, Tensor) and q.dim() == 4:
        if q.shape[0] != cache.batch_size:
            raise ValueError(f"q must have the cache's batch size {cache.batch_size}, got {q.shape[0]}")
        if q.shape[1] > min(cache.lengths):
            raise ValueError(f"q must be at most the {min(cache.lengths)} tokens that were appended, got {q.shape[1]}")
    k = tensors
    return nsa_attention(
        q, k["k_cmp"], k["v_cmp"], k["k_slc"], k["v_slc"], k["k_win"], k["v_win"], gates, cache.cfg,
        seqlen_k=seqlen_k, return_block_indices=return_block_indices, backend=backend,
    )  # type: ignore[call-overload]  # fmt: skip
