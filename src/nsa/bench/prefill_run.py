"""Fill a cache with a long prompt, a chunk at a time, and measure the time and the memory that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import _dispatch
from nsa.bench.newest import check_newest
from nsa.bench.results import environment
from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.decode import cached_attention
from nsa.module import BlockCompressor

CHECKED_QUERIES = 4  # the newest of a chunk


@dataclass(frozen=True)
class PrefillCase:
    """A prompt of ``tokens`` for one layer, ``chunk`` at a time."""

    tokens: int
    chunk: int
    cfg: NSAConfig
    dtype: torch.dtype
    device: torch.device
    page_size: int | None = None


@dataclass(frozen=True)
class PrefillRow:
    """A chunk. Milliseconds of append, compression by the mean, attention and gate; bytes.

    Attributes:
        end: tokens in the cache afterwards.
        peak_bytes: the most that was allocated while it ran, the cache and the chunk's own tensors included.
        relative_error: of its newest queries against the reference; None where it was not checked.
    """

    date: str
    gpu: str
    torch: str
    triton: str
    cuda: str
    nsa: str
    backend: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    page_size: int | None
    chunk: int
    end: int
    ms: float
    peak_bytes: int
    relative_error: float | None


def measure(case: PrefillCase, on_chunk: Callable[[int], None]) -> Iterator[PrefillRow]:
    """Each chunk of the prompt; the first, the last and one in the middle are checked after they were timed.

    Raises:
        WrongStep: a chunk is not what the reference gives; nothing more is measured.
    """
    cfg, rng = case.cfg, torch.Generator(case.device).manual_seed(0)
    cache = NSACache(cfg, 1, case.tokens, dtype=case.dtype, device=case.device, page_size=case.page_size)
    compress = BlockCompressor(cfg.head_dim, cfg, "mean"), BlockCompressor(cfg.value_dim, cfg, "mean")
    starts = range(0, case.tokens, case.chunk)
    checked = {starts[0], starts[len(starts) // 2], starts[-1]}
    shared = environment(case.device)

    def draw(count: int, heads: int, dim: int) -> Tensor:
        return torch.randn(1, count, heads, dim, generator=rng, dtype=case.dtype, device=case.device)

    def step(new: list[Tensor], q: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = new
        cache.append(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, *compress)
        with torch.no_grad():
            o, indices = cached_attention(q, gates, cache, return_block_indices=True)
        return o, indices

    for start in starts:
        count = min(case.chunk, case.tokens - start)
        new = [draw(count, cfg.num_kv_heads, dim) for dim in (cfg.head_dim, cfg.value_dim) * 3]
        q, gates = draw(count, cfg.num_heads, cfg.head_dim), draw(count, cfg.num_heads, 3).sigmoid()
        (o, indices), ms, peak = _timed(lambda q=q, gates=gates, new=new: step(new, q, gates), case.device)  # type: ignore[misc]
        error = None
        if start in checked:
            last = slice(max(0, count - CHECKED_QUERIES), count)
            what = f"tokens {start:,} to {start + count:,}"
            error = check_newest(what, cache, q[:, last], gates[:, last], o[:, last], indices[:, last])
        on_chunk(start + count)
        yield PrefillRow(
            **shared, backend=_dispatch.default(case.device), num_heads=cfg.num_heads, num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim, value_dim=cfg.value_dim, dtype=str(case.dtype).removeprefix("torch."),
            page_size=case.page_size, chunk=case.chunk, end=start + count, ms=ms, peak_bytes=peak, relative_error=error,
        )  # fmt: skip


def _timed(step: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> tuple[tuple[Tensor, Tensor], float, int]:
    """What ``step`` returns, its milliseconds and the peak of the memory; a CPU's is not known and 0."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = step()
        return result, 1e3 * (time.perf_counter() - began), 0
    torch.cuda.reset_peak_memory_stats(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    result = step()
    end.record()
    torch.cuda.synchronize(device)
    return result, start.elapsed_time(end), torch.cuda.max_memory_allocated(device)
