"""Token streams for caches: what each token brings to the attention, and the full forward that decoding must repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import nsa

CFG = nsa.NSAConfig(
    head_dim=4, num_heads=6, num_kv_heads=2, value_dim=3, block_length=4, block_stride=2, selection_block_size=4,
    num_selected_blocks=4, num_local_blocks=1, window_size=5,
)  # fmt: skip
# Contiguous, a page for each selection block, and pages that neither the ring nor the sequences are a multiple of.
LAYOUTS = {"contiguous": {}, "pages of 4": {"page_size": 4}, "pages of 12": {"page_size": 12}}
KEYS_VALUES = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")


@dataclass
class Tokens:
    """Raw keys and values of ``[B, T]`` tokens for each branch, their queries and gates."""

    tensors: dict[str, Tensor]

    @classmethod
    def draw(cls, batch: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tokens:
        rng = torch.Generator().manual_seed(seed)

        def normal(heads: int, dim: int) -> Tensor:
            return torch.randn(batch, count, heads, dim, generator=rng, dtype=torch.float64).to(dtype)

        kv = {name: normal(CFG.num_kv_heads, CFG.head_dim if name[0] == "k" else CFG.value_dim) for name in KEYS_VALUES}
        return cls({**kv, "q": normal(CFG.num_heads, CFG.head_dim), "gates": normal(CFG.num_heads, 3).sigmoid()})

    def __getitem__(self, where: tuple[slice, ...] | slice) -> Tokens:
        return Tokens({name: x[where] for name, x in self.tensors.items()})

    def __len__(self) -> int:
        return self.tensors["q"].shape[1]

    def then(self, later: Tokens) -> Tokens:
        return Tokens({name: torch.cat([x, later.tensors[name]], 1) for name, x in self.tensors.items()})

    @staticmethod
    def stacked(sequences: list[Tokens]) -> Tokens:
        return Tokens({name: torch.cat([s.tensors[name] for s in sequences]) for name in sequences[0].tensors})


class Stream:
    """A cache with its compressors: feeds tokens, and knows what the full forward gives.

    ``options`` are those of every cache, such as its ``page_size``.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, kind: str = "mlp", **options: Any) -> None:
        torch.manual_seed(0)
        self.dtype, self.options = dtype, options
        self.compress_k = nsa.BlockCompressor(CFG.head_dim, CFG, kind, dtype=dtype)
        self.compress_v = nsa.BlockCompressor(CFG.value_dim, CFG, kind, dtype=dtype)

    def cache(self, batch: int, room: int, **options: Any) -> nsa.NSACache:
        return nsa.NSACache(CFG, batch, room, dtype=self.dtype, **self.options, **options)

    def append(self, cache: nsa.NSACache, new: Tokens) -> None:
        cache.append(*(new.tensors[name] for name in KEYS_VALUES), self.compress_k, self.compress_v)

    def feed(self, cache: nsa.NSACache, new: Tokens) -> Tensor:
        """Append, then attend: ``[B, T_new, HQ, DV]``."""
        self.append(cache, new)
        return nsa.cached_attention(new.tensors["q"], new.tensors["gates"], cache)

    def replay(self, cache: nsa.NSACache, new: Tokens) -> None:
        """Append as a replayed graph does: the host learns nothing."""
        with mock.patch.object(nsa.NSACache, "frozen", True):
            self.append(cache, new)

    def full(self, tokens: Tokens) -> Tensor:
        """The output ``[B, T, HQ, DV]`` of all tokens at once."""
        return self.full_with_blocks(tokens)[0]

    @torch.no_grad()
    def full_with_blocks(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The output, and the blocks that were selected."""
        x = tokens.tensors
        k_cmp, v_cmp = self.compress_k(x["k_cmp"]), self.compress_v(x["v_cmp"])
        keys_values = k_cmp, v_cmp, x["k_slc"], x["v_slc"], x["k_win"], x["v_win"]
        return nsa.nsa_attention(x["q"], *keys_values, x["gates"], CFG, return_block_indices=True)
