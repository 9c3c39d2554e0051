"""Decode steps to measure: caches that hold so many tokens, the step over them, and full attention over as many."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import _dispatch
from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.decode import cached_attention
from nsa.decode_graph import DecodeGraph
from nsa.module import BlockCompressor

STEPS = 64  # that a case may take: the check, and a round for each sample
FILL = 4096  # tokens appended at a time
COLD = 200 << 20  # bytes that all copies of a case read: several times any L2 cache
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclass(frozen=True)
class DecodeCase:
    """A step for ``batch`` sequences of ``length`` tokens each."""

    batch: int
    length: int
    cfg: NSAConfig
    dtype: torch.dtype
    device: torch.device
    page_size: int | None = None

    @property
    def bytes_moved(self) -> int:
        """What a step cannot but read: compressed blocks, selected tokens, the window, keys and values of each."""
        cfg = self.cfg
        selected = min(self.length, cfg.num_selected_blocks * cfg.selection_block_size)
        rows = cfg.num_compressed_blocks(self.length) + selected + min(self.length, cfg.window_size)
        return self.batch * cfg.num_kv_heads * rows * (cfg.head_dim + cfg.value_dim) * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """What full attention cannot but read."""
        return self.batch * self.cfg.num_kv_heads * self.length * (self.cfg.head_dim + self.cfg.value_dim) * self.dtype.itemsize


def copies(bytes_moved: int) -> int:
    """Of a case, taken in turn, so that none finds its own bytes in a cache."""
    return max(2, min(24, math.ceil(COLD / bytes_moved)))


class Work:
    """Filled caches and the step of one token over them."""

    def __init__(self, case: DecodeCase, count: int, seed: int = 0) -> None:
        cfg = case.cfg
        self.case, self.rng = case, torch.Generator(case.device).manual_seed(seed)
        self.compress = BlockCompressor(cfg.head_dim, cfg, "mean"), BlockCompressor(cfg.value_dim, cfg, "mean")
        self.caches = [self._filled() for _ in range(count)]
        self.new = self._draw(1)
        self.q = self._normal(1, cfg.num_heads, cfg.head_dim)
        self.gates = self._normal(1, cfg.num_heads, 3).sigmoid()

    def step(self, cache: NSACache) -> tuple[Tensor, Tensor]:
        """Append one token to all branches, compress (mean) where a block completes, attend, weigh by the gates."""
        self._append(cache, self.new)
        with torch.no_grad():
            o, indices = cached_attention(self.q, self.gates, cache, return_block_indices=True)
        return o, indices

    def replay(self) -> Callable[[], object]:
        """All caches one step further: one graph on a GPU, one step after another elsewhere."""
        if self.case.device.type == "cuda":
            return DecodeGraph(lambda: [self.step(cache) for cache in self.caches], self.caches).replay
        return lambda: [self.step(cache) for cache in self.caches]

    def _filled(self) -> NSACache:
        case = self.case
        cache = NSACache(
            case.cfg, case.batch, case.length + STEPS, dtype=case.dtype, device=case.device, page_size=case.page_size
        )
        held = case.length - min(8, case.length - 1)
        for start in range(0, held, FILL):
            self._append(cache, self._draw(min(FILL, held - start)))
        return cache

    def _append(self, cache: NSACache, new: list[Tensor]) -> None:
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = new
        cache.append(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, *self.compress)

    def _draw(self, count: int) -> list[Tensor]:
        cfg = self.case.cfg
        return [self._normal(count, cfg.num_kv_heads, dim) for dim in (cfg.head_dim, cfg.value_dim) * 3]

    def _normal(self, count: int, heads: int, dim: int) -> Tensor:
        shape = (self.case.batch, count, heads, dim)
        return torch.randn(shape, generator=self.rng, dtype=self.case.dtype, device=self.case.device)


def dense_step(case: DecodeCase, backend: str, count: int) -> Callable[[], object]:
    """Full attention of one query over ``count`` copies of as many keys and values, by one of PyTorch's backends.

    Raises:
        RuntimeError: the backend can't compute it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cfg = case.cfg

    def make(heads: int, rows: int, dim: int) -> Tensor:
        return torch.randn(case.batch, heads, rows, dim, dtype=case.dtype, device=case.device)

    q = make(cfg.num_heads, 1, cfg.head_dim)
    held = [
        (make(cfg.num_kv_heads, case.length, cfg.head_dim), make(cfg.num_kv_heads, case.length, cfg.value_dim))
        for _ in range(count)
    ]

    def steps() -> list[Tensor]:
        attention = torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(getattr(SDPBackend, backend)), torch.no_grad():
            return [attention(q, k, v, scale=cfg.softmax_scale, enable_gqa=True) for k, v in held]

    return captured(steps) if case.device.type == "cuda" else steps


def captured(steps: Callable[[], object]) -> Callable[[], object]:
    """``steps`` as one graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = steps()

    def replay() -> object:
        graph.replay()
        return kept  # what the graph writes lives as long as the graph

    return replay


def backend_of(case: DecodeCase) -> str:
    return _dispatch.default(case.device)
