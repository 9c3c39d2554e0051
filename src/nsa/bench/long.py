"""A forward so long that its queries come in chunks: checked on a sample, then timed, with the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa import functional
from nsa.bench.cases import WHOLE, Case, Step
from nsa.bench.check import Finding, check_selection, check_step, sample_positions
from nsa.bench.measure import time_slow
from nsa.bench.results import Row, environment
from nsa.bench.run import blank_row, free, require_right
from nsa.bench.sampled import Sample


@dataclass(frozen=True)
class LongWork:
    """All queries, keys, values, gates and outputs of a ``case`` at once; only the calls are of ``chunk`` queries.

    q ``[1, T, HQ, D]``, k, v ``[1, T, HK, ...]`` of all branches, gates ``[1, T, HQ, 3]``, o ``[1, T, HQ, DV]``.
    """

    case: Case
    chunk: int
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    o: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.gates, self.o))

    def forward(self, on_chunk: Callable[[slice, Tensor], None] = lambda rows, indices: None) -> tuple[Tensor]:
        """Compress, then fill ``o`` chunk by chunk. ``on_chunk``: gets its rows and selection, int32 ``[1, chunk, HK, n]``."""
        cfg, backend = self.case.cfg, self.case.backend
        k_cmp, v_cmp = (functional.compress_blocks(x, cfg, backend=backend) for x in (self.k, self.v))
        for start in range(0, self.case.length, self.chunk):
            rows = slice(start, min(start + self.chunk, self.case.length))
            self.o[:, rows], indices = functional.nsa_attention(
                self.q[:, rows], k_cmp, v_cmp, self.k, self.v, self.k, self.v, self.gates[:, rows], cfg,
                seqlen_k=rows.stop, return_block_indices=True, backend=backend,
            )  # fmt: skip
            on_chunk(rows, indices)
        return (self.o,)


def make_long_work(case: Case, chunk: int) -> LongWork:
    """Normal tensors, drawn in their own dtype: in fp32 first, they would not fit. ``o`` holds NaN."""
    cfg, g = case.cfg, torch.Generator(case.device).manual_seed(case.seed)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(1, case.length, heads, dim, generator=g, dtype=case.dtype, device=case.device)

    q = normal(cfg.num_heads, cfg.head_dim)
    k, v = normal(cfg.num_kv_heads, cfg.head_dim), normal(cfg.num_kv_heads, cfg.value_dim)
    gates = normal(cfg.num_heads, 3).sigmoid()
    o = torch.full((1, case.length, cfg.num_heads, cfg.value_dim), float("nan"), dtype=case.dtype, device=case.device)
    return LongWork(case, chunk, q, k, v, gates, o)


@torch.no_grad()
def check_long(work: LongWork) -> list[Finding]:
    """The outputs and selections of sampled queries, the edges of chunks among them, and that every output is finite."""
    case = work.case
    positions = sample_positions(case, chunk=work.chunk)
    chosen: list[Tensor] = []

    def keep(rows: slice, indices: Tensor) -> None:
        here = positions[(positions >= rows.start) & (positions < rows.stop)]
        chosen.append(indices[0, here - rows.start].long())

    work.forward(keep)
    sample = Sample(case.cfg, positions, torch.cat(chosen))
    k_cmp = functional.compress_blocks(work.k, case.cfg, backend=case.backend)[0]
    selection = check_selection(work.q[0, positions], k_cmp, case.length, sample)
    inputs = {"q": work.q, "k": work.k, "v": work.v, "gates": work.gates}
    done = Step(WHOLE, lambda: (work.o,), inputs)
    return [selection, *check_step(done, sample, case.dtype, backward=False)]


def measure_long(case: Case, chunk: int, on_checked: Callable[[list[Finding]], None]) -> Iterator[Row]:
    """The time of the forward and, on a GPU, the peak of its memory, inputs and outputs counted.

    Args:
        on_checked: called with the findings before the first timing.

    Raises:
        CheckFailed: an output or a selection is wrong.
        torch.OutOfMemoryError: it does not fit this device.
    """
    work = make_long_work(case, chunk)
    findings = check_long(work)
    require_right(f"{case.length} {case.data}", findings)
    on_checked(findings)
    free(case.device)
    error = max(f.relative_norm for f in findings if f.step == WHOLE)
    blank = replace(
        blank_row(case, environment(case.device)), implementation="nsa", step=WHOLE, direction="forward", chunk=chunk,
        relative_error=error,
    )  # fmt: skip
    with torch.no_grad():
        t, added = time_slow(work.forward, case.device)
    yield replace(blank, kind="time", median_ms=t.median, p20_ms=t.p20, p80_ms=t.p80, samples=t.samples)
    if case.device.type == "cuda":
        yield replace(blank, kind="memory", peak_bytes=work.nbytes + added)
