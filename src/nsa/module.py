"""Layers that hold weights: the block compressor and the attention layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsa import _validate
from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.decode import cached_attention
from nsa.functional import compress_blocks, nsa_attention
from nsa.rope import apply_rope, positions_in

CompressorKind = Literal["mlp", "linear", "mean"]
NOISE = 0.02


class BlockCompressor(nn.Module):
    """One key or value for each block of ``l`` tokens: ``[B, T, HK, D]`` to ``[B, N, HK, D]``.

    Args:
        dim: D for keys, DV for values.
        cfg: gives ``block_length`` and ``block_stride``.
        kind: ``"mlp"`` (a position embedding, Linear, SiLU, Linear), ``"linear"`` (the embedding, Linear) or ``"mean"`` (no
            parameters). The first two start as the block mean plus small noise.
        hidden: width of the MLP; default ``2 * dim``, from where on it can start as the exact mean.

    Raises:
        ValueError: an unknown ``kind``, a ``dim`` or ``hidden`` that is not positive.

    Source: arXiv 2502.11089, equation 7.
    """

    def __init__(
        self,
        dim: int,
        cfg: NSAConfig,
        kind: CompressorKind = "mlp",
        hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _validate.config(cfg)
        if kind not in ("mlp", "linear", "mean"):
            raise ValueError(f"kind must be 'mlp', 'linear' or 'mean', got {kind!r}")
        hidden = 2 * dim if hidden is None else hidden
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be positive, got {dim} and {hidden}")
        self.dim, self.cfg, self.kind = dim, cfg, kind
        widths = {"mlp": [cfg.block_length * dim, hidden, dim], "linear": [cfg.block_length * dim, dim], "mean": []}[kind]
        shapes = list(zip(widths[1:], widths))
        self.embedding = nn.Parameter(torch.empty(cfg.block_length, dim, device=device, dtype=dtype)) if shapes else None
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)) for shape in shapes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the block mean plus noise. An MLP does so through ``silu(x) - silu(-x) = x``."""
        if self.embedding is None:
            return
        self.embedding.zero_()
        for w in self.weights:
            w.normal_(std=NOISE * w.shape[1] ** -0.5)
        first = self.weights[0]
        mean = torch.eye(self.dim, device=first.device, dtype=first.dtype).repeat(1, self.cfg.block_length)
        mean /= self.cfg.block_length
        if self.kind == "linear":
            first += mean
            return
        kept = min(self.dim, first.shape[0] // 2)  # channels that have a pair of hidden units
        first[:kept] += mean[:kept]
        first[kept : 2 * kept] -= mean[:kept]
        channel = torch.arange(kept, device=first.device)
        self.weights[1][channel, channel] += 1
        self.weights[1][channel, kept + channel] -= 1

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, backend: str | None = None) -> Tensor:
        """``[B, T, HK, D]`` to ``[B, N, HK, D]``; packed, ``[1, T // d, HK, D]`` with each sequence's blocks in order."""
        return compress_blocks(x, self.cfg, self.embedding, tuple(self.weights), cu_seqlens=cu_seqlens, backend=backend)

    def extra_repr(self) -> str:
        return f"{self.dim}, kind={self.kind!r}, length={self.cfg.block_length}, stride={self.cfg.block_stride}"


