"""A pre-norm decoder over bytes: RMSNorm, SwiGLU, RoPE, and native sparse, full or window attention."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.models.dense import DenseAttention, KVCache
from nsa.module import CompressorKind, NativeSparseAttention

AttentionKind = Literal["nsa", "full", "window"]
Cache = NSACache | KVCache


@dataclass(frozen=True)
class LMConfig:
    """Sizes of a ``LanguageModel``. ``dataclasses.replace(cfg, attention="full")`` is the twin with full attention.

    Args:
        nsa: head sizes of every kind of attention, the block sizes of ``"nsa"`` and the window of ``"nsa"`` and ``"window"``.
        attention: ``"nsa"``, ``"full"``, or ``"window"`` for the sliding window alone.
        hidden_size: C, channels of the residual stream.
        num_layers: decoder layers.
        mlp_size: hidden channels of the SwiGLU; default 8/3 of C, rounded up to a multiple of 32.
        vocab_size: V, tokens; 256 for bytes.
        tie_embeddings: use the embedding as the output projection too.
        compressor: kind of the block compressors, ``"mlp"``, ``"linear"`` or ``"mean"``; ``"nsa"`` only.
        rope_theta: base of the rotary embedding.
        norm_eps: added under RMSNorm's root.

    Raises:
        TypeError, ValueError: a value that cannot be; the message names the field, what it got and what it needs.
    """

    nsa: NSAConfig
    attention: AttentionKind = "nsa"
    hidden_size: int = 256
    num_layers: int = 4
    mlp_size: int = None  # type: ignore[assignment]  # filled in below; a number ever after
    vocab_size: int = 256
    tie_embeddings: bool = True
    compressor: CompressorKind = "mlp"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not isinstance(self.nsa, NSAConfig):
            raise TypeError(f"nsa must be an nsa.NSAConfig, got {type(self.nsa).__name__}")
        if self.attention not in get_args(AttentionKind):
            raise ValueError(f"attention must be one of {', '.join(get_args(AttentionKind))}, got {self.attention!r}")
        if self.compressor not in get_args(CompressorKind):
            raise ValueError(f"compressor must be one of {', '.join(get_args(CompressorKind))}, got {self.compressor!r}")
        for name in ("hidden_size", "num_layers", "vocab_size", "mlp_size"):
            value = getattr(self, name)
            if name == "mlp_size" and value is None:
                value = -(-self.hidden_size * 8 // 3 // 32) * 32
                object.__setattr__(self, name, value)
            try:
                positive = operator.index(value) > 0
            except TypeError:
                raise TypeError(f"{name} must be a whole number, got {value!r}") from None
            if not positive:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.nsa.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.nsa.head_dim}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LMConfig:
        """The inverse of ``dataclasses.asdict``.

        Raises:
            ValueError: a field that this version does not know, or a missing one.
        """
        known, inner = {f.name for f in fields(cls)}, {f.name for f in fields(NSAConfig)}
        heads = values.get("nsa")
        if not isinstance(heads, Mapping):
            raise ValueError(f"nsa must be a table of NSAConfig's fields, got {heads!r}")
        unknown = sorted((set(values) - known) | (set(heads) - inner))
        if unknown:
            raise ValueError(f"unknown fields of the model's configuration: {', '.join(unknown)}")
        return cls(**{**values, "nsa": NSAConfig(**heads)})


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, ``[..., C]`` to ``[..., C]``. Source: arXiv 2002.05202."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each on the normed residual stream: ``[B, T, C]`` to ``[B, T, C]``."""

    def __init__(self, cfg: LMConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.mlp_norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.hidden_size, cfg.mlp_size)
        self.attention: NativeSparseAttention | DenseAttention
        if cfg.attention == "nsa":
            self.attention = NativeSparseAttention(
                cfg.hidden_size, cfg.nsa, compressor=cfg.compressor, rope_theta=cfg.rope_theta
            )
        else:
            self.attention = DenseAttention(cfg.hidden_size, cfg.nsa, cfg.attention, rope_theta=cfg.rope_theta)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return self.after_attention(x, self.attention(self.attention_norm(x), cache=cache))

    def with_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output, and int32 ``[B, T, HK, n]``: the blocks that each query read."""
        attended, blocks = self.attention(self.attention_norm(x), return_block_indices=True)
        return self.after_attention(x, attended), blocks

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """A decoder: tokens ``[B, T]`` to logits ``[B, T, V]``.

    Weights are drawn from torch's global generator: ``torch.manual_seed`` before construction makes them reproducible.

    Args:
        cfg: the sizes and the kind of attention.

    Source: the layer of Llama (arXiv 2302.13971), with the attention of arXiv 2502.11089.
    """

    def __init__(self, cfg: LMConfig) -> None:
        super().__init__()
        if not isinstance(cfg, LMConfig):
            raise TypeError(f"cfg must be an nsa.models.LMConfig, got {type(cfg).__name__}")
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.output = None if cfg.tie_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every matrix anew; block compressors keep the start that they gave themselves, the block mean."""
        into_residual = (2 * self.cfg.num_layers) ** -0.5  # the residual stream sums two outputs a layer
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=self.cfg.hidden_size**-0.5)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                module.weight.normal_(std=std * (into_residual if name.endswith(("o_proj", "down")) else 1.0))

    def forward(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of the token after each of ``tokens [B, T]``, whole numbers below V.

        With ``caches``, from ``make_caches``, the tokens follow those that the caches hold, and are appended to them.

        Raises:
            TypeError, ValueError: tokens of another shape or dtype, or another number of caches than layers.
        """
        x = self._embed(tokens)
        if caches is not None and len(caches) != len(self.layers):
            raise ValueError(f"caches must be one for each of the {len(self.layers)} layers, got {len(caches)}")
        for i, layer in enumerate(self.layers):
            x = layer(x, None if caches is None else caches[i])
        x = self.norm(x)
        return nn.functional.linear(x, self.embedding.weight) if self.output is None else self.output(x)

    @torch.no_grad()
    def selected_blocks(self, tokens: Tensor) -> list[Tensor]:
        """For each layer int32 ``[B, T, HK, n]``: the selection blocks that each query read, padded with -1.

        Raises:
            ValueError: the model's attention is not ``"nsa"``.
        """
        if self.cfg.attention != "nsa":
            raise ValueError(f"attention must be 'nsa' to select blocks, got {self.cfg.attention!r}")
        x, found = self._embed(tokens), []
        for layer in self.layers:
            x, blocks = layer.with_blocks(x)  # type: ignore[operator]
            found.append(blocks)
        return found

    def make_caches(self, batch_size: int, max_seq_len: int, **options: Any) -> list[Cache]:
        """Empty caches for ``forward``, one a layer, with room for ``max_seq_len`` tokens; ``options`` are ``NSACache``'s."""
        return [layer.attention.make_cache(batch_size, max_seq_len, **options) for layer in self.layers]  # type: ignore[union-attr, operator]

    def num_parameters(self) -> int:
        """All parameters, each counted once."""
        return sum(p.numel() for p in self.parameters())

    def _embed(self, tokens: Tensor) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be an int64 or int32 tensor, got {kind}")
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be [B, T] with at least one token, got {list(tokens.shape)}")
        return self.embedding(tokens)
