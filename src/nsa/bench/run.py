"""Check each case, then time it: the order in which everything happens, and what is alive meanwhile."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsa import _dispatch
from nsa.bench.baselines import baseline, refusal
from nsa.bench.cases import WHOLE, Case, Step, Work, make_work
from nsa.bench.check import Finding, check
from nsa.bench.data import counts, selection_figures
from nsa.bench.measure import peak_bytes, poison, time_backward, time_forward
from nsa.bench.results import Row, environment, find, shapes

DIRECTIONS = ("forward", "backward")


class CheckFailed(Exception):
    """A tensor that was to be timed is wrong."""

    def __init__(self, what: str, findings: Sequence[Finding]) -> None:
        wrong = [f"{f.step} {f.direction} {f.tensor}: {f.wrong}" for f in findings if f.wrong]
        super().__init__(f"{what}: {'; '.join(wrong)}")
        self.findings = list(findings)


@dataclass(frozen=True)
class Plan:
    """What to measure: at least one case, all of one geometry and on one device.

    Attributes:
        baselines: full attention to compare with, each that computes it.
        fallbacks: of these the first that computes it, for directions that none of ``baselines`` computes.
        single_steps: measure every step, not only the whole.
        milliseconds: about how long each call is repeated.
    """

    cases: Sequence[Case]
    directions: Sequence[str] = DIRECTIONS
    baselines: Sequence[str] = ("cudnn", "flash")
    fallbacks: Sequence[str] = ()
    single_steps: bool = True
    milliseconds: float = 100


@dataclass(frozen=True)
class Checked:
    """A case whose tensors are right, with the figures of its selections."""

    case: Case
    findings: list[Finding]
    overlap: float
    union_of_4: float

    @property
    def valid(self) -> bool:
        return counts(self.case.data, self.overlap, self.union_of_4)


def run(plan: Plan, on_checked: Callable[[Checked], None], on_skipped: Callable[[str], None]) -> list[Row]:
    """Measure all of ``plan``.

    Full attention is measured once for each length, on the first kind of data: what the numbers are does not change its work.

    Args:
        on_checked: called with every case after its check and before its first timing.
        on_skipped: called with a line for everything that can't be measured.

    Raises:
        CheckFailed: a tensor is wrong; nothing measured so far is returned.
        ValueError: the backend can't compute a case.
    """
    rows: list[Row] = []
    device = plan.cases[0].device
    shared = environment(device)
    with current(device):
        for case in plan.cases:
            blank = blank_row(case, shared)
            try:
                rows += _measure(case, plan, blank, rows, on_checked, on_skipped)
            except torch.OutOfMemoryError:
                on_skipped(f"{case.length} {case.data}: out of memory")
            free(case.device)
    return rows


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` the one that events and memory statistics speak of."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def blank_row(case: Case, shared: dict[str, Any]) -> Row:
    """A row of ``case`` in which nothing was measured yet. ``shared``: from ``environment``."""
    return Row(
        **shared, **shapes(case), backend=case.backend or _dispatch.default(case.device),
        kind="", implementation="", step="", direction="",
    )  # fmt: skip


def require_right(what: str, findings: Sequence[Finding]) -> None:
    """Raises: CheckFailed: one of ``findings`` is wrong."""
    if any(finding.wrong for finding in findings):
        raise CheckFailed(what, findings)


def _measure(
    case: Case,
    plan: Plan,
    blank: Row,
    before: Sequence[Row],
    on_checked: Callable[[Checked], None],
    on_skipped: Callable[[str], None],
) -> list[Row]:
    work = make_work(case, plan.single_steps)
    free(case.device)
    poison(case.device, 10 * work.do.nbytes)
    findings = check(work, "backward" in plan.directions)
    require_right(f"{case.length} {case.data}", findings)
    checked = Checked(case, findings, *selection_figures(work.indices))
    on_checked(checked)
    free(case.device)
    full = [row for row in before if row.length == case.length and row.implementation != "nsa"]
    new = [] if full else _full_attention(work, plan, blank, on_skipped)
    return new + list(_ours(work, plan, blank, checked, [*full, *new]))


def _full_attention(work: Work, plan: Plan, blank: Row, on_skipped: Callable[[str], None]) -> list[Row]:
    found: list[Row] = []
    for name in (*plan.baselines, *plan.fallbacks):
        if name in plan.fallbacks and {row.direction for row in found} >= set(plan.directions):
            continue
        try:
            found += [with_ratio(row, found) for row in _baseline(name, work, plan, blank, on_skipped)]
        except torch.OutOfMemoryError:
            on_skipped(f"{work.case.length} {name}: out of memory")
        free(work.case.device)
    return found


def _baseline(name: str, work: Work, plan: Plan, blank: Row, on_skipped: Callable[[str], None]) -> list[Row]:
    step, directions = baseline(name, work), tuple(plan.directions)
    reason = refusal(step, "backward" in directions)
    if reason is not None:
        alone = set(directions) == set(DIRECTIONS) and refusal(step, False) is None  # the forward
        directions = ("forward",) if alone else ()
        on_skipped(f"{work.case.length} {name}{', backward' if alone else ''}: {reason}")
    filled = replace(blank, implementation=name, step=WHOLE, backend="scaled_dot_product_attention")
    return list(_rows(step, work.case, replace(plan, directions=directions), filled))


def _ours(work: Work, plan: Plan, blank: Row, checked: Checked, full: Sequence[Row]) -> Iterator[Row]:
    blank = replace(blank, implementation="nsa", overlap=checked.overlap, union_of_4=checked.union_of_4, valid=checked.valid)
    for step in work.steps.values():
        for row in _rows(step, work.case, plan, replace(blank, step=step.name)):
            norms = [f.relative_norm for f in checked.findings if (f.step, f.direction) == (step.name, row.direction)]
            row = replace(row, relative_error=max(norms, default=None))
            yield with_ratio(row, full) if step.name == WHOLE else row


def _rows(step: Step, case: Case, plan: Plan, blank: Row) -> Iterator[Row]:
    """The times of a step in each direction, and the peak of memory of a whole."""
    for direction in plan.directions:
        if direction == "backward" and not step.inputs:
            continue
        measure = time_forward if direction == "forward" else time_backward
        t = measure(step, case.device, plan.milliseconds)
        yield replace(
            blank, kind="time", direction=direction, median_ms=t.median, p20_ms=t.p20, p80_ms=t.p80, samples=t.samples
        )
    if case.device.type == "cuda" and "backward" in plan.directions and blank.step == WHOLE:
        yield replace(blank, kind="memory", direction="both", peak_bytes=peak_bytes(step))


def with_ratio(row: Row, full: Sequence[Row]) -> Row:
    """``row`` with cuDNN's time or memory over its own, where cuDNN was measured."""
    cudnn = find(full, implementation="cudnn", kind=row.kind, direction=row.direction, length=row.length)
    if cudnn is None:
        return row
    theirs, mine = (x.median_ms if row.kind == "time" else x.peak_bytes for x in (cudnn, row))
    return replace(row, ratio_to_cudnn=theirs / mine if theirs is not None and mine else None)


def free(device: torch.device) -> None:
    """Give the last case's tensors back before the next one's are made: graphs die in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
