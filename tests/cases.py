"""Random calls of Native Sparse Attention: a configuration, the sequences' lengths, and how the tensors hold them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nsa import NSAConfig
from tests import oracle

KINDS = ("plain", "offset", "rows past an int", "rows past a tensor", "packed", "packed offset")


@dataclass(frozen=True)
class Case:
    """One call. ``lens_q`` and ``lens_k`` hold one number per sequence; ``extra_*`` are rows that must not be read."""

    seed: int
    kind: str
    cfg: NSAConfig
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    extra_q: int = 0
    extra_k: int = 0
    extra_cmp: int = 0

    @property
    def packed(self) -> bool:
        return self.kind.startswith("packed")

    @property
    def lens_cmp(self) -> tuple[int, ...]:
        return tuple(oracle.count_blocks(n, self.cfg.block_length, self.cfg.block_stride) for n in self.lens_k)

    def shape(self, lens: Sequence[int], extra: int) -> tuple[int, int]:
        """Batch size and rows of a tensor that holds sequences of these lengths."""
        return (1, sum(lens) + extra) if self.packed else (len(lens), max(lens) + extra)

    def slices(self, lens: Sequence[int]) -> list[tuple[int, slice]]:
        """Where each sequence lies: its batch index and its rows."""
        if not self.packed:
            return [(b, slice(0, n)) for b, n in enumerate(lens)]
        starts = [sum(lens[:b]) for b in range(len(lens))]
        return [(0, slice(start, start + n)) for start, n in zip(starts, lens)]

    def places(self) -> list[tuple[tuple[int, slice], ...]]:
        """For each sequence, where its queries, its keys and its compressed blocks lie."""
        return list(zip(*map(self.slices, (self.lens_q, self.lens_k, self.lens_cmp))))

    def lengths(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The keyword arguments that tell any step of these lengths."""
        if self.packed:
            told = {"cu_seqlens": _offsets(self.lens_q, device)}
            return told if self.lens_q == self.lens_k else {**told, "cu_seqlens_k": self.key_offsets(device)}
        if self.kind == "rows past a tensor":
            return {"seqlen_k": torch.tensor(self.lens_k, dtype=torch.int32, device=device)}
        return {} if self.kind == "plain" else {"seqlen_k": self.lens_k[0]}

    def key_offsets(self, device: torch.device | str = "cpu") -> Tensor:
        """``cu_seqlens`` of the keys, for a compressor."""
        return _offsets(self.lens_k, device)


@dataclass
class Inputs:
    """The tensors of a case, named as ``nsa_attention`` names them."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves with a gradient of their own, holding the same numbers as far as ``dtype`` can."""
        return Inputs(**{name: x.detach().to(dtype).requires_grad_() for name, x in self.items()})

    def tensors(self) -> list[Tensor]:
        return [x for _, x in self.items()]


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Inputs:
    """Normal numbers in the rows of the sequences, NaN in all others (gates stay finite: every row is weighed by them)."""
    rng = torch.Generator().manual_seed(case.seed)
    cfg, hq, hk = case.cfg, case.cfg.num_heads, case.cfg.num_kv_heads

    def filled(lens: Sequence[int], extra: int, heads: int, dim: int) -> Tensor:
        x = torch.full((*case.shape(lens, extra), heads, dim), float("nan"), dtype=torch.float64)
        for b, rows in case.slices(lens):
            x[b, rows] = torch.randn(x[b, rows].shape, generator=rng, dtype=torch.float64)
        return x.to(device, dtype)

    def keys_values(lens: Sequence[int], extra: int) -> tuple[Tensor, Tensor]:
        return filled(lens, extra, hk, cfg.head_dim), filled(lens, extra, hk, cfg.value_dim)

    q = filled(case.lens_q, case.extra_q, hq, cfg.head_dim)
    k_cmp, v_cmp = keys_values(case.lens_cmp, case.extra_cmp)
    k_slc, v_slc = keys_values(case.lens_k, case.extra_k)
    k_win, v_win = keys_values(case.lens_k, case.extra_k)
    gates = torch.rand((*q.shape[:2], hq, 3), generator=rng, dtype=torch.float64).to(device, dtype)
    return Inputs(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)


def random_case(
    seed: int,
    head_dims: Sequence[int] = (1, 2, 3, 4, 7, 8),
    value_dims: Sequence[int] = (1, 2, 3, 5, 8),
    max_len: int = 120,
    kinds: Sequence[str] = KINDS,
) -> Case:
    """A case drawn by ``seed``; every ``len(kinds)`` seeds in a row visit every kind."""
    rng = random.Random(seed)
    return random_call(rng, seed, random_config(rng, head_dims, value_dims), kinds[seed % len(kinds)], max_len)


def random_call(rng: random.Random, seed: int, cfg: NSAConfig, kind: str, max_len: int) -> Case:
    """Draw the lengths of a call of a given configuration and kind."""
    sequences = rng.randint(1, 4) if kind.startswith("packed") else rng.randint(1, 2)
    lens_k = [_length(rng, cfg, max_len // sequences) for _ in range(sequences)]
    if kind.startswith("packed"):
        lens_k = [0 if rng.random() < 0.2 else n for n in lens_k]
        lens_q = [rng.randint(0, n) for n in lens_k] if kind == "packed offset" else lens_k
    elif kind == "rows past a tensor":
        lens_q = [rng.randint(1, min(lens_k))] * sequences
    else:
        lens_k = lens_k[:1] * sequences
        lens_q = lens_k if kind == "plain" else [rng.randint(1, lens_k[0])] * sequences
    past = kind.startswith(("rows past", "packed"))
    return Case(
        seed, kind, cfg, tuple(lens_q), tuple(lens_k),
        extra_q=rng.randint(0, 3) if kind.startswith("packed") else 0,
        extra_k=rng.randint(0, 20) if past else 0,
        extra_cmp=rng.randint(0, 4),
    )  # fmt: skip


def random_config(rng: random.Random, head_dims: Sequence[int], value_dims: Sequence[int]) -> NSAConfig:
    stride = rng.choice([1, 2, 3, 4, 8])
    covers = rng.randint(1, 4)
    kv_heads, group = rng.choice([(1, 1), (1, 2), (1, 3), (1, 5), (2, 1), (2, 3), (2, 4), (3, 1), (3, 2)])
    initial, local = rng.randint(1, 2), rng.randint(1, 3)
    return NSAConfig(
        head_dim=rng.choice(head_dims),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        value_dim=rng.choice(value_dims),
        block_length=stride * covers,
        block_stride=stride,
        selection_block_size=stride * (covers + rng.randint(0, 3)),
        num_selected_blocks=initial + local + rng.randint(0, 4),
        num_initial_blocks=initial,
        num_local_blocks=local,
        window_size=rng.choice([1, 2, rng.randint(3, 40), 500]),
        softmax_scale=rng.choice([None, rng.uniform(0.05, 2)]),
    )


def _length(rng: random.Random, cfg: NSAConfig, most: int) -> int:
    """One token, less than a block, exactly a block, or anything up to ``most``."""
    return max(1, rng.choice([1, cfg.block_length - 1, cfg.block_length, *(rng.randint(1, max(1, most)) for _ in range(6))]))


def _offsets(lens: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([sum(lens[:b]) for b in range(len(lens) + 1)], dtype=torch.int32, device=device)
