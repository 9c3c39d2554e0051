"""What Native Sparse Attention is compared with: full attention, and its sliding window alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.functional import window_attention
from nsa.rope import apply_rope


class KVCache:
    """Keys and values of ``batch_size`` equally long sequences, in buffers allocated at construction.

    Args:
        cfg: head sizes.
        batch_size: B, sequences.
        max_seq_len: tokens each sequence has room for.
        dtype, device: of what will be appended.
    """

    def __init__(
        self, cfg: NSAConfig, batch_size: int, max_seq_len: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        room = (batch_size, max_seq_len, cfg.num_kv_heads)
        self.k = torch.zeros(*room, cfg.head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*room, cfg.value_dim, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``k [B, T_new, HK, D]`` and ``v [B, T_new, HK, DV]``; returns all keys and values so far.

        Raises:
            ValueError: another batch size, or no room; nothing is written then.
        """
        stop = self.length + k.shape[1]
        if k.shape[0] != self.k.shape[0] or stop > self.k.shape[1]:
            raise ValueError(
                f"the cache holds {self.k.shape[0]} sequences of up to {self.k.shape[1]} tokens, got {k.shape[0]} of {stop}"
            )
        self.k[:, self.length : stop], self.v[:, self.length : stop] = k, v
        self.length = stop
        return self.k[:, :stop], self.v[:, :stop]


class DenseAttention(nn.Module):
    """Grouped-query attention with RoPE over all earlier tokens or the last ``window_size``. ``[B, T, C]`` to ``[B, T, C]``.

    The same projections as ``NativeSparseAttention`` with ``shared_kv``, less its gates and compressors.

    Args:
        hidden_size: C.
        cfg: head sizes; ``window_size`` where ``kind`` is ``"window"``.
        kind: ``"full"`` or ``"window"``.
        rope_theta: base of the rotary embedding.
    """

    def __init__(
        self, hidden_size: int, cfg: NSAConfig, kind: Literal["full", "window"], *, rope_theta: float = 10000.0
    ) -> None:
        super().__init__()
        if kind not in ("full", "window"):
            raise ValueError(f"kind must be 'full' or 'window', got {kind!r}")
        self.cfg, self.kind, self.rope_theta = cfg, kind, rope_theta
        self.q_proj = nn.Linear(hidden_size, cfg.num_heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, cfg.num_kv_heads * cfg.value_dim, bias=False)
        self.o_proj = nn.Linear(cfg.num_heads * cfg.value_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Attend within ``x [B, T, C]``, or with a ``cache`` to all that it holds and then ``x``, which is appended to it."""
        cfg, before = self.cfg, cache.length if cache is not None else 0
        positions = torch.arange(before, before + x.shape[1], device=x.device)
        q = apply_rope(self.q_proj(x).unflatten(-1, (cfg.num_heads, cfg.head_dim)), positions, self.rope_theta)
        k = apply_rope(self.k_proj(x).unflatten(-1, (cfg.num_kv_heads, cfg.head_dim)), positions, self.rope_theta)
        v = self.v_proj(x).unflatten(-1, (cfg.num_kv_heads, cfg.value_dim))
        if cache is not None:
            k, v = cache.append(k, v)
        with torch.autocast(q.device.type, enabled=False):  # it picks the projections' dtype; scores stay exact
            o = window_attention(q, k, v, cfg) if self.kind == "window" else full_attention(q, k, v, cfg)
        return self.o_proj(o.flatten(2))

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """An empty cache for this layer, in its weights' dtype and on their device."""
        w = self.q_proj.weight
        return KVCache(self.cfg, batch_size, max_seq_len, dtype=w.dtype, device=w.device)


def full_attention(q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig) -> Tensor:
    """Causal attention of the last TQ of T positions: ``[B, TQ, HQ, D]`` over ``[B, T, HK, D]`` to ``[B, TQ, HQ, DV]``."""
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if 1 < queries < keys:  # PyTorch's is_causal counts queries from the first key, not up to the last
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    o = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=queries == keys and queries > 1,
        scale=cfg.softmax_scale, enable_gqa=cfg.num_heads != cfg.num_kv_heads,
    )  # fmt: skip
    return o.transpose(1, 2)