class NativeSparseAttention(nn.Module):
    """An attention layer: projections, RoPE, compressors, gates and Native Sparse Attention. ``[B, T, C]`` to ``[B, T, C]``.

    Args:
        hidden_size: C, channels of the layer's input and output.
        cfg: head sizes, block sizes and counts.
        compressor: kind of both ``BlockCompressor``.
        shared_kv: one set of keys and values for all branches; by default each branch projects its own.
        gate_input: ``"hidden"`` computes the gates from the layer's input, ``"query"`` from each head's query.
        rope_theta: base of the rotary embedding, or None for none. Keys are turned before they are compressed.
        backend: passed to every step; None picks by device.

    Raises:
        ValueError: ``hidden_size`` not positive, an unknown ``gate_input``, an odd ``head_dim`` with RoPE.

    Source: arXiv 2502.11089, section 3.
    """

    def __init__(
        self,
        hidden_size: int,
        cfg: NSAConfig,
        *,
        compressor: CompressorKind = "mlp",
        shared_kv: bool = False,
        gate_input: Literal["hidden", "query"] = "hidden",
        rope_theta: float | None = 10000.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _validate.config(cfg)
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be positive, got {hidden_size}")
        if gate_input not in ("hidden", "query"):
            raise ValueError(f"gate_input must be 'hidden' or 'query', got {gate_input!r}")
        if rope_theta is not None and cfg.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {cfg.head_dim}; pass rope_theta=None to go without")
        self.hidden_size, self.cfg, self.backend = hidden_size, cfg, backend
        self.shared_kv, self.gate_input, self.rope_theta = shared_kv, gate_input, rope_theta
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        branches = 1 if shared_kv else 3
        self.q_proj = nn.Linear(hidden_size, cfg.num_heads * cfg.head_dim, bias=False, **place)
        self.k_proj = nn.Linear(hidden_size, branches * cfg.num_kv_heads * cfg.head_dim, bias=False, **place)
        self.v_proj = nn.Linear(hidden_size, branches * cfg.num_kv_heads * cfg.value_dim, bias=False, **place)
        self.o_proj = nn.Linear(cfg.num_heads * cfg.value_dim, hidden_size, bias=False, **place)
        fan_in, fan_out = (hidden_size, 3 * cfg.num_heads) if gate_input == "hidden" else (cfg.head_dim, 3)
        self.gate_proj = nn.Linear(fan_in, fan_out, bias=False, **place)
        self.compress_k = BlockCompressor(cfg.head_dim, cfg, compressor, **place)
        self.compress_v = BlockCompressor(cfg.value_dim, cfg, compressor, **place)

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: NSACache | None = None,
        return_block_indices: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend within ``x``, or with a ``cache`` to all that it holds and then ``x``, which is appended to it.

        Args:
            x: ``[B, T, C]``.
            cu_seqlens: int32 ``[num_seqs + 1]`` for packed sequences, B == 1; not together with a cache.
            cache: this layer's own cache; inference only.
            return_block_indices: also return int32 ``[B, T, HK, n]``, the blocks each query read.

        Returns:
            ``[B, T, C]``.
        """
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None with a cache")
        if cache is not None and not isinstance(cache, NSACache):
            raise TypeError(f"cache must be an nsa.NSACache, got {type(cache).__name__}")
        _validate.tensor("x", x, ("B" if cache is None else cache.batch_size, "T", self.hidden_size))
        q, k, v = self._project(x, self._positions(x, cu_seqlens, cache))
        gates = self._gates(x, q)
        if cache is None:
            k_cmp = self.compress_k(k[0], cu_seqlens, self.backend)
            v_cmp = self.compress_v(v[0], cu_seqlens, self.backend)
            o, indices = nsa_attention(
                q, k_cmp, v_cmp, k[1], v[1], k[2], v[2], gates, self.cfg,
                cu_seqlens=cu_seqlens, return_block_indices=True, backend=self.backend,
            )  # fmt: skip
        else:
            cache.append(k[0], v[0], k[1], v[1], k[2], v[2], self.compress_k, self.compress_v)
            o, indices = cached_attention(q, gates, cache, return_block_indices=True, backend=self.backend)
        o = self.o_proj(o.flatten(2))
        return (o, indices) if return_block_indices else o

    def make_cache(self, batch_size: int, max_seq_len: int, **options: Any) -> NSACache:
        """An empty cache for this layer, in its weights' dtype and on their device; ``options`` are ``NSACache``'s."""
        w = self.q_proj.weight
        return NSACache(self.cfg, batch_size, max_seq_len, dtype=w.dtype, device=w.device, **options)

    def _positions(self, x: Tensor, cu_seqlens: Tensor | None, cache: NSACache | None) -> Tensor:
        if cu_seqlens is not None:
            _validate.cu_seqlens("cu_seqlens", cu_seqlens, x, x.shape[1], "x")
            return positions_in(cu_seqlens, x.shape[1])
        steps = torch.arange(x.shape[1], device=x.device)
        if cache is None:
            return steps
        return cache.next_positions(x.shape[1])

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Queries, and keys and values for the compressed, selected and window branch."""
        cfg = self.cfg
        q = self.q_proj(x).unflatten(-1, (cfg.num_heads, cfg.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, cfg.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, cfg.value_dim))
        if self.rope_theta is not None:
            q, k = apply_rope(q, positions, self.rope_theta), apply_rope(k, positions, self.rope_theta)
        ks, vs = list(k.split(cfg.num_kv_heads, 2)), list(v.split(cfg.num_kv_heads, 2))
        return (q, ks * 3, vs * 3) if self.shared_kv else (q, ks, vs)

    def _gates(self, x: Tensor, q: Tensor) -> Tensor:
        if self.gate_input == "query":
            return self.gate_proj(q).sigmoid()
        return self.gate_proj(x).sigmoid().unflatten(-1, (self.cfg.num_heads, 3))

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.cfg}, shared_kv={self.shared_kv}, gate_input={self.gate_input!r}"
