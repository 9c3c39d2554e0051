"""Milliseconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nsa.bench.cases import Step

WARM_UP = 25  # ms
SLOW = 25  # ms; from here on neither a warm L2 cache nor the time to launch counts
AT_LEAST = 5  # samples, however slow
VERY_SLOW = 100  # ms
FEW = 3  # samples of what is very slow


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile in ms over ``samples`` runs."""

    median: float
    p20: float
    p80: float
    samples: int


def time_forward(step: Step, device: torch.device, milliseconds: float) -> Timing:
    """The forward alone, without a graph."""
    with torch.no_grad():
        return time_calls(step.forward, device, milliseconds)


def time_backward(step: Step, device: torch.device, milliseconds: float) -> Timing:
    """The gradients of all inputs from one graph; they are dropped after every run, so none is accumulated."""
    outputs = step.forward()
    return time_calls(lambda: step.gradients(outputs, step.grad_outputs, retain_graph=True), device, milliseconds)


def time_calls(call: Callable[[], object], device: torch.device, milliseconds: float) -> Timing:
    """Call again and again for about ``milliseconds``, after a warm-up.

    On a GPU with ``triton.testing.do_bench``, which times with events and clears the L2 cache before every run, and what is
    slow with events alone, for that would run half a dozen calls to find out how many to time. Elsewhere by the wall clock.
    """
    call()  # compiles
    return _timing(_on_gpu(call, milliseconds) if device.type == "cuda" else _on_host(call, milliseconds))


def time_slow(call: Callable[[], object], device: torch.device) -> tuple[Timing, int]:
    """The time of a call that takes a second or so and ran just before, and its ``added_bytes``: few calls, none to warm up.

    The memory of a CPU is not known and 0.
    """
    if device.type != "cuda":
        return _timing(_on_host(call, 0)), 0
    times: list[float] = []
    added = added_bytes(lambda: times.extend(_between_events(call) for _ in range(FEW)))
    return _timing(times), added


def _timing(times: list[float]) -> Timing:
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Timing(median, low, high, len(times))


def _on_gpu(call: Callable[[], object], milliseconds: float) -> list[float]:
    from triton.testing import do_bench

    first = _between_events(call)
    if first < SLOW:
        rep = max(milliseconds, AT_LEAST * first)
        times: list[float] = do_bench(call, warmup=WARM_UP, rep=rep, return_mode="all")
        return times
    times = [first]
    while len(times) < (AT_LEAST if first < VERY_SLOW else FEW) or sum(times) < milliseconds:
        times.append(_between_events(call))
    return times


def _between_events(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _on_host(call: Callable[[], object], milliseconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < AT_LEAST or sum(times) < milliseconds:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def peak_bytes(step: Step) -> int:
    """The most GPU memory that forward and backward hold, inputs and gradients counted, whatever else is alive."""
    own = sum(x.nbytes for x in (*step.inputs.values(), *step.grad_outputs))
    return own + added_bytes(lambda: step.gradients(step.forward(), step.grad_outputs))


def added_bytes(call: Callable[[], object]) -> int:
    """The most GPU memory that is held during ``call`` beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def poison(device: torch.device, size: int) -> None:
    """Leave ``size`` bytes of NaN (half of what is free, if less) to the allocator, so that unwritten outputs show."""
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 2)
        torch.full((size // 2,), float("nan"), dtype=torch.bfloat16, device=device)
