"""The streaming API: one query at a time over keys that the caller keeps, with a circular window buffer here."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from nsa import _validate
from nsa.config import NSAConfig
from nsa.functional import combine, compress_blocks, compressed_attention, select_blocks, selected_attention, window_attention

Weights = tuple[Tensor, ...]


class NSAContext:
    """Decode steps of one sequence. Python's counterpart of ``NSAContext`` in ``nsa/nsa.h``.

    A fresh context compresses by the mean and weighs each branch by 1/3. Before token ``t`` is computed, hand it to
    ``update_window``; until the window holds ``min(w, seq_len)`` tokens, the tail of ``keys`` and ``values`` stands in.

    Args:
        cfg: head sizes, block sizes and counts; ``create_default_config`` makes one.
        incremental: compress only the blocks that were completed since the last call instead of all of ``keys``. ``keys``
            must then only grow between two calls of ``reset``.
        backend: as in ``nsa_attention``.
    """

    def __init__(self, cfg: NSAConfig, *, incremental: bool = False, backend: str | None = None) -> None:
        _validate.config(cfg)
        self.cfg, self.incremental, self.backend = cfg, incremental, backend
        self._gate: Tensor | None = None
        self._compression: dict[str, tuple[Tensor | None, Weights]] = {"k": (None, ()), "v": (None, ())}
        self._freed = False
        self.reset()

    def reset(self) -> None:
        """Forget the window and what was compressed; weights stay."""
        self._alive()
        self._ring: tuple[Tensor, Tensor] | None = None
        self._seen = 0
        self._compressed: tuple[Tensor, Tensor] | None = None
        self._compressed_len = 0

    def free(self) -> None:
        """Let go of all memory. Any later call is an error; freeing twice is not."""
        self._ring = self._compressed = self._gate = None
        self._compression = {}
        self._freed = True

    def __enter__(self) -> NSAContext:
        self._alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.free()

    def set_gate_weights(self, weight: Tensor | None) -> None:
        """Gates ``sigmoid(weight @ q)`` of each head's query, ``weight [3, D]``; None: 1/3 each."""
        self._alive()
        if weight is not None:
            _validate.tensor("weight", weight, (3, self.cfg.head_dim))
        self._gate = weight

    def set_compression_weights(
        self,
        k_embedding: Tensor | None = None,
        k_weights: Weights = (),
        v_embedding: Tensor | None = None,
        v_weights: Weights = (),
    ) -> None:
        """The compressors' weights, as ``compress_blocks`` takes them; without any, the mean. Forgets what was compressed."""
        self._alive()
        self._compression = {"k": (k_embedding, tuple(k_weights)), "v": (v_embedding, tuple(v_weights))}
        self._compressed, self._compressed_len = None, 0

    @torch.no_grad()
    def update_window(self, new_keys: Tensor, new_values: Tensor) -> None:
        """Write the newest tokens into the circular buffer.

        Args:
            new_keys: ``[num_new, HK, D]``, or ``[num_new, D]`` where HK is 1.
            new_values: ``[num_new, HK, DV]`` or ``[num_new, DV]``.

        Raises:
            TypeError, ValueError: wrong shape, dtype or device.
            RuntimeError: the context was freed.
        """
        self._alive()
        k, v = self._keys_values("new_keys", new_keys, "new_values", new_values)
        w = self.cfg.window_size
        if self._ring is None:
            self._ring = k.new_zeros(w, *k.shape[1:]), v.new_zeros(w, *v.shape[1:])
        for name, x, ring in (("new_keys", k, self._ring[0]), ("new_values", v, self._ring[1])):
            _validate.tensor(name, x, (len(x), *ring.shape[1:]), ("the window", ring))
        kept = min(len(k), w)
        slots = torch.arange(self._seen + len(k) - kept, self._seen + len(k), device=k.device) % w
        self._ring[0][slots], self._ring[1][slots] = k[len(k) - kept :], v[len(v) - kept :]
        self._seen += len(k)

    @torch.no_grad()
    def compute_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the newest token, position ``seq_len - 1``.

        Args:
            query: ``[HQ, D]``.
            keys: ``[seq_len, HK, D]``, or ``[seq_len, D]`` where HK is 1: all tokens so far, this one included.
            values: ``[seq_len, HK, DV]`` or ``[seq_len, DV]``.

        Returns:
            ``[HQ, DV]`` in the query's dtype.

        Raises:
            TypeError, ValueError: wrong shape, dtype or device, no token, or fewer keys than an incremental context has seen.
            RuntimeError: the context was freed.
        """
        self._alive()
        cfg, backend = self.cfg, self.backend
        q = _validate.tensor("query", query, (cfg.num_heads, cfg.head_dim))[None, None]
        k, v = self._keys_values("keys", keys, "values", values)
        _validate.tensor("keys", k, tuple(k.shape), ("query", query))
        if len(k) < 1:
            raise ValueError("keys must hold at least the query's own token, got none")
        k_cmp, v_cmp = self._compress(k, v)
        o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, cfg, seqlen_k=len(k), backend=backend)
        indices = select_blocks(q, k_cmp, lse, cfg, seqlen_k=len(k), backend=backend)
        o_slc = selected_attention(q, k[None], v[None], indices, cfg, backend=backend)
        k_win, v_win = self._window(k, v)
        o_win = window_attention(q, k_win[None], v_win[None], cfg, backend=backend)
        return combine(o_cmp, o_slc, o_win, self._gates(q), backend=backend)[0, 0]

    def _gates(self, q: Tensor) -> Tensor:
        if self._gate is None:
            return q.new_full((*q.shape[:3], 3), 1 / 3, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        return torch.nn.functional.linear(q, self._gate.to(q.device, q.dtype)).sigmoid()

    def _window(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w = self.cfg.window_size
        size = min(w, len(k))
        if self._ring is None or self._seen < size:
            return k[-size:], v[-size:]
        slots = torch.arange(self._seen - size, self._seen, device=k.device) % w
        return self._ring[0][slots], self._ring[1][slots]

    def _compress(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``[1, N, HK, D]`` and ``[1, N, HK, DV]`` of all tokens, reusing what an incremental context has."""
        start = 0
        if self.incremental:
            if len(k) < self._compressed_len:
                raise ValueError(f"keys must not shrink, got {len(k)} after {self._compressed_len}; call reset() first")
            start = self.cfg.num_compressed_blocks(self._compressed_len)
        first = start * self.cfg.block_stride
        fresh = tuple(
            compress_blocks(x[None, first:], self.cfg, *self._compression[name], backend=self.backend)
            for name, x in (("k", k), ("v", v))
        )
        if self.incremental and self._compressed is not None:
            fresh = tuple(torch.cat(pair, 1) for pair in zip(self._compressed, fresh))
        if self.incremental:
            self._compressed, self._compressed_len = (fresh[0], fresh[1]), len(k)
        return fresh[0], fresh[1]

    def _keys_values(self, k_name: str, k: Tensor, v_name: str, v: Tensor) -> tuple[Tensor, Tensor]:
        cfg = self.cfg
        if cfg.num_kv_heads == 1 and isinstance(k, Tensor) and k.dim() == 2:
            k = k[:, None]
        if cfg.num_kv_heads == 1 and isinstance(v, Tensor) and v.dim() == 2:
            v = v[:, None]
        k = _validate.tensor(k_name, k, ("tokens", cfg.num_kv_heads, cfg.head_dim))
        return k, _validate.tensor(v_name, v, (k.shape[0], cfg.num_kv_heads, cfg.value_dim), (k_name, k))

    def _alive(self) -> None:
        if self._freed:
            raise RuntimeError("this NSAContext was freed")
