"""A decode step as a CUDA graph: captured once, replayed as the sequences grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Generic, TypeVar

import torch

from nsa.cache import NSACache

Out = TypeVar("Out")


class DecodeGraph(Generic[Out]):
    """A step over one cache or many, a model's layers', in one launch.

    >>> tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    >>> graph = nsa.DecodeGraph(lambda: model(tokens, caches), caches)
    >>> tokens.copy_(newest)
    >>> logits = graph.replay()

    Whatever the step reads besides must stay where it is: write the next input into the same tensors. The caches may be
    appended to, cropped, reordered and forked between two replays.

    Args:
        step: appends ``count`` tokens to each cache, attends to them, and returns tensors. It must not wait for the device.
        caches: all caches that the step appends to.
        count: tokens that a step appends to each sequence, at most 16.

    Attributes:
        output: what the step returned; every replay writes the same tensors anew.

    Raises:
        ValueError: no cache, one that is not on a GPU or that the kernels can't take, or a ``count`` that is not from 1 to 16.
    """

    def __init__(self, step: Callable[[], Out], caches: Iterable[NSACache], count: int = 1) -> None:
        self._caches, self._count = list(caches), count
        if not self._caches:
            raise ValueError("caches must be at least one")
        device = self._caches[0].device
        if not all(cache.capturable for cache in self._caches):
            raise ValueError(
                f"caches must be on a GPU, and such that the kernels take them, got {device} and {self._caches[0].dtype}"
            )
        if not 1 <= count <= NSACache.MAX_STEP:
            raise ValueError(f"count must be from 1 to {NSACache.MAX_STEP}, got {count}")
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.no_grad():
            self._warm_up(step)
            with torch.cuda.graph(self._graph):
                self.output = step()

    def replay(self) -> Out:
        """One more step; the caches hold ``count`` tokens more of every sequence.

        Raises:
            ValueError: a cache has no room or too few free pages; no cache has changed then.
        """
        for cache in self._caches:
            cache.reserve(self._count)
        self._graph.replay()
        for cache in self._caches:
            cache.advance(self._count)
        return self.output

    def _warm_up(self, step: Callable[[], Out]) -> None:
        """Compile the kernels and let libraries allocate what they need: neither can be captured."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), ExitStack() as dry:
            for cache in self._caches:
                dry.enter_context(cache.dry_run())
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
