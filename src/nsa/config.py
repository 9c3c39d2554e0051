"""The hyper-parameters of Native Sparse Attention, and all arithmetic on blocks."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class NSAConfig:
    """Shapes and block sizes of one Native Sparse Attention.

    Fields left at ``None`` are filled in: after construction every field is a number.

    Args:
        head_dim: D, channels of a query or key head.
        num_heads: HQ, query heads.
        num_kv_heads: HK, key/value heads; default the largest divisor of ``num_heads`` that is at most
            ``max(1, num_heads // 16)``.
        value_dim: DV, channels of a value head; default ``head_dim``.
        block_length: l, tokens of a compressed block.
        block_stride: d, tokens between the starts of two compressed blocks.
        selection_block_size: s, tokens of a selection block.
        num_selected_blocks: n, selection blocks a query reads, forced ones included.
        num_initial_blocks: forced blocks at the start of the sequence.
        num_local_blocks: forced blocks that end with the query's own.
        window_size: w, tokens of the sliding window, the query's own included.
        softmax_scale: factor on ``q @ k``; default ``head_dim ** -0.5``.

    Raises:
        TypeError: a field that must be a whole number is something else.
        ValueError: a value that cannot be; the message names the field, what it got and what it needs.

    Source: arXiv 2502.11089, sections 3.2-3.4 and 4.1.
    """

    head_dim: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # filled in below; a number ever after
    value_dim: int = None  # type: ignore[assignment]
    block_length: int = 32
    block_stride: int = 16
    selection_block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    softmax_scale: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "softmax_scale" or (value is None and field.name in ("num_kv_heads", "value_dim")):
                continue
            object.__setattr__(self, field.name, _positive_int(field.name, value))
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", _default_kv_heads(self.num_heads))
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        object.__setattr__(self, "softmax_scale", _scale(self.softmax_scale, self.head_dim))
        self._check_divisions()

    def _check_divisions(self) -> None:
        d = self.block_stride
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.block_length % d:
            raise ValueError(f"block_length must be a multiple of block_stride={d}, got {self.block_length}")
        if self.selection_block_size % d:
            raise ValueError(f"selection_block_size must be a multiple of block_stride={d}, got {self.selection_block_size}")
        if self.block_length > self.selection_block_size:
            raise ValueError(
                f"block_length must be at most selection_block_size={self.selection_block_size}, got {self.block_length}"
            )
        if self.num_initial_blocks + self.num_local_blocks > self.num_selected_blocks:
            raise ValueError(
                f"num_selected_blocks must be at least num_initial_blocks + num_local_blocks = "
                f"{self.num_initial_blocks + self.num_local_blocks}, got {self.num_selected_blocks}"
            )

    @property
    def group_size(self) -> int:
        """G, query heads that share a key/value head and a selection."""
        return self.num_heads // self.num_kv_heads

    def num_compressed_blocks(self, seq_len: int) -> int:
        """N, compressed blocks that end within ``seq_len`` tokens."""
        return 0 if seq_len < self.block_length else (seq_len - self.block_length) // self.block_stride + 1

    def num_selection_blocks(self, seq_len: int) -> int:
        """Selection blocks that start within ``seq_len`` tokens; the last may be part-filled."""
        return -(-seq_len // self.selection_block_size)


def create_default_config(head_dim: int, num_heads: int) -> NSAConfig:
    """The paper's configuration for these head sizes; the C API's ``nsa_create_default_config``."""
    return NSAConfig(head_dim=head_dim, num_heads=num_heads)


def _default_kv_heads(num_heads: int) -> int:
    most = max(1, num_heads // 16)
    return max(h for h in range(1, most + 1) if num_heads % h == 0)


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def _scale(value: float | None, head_dim: int) -> float:
    if value is None:
        return float(head_dim**-0.5)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"softmax_scale must be a number, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"softmax_scale must be positive and finite, got {value!r}")
    return float(value)
