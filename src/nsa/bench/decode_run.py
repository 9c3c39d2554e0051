"""Check a decode step, then time it beside full attention."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from nsa.bench.decode_cases import BACKENDS, DecodeCase, Work, backend_of, copies, dense_step
from nsa.bench.newest import check_newest
from nsa.bench.results import environment
from nsa.config import NSAConfig

ROUNDS = 40
FLUSH = 1 << 30  # bytes written before every round: nothing is warm, and the host runs ahead of the device meanwhile


@dataclass(frozen=True)
class DecodeRow:
    """One measurement: microseconds of a step, ``None`` an empty cell.

    Attributes:
        implementation: ``"nsa"``, or full attention by the backend of that name.
        copies: caches or keys and values taken in turn in one graph, so that none is warm.
        bytes_moved: what cannot but be read.
        copy_gb_per_s: of a copy of one GiB in the same run, bytes read and written counted.
        share_of_copy: ``bytes_moved`` over the time, over that bandwidth.
        ratio_to_dense: the fastest full attention's median over this row's.
        relative_error: ``|o - ref| / |ref|`` in the check before.
    """

    date: str
    gpu: str
    torch: str
    triton: str
    cuda: str
    nsa: str
    backend: str
    implementation: str
    batch: int
    length: int
    page_size: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    block_length: int
    block_stride: int
    selection_block_size: int
    num_selected_blocks: int
    window_size: int
    dtype: str
    copies: int
    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    bytes_moved: int
    copy_gb_per_s: float
    share_of_copy: float
    ratio_to_dense: float | None = None
    relative_error: float | None = None


def measure(case: DecodeCase, bandwidth: float, on_skipped: Callable[[str], None]) -> Iterator[DecodeRow]:
    """Full attention by every backend that computes it, then the step, all in the order of the rows.

    Raises:
        WrongStep: the step is not what the reference gives; nothing more is measured.
    """
    dense = list(_dense(case, bandwidth, on_skipped))
    yield from dense
    _free(case.device)
    count = copies(case.bytes_moved)
    work = Work(case, count)
    error = check(work)
    times = time_rounds(work.replay(), case.device, count)
    ratio = min(row.median_us for row in dense) / times[1] if dense else None
    yield _row(case, "nsa", backend_of(case), count, times, case.bytes_moved, bandwidth, ratio, error)


def _dense(case: DecodeCase, bandwidth: float, on_skipped: Callable[[str], None]) -> Iterator[DecodeRow]:
    for name in BACKENDS if case.device.type == "cuda" else ("MATH",):
        if name == "MATH" and case.device.type == "cuda":  # it copies the keys for every query head
            continue
        count = 1 if case.dense_bytes > 1 << 30 else 2
        try:
            times = time_rounds(dense_step(case, name, count), case.device, count)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            on_skipped(f"{name} of {case.batch} x {case.length}: {str(error).splitlines()[0]}")
            continue
        yield _row(case, name.split("_")[0].lower(), "scaled_dot_product_attention", count, times, case.dense_bytes, bandwidth)
        _free(case.device)


def _row(
    case: DecodeCase, name: str, backend: str, count: int, times: tuple[float, float, float], moved: int, bandwidth: float,
    ratio: float | None = None, error: float | None = None,
) -> DecodeRow:  # fmt: skip
    names = {field.name for field in fields(DecodeRow)} & {field.name for field in fields(NSAConfig)}
    sizes: dict[str, Any] = {name: value for name, value in asdict(case.cfg).items() if name in names}
    low, median, high = times
    return DecodeRow(
        **environment(case.device), **sizes, backend=backend, implementation=name, batch=case.batch, length=case.length,
        page_size=case.page_size, dtype=str(case.dtype).removeprefix("torch."), copies=count, median_us=median, p20_us=low,
        p80_us=high, samples=ROUNDS, bytes_moved=moved, copy_gb_per_s=bandwidth,
        share_of_copy=moved / (median * 1e3) / bandwidth, ratio_to_dense=ratio, relative_error=error,
    )  # fmt: skip


def time_rounds(replay: Callable[[], object], device: torch.device, count: int) -> tuple[float, float, float]:
    """Microseconds of one of the ``count`` steps of ``replay``: 20th percentile, median and 80th over ``ROUNDS`` rounds."""
    if device.type != "cuda":
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            replay()
            times.append(1e6 * (time.perf_counter() - began) / count)
    else:
        flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * ROUNDS)]  # type: ignore[no-untyped-call]
        pairs = list(zip(events[::2], events[1::2]))
        for start, end in pairs:
            for _ in range(3):
                flush.zero_()
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize(device)
        times = [1e3 * start.elapsed_time(end) / count for start, end in pairs]
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return low, median, high


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy of one GiB (64 MiB on a CPU), read and written bytes counted."""
    size = 1 << 30 if device.type == "cuda" else 1 << 26
    a, b = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    median = time_rounds(lambda: b.copy_(a), device, 1)[1]
    return 2 * size / (median * 1e3)


def check(work: Work) -> float:
    """The relative error of a step over the first of the caches, on the first sequences, against the reference in fp64.

    Raises:
        WrongStep: it is past the bound, not finite, or blocks of less importance were selected before others.
    """
    cache = work.caches[0]
    o, indices = work.step(cache)
    return check_newest(f"{work.case.batch} x {work.case.length}", cache, work.q, work.gates, o, indices)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
