"""What ``nsa bench`` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from nsa.bench.cases import STEPS, WHOLE
from nsa.bench.check import Finding
from nsa.bench.data import OVERLAP, UNION_OF_4
from nsa.bench.results import Row, find
from nsa.bench.run import DIRECTIONS, Checked

LABELS = {"nsa": "nsa", "cudnn": "cuDNN", "flash": "FlashAttention", "efficient": "memory-efficient"}
ORDER = {step: i for i, step in enumerate((*STEPS, WHOLE))}


def print_checked(console: Console, checked: Checked) -> None:
    """A line for each step's worst tensors, and the figures of the selections that will be timed."""
    case = checked.case
    print_findings(console, f"{case.length:,} tokens, {case.data}", checked.findings)
    console.print(
        f"  selections: neighbours share {checked.overlap:.2f} of their blocks, four neighbours select "
        f"{checked.union_of_4:.1f} together",
        highlight=False,
    )
    if not checked.valid:
        console.print(
            f"  INVALID: {case.data} stands for {OVERLAP[0]} to {OVERLAP[1]} and {UNION_OF_4[0]} to {UNION_OF_4[1]}; "
            "its times don't count",
            highlight=False,
            markup=False,
        )


def print_findings(console: Console, title: str, findings: Sequence[Finding]) -> None:
    """A line for each step's worst tensors."""
    console.print(f"\n{title}: {len(findings)} tensors checked", highlight=False)
    for step in sorted(dict.fromkeys(f.step for f in findings), key=lambda step: ORDER.get(step, len(ORDER))):
        mine = [f for f in findings if f.step == step]
        console.print(f"  {step:<10} {_worst(mine)}", highlight=False)


def _worst(findings: Sequence[Finding]) -> str:
    """The largest of both measures, each next to what it may be."""
    error = max(findings, key=lambda f: f.max_error / f.allowed if f.allowed else f.max_error)
    norm = max(findings, key=lambda f: f.relative_norm)
    return (
        f"max error {error.max_error:.1e} (allowed {error.allowed:.1e}, {error.direction} {error.tensor}), "
        f"relative norm {norm.relative_norm:.1e} (allowed {norm.bound:.0e}, {norm.direction} {norm.tensor})"
    )


def print_wrong(console: Console, findings: Iterable[Finding]) -> None:
    """Every tensor of the failed check, the wrong ones with their reason."""
    for f in findings:
        console.print(
            f"  {'WRONG' if f.wrong else 'ok':<5} {f.step:<10} {f.direction:<8} {f.tensor:<7} max error {f.max_error:.1e} "
            f"(allowed {f.allowed:.1e}), relative norm {f.relative_norm:.1e} (allowed {f.bound:.0e})"
            + (f": {f.wrong}" if f.wrong else ""),
            highlight=False,
            markup=False,
        )


def print_machine(console: Console, row: Row) -> None:
    line = f"\n{row.gpu}, torch {row.torch}, triton {row.triton or '-'}, CUDA {row.cuda or '-'}"
    console.print(line, highlight=False)


def print_results(console: Console, rows: Sequence[Row]) -> None:
    """The whole against full attention, its steps, and its memory. ``rows``: of one geometry."""
    keys = list(dict.fromkeys((row.length, row.data, row.valid) for row in rows if row.implementation == "nsa"))
    full = [name for name in LABELS if name != "nsa" and find(rows, implementation=name)]
    console.print(_totals(rows, keys, full))
    print_steps(console, rows)
    if find(rows, kind="memory"):
        console.print(_memory(rows, keys, full))


def _totals(rows: Sequence[Row], keys: Sequence[tuple[int, str, bool]], full: Sequence[str]) -> Table:
    table = _table("ms: median (20% to 80%)", ["nsa", *(LABELS[name] for name in full), "cuDNN / nsa"], ["direction"])
    for direction in DIRECTIONS:
        for length, data, valid in keys:
            cells: dict[str, object] = {"kind": "time", "step": WHOLE, "direction": direction, "length": length}
            mine = find(rows, implementation="nsa", data=data, **cells)
            if mine is not None:
                theirs = [_spread(find(rows, implementation=name, **cells)) for name in full]
                table.add_row(direction, f"{length:,}", data, _spread(mine), *theirs, _ratio(mine.ratio_to_cudnn, valid))
    return table


def print_steps(console: Console, rows: Sequence[Row]) -> None:
    """What each step takes, where single steps were measured: of one geometry."""
    keys = list(dict.fromkeys((row.length, row.data, row.valid) for row in rows if row.step in STEPS))
    console.print(_steps(rows, keys))


def _steps(rows: Sequence[Row], keys: Sequence[tuple[int, str, bool]]) -> Table:
    table = _table("ms of each step", [*STEPS, "sum", WHOLE], ["direction"])
    for direction in DIRECTIONS:
        for length, data, _ in keys:
            cells: dict[str, object] = {
                "kind": "time",
                "implementation": "nsa",
                "direction": direction,
                "length": length,
                "data": data,
            }
            found = [find(rows, step=step, **cells) for step in (*STEPS, WHOLE)]
            if found[-1] is not None:
                times = [row.median_ms if row else None for row in found]
                times.insert(-1, math.fsum(t for t in times[:-1] if t is not None))
                table.add_row(direction, f"{length:,}", data, *(number(t) for t in times))
    return table


def _memory(rows: Sequence[Row], keys: Sequence[tuple[int, str, bool]], full: Sequence[str]) -> Table:
    table = _table("GiB at the peak of forward and backward", ["nsa", *(LABELS[name] for name in full), "nsa / cuDNN"])
    for length, data, _ in keys:
        mine = find(rows, kind="memory", implementation="nsa", length=length, data=data)
        if mine is not None:
            theirs = [find(rows, kind="memory", implementation=name, length=length) for name in full]
            peaks = [f"{row.peak_bytes / 2**30:.2f}" if row and row.peak_bytes else "-" for row in (mine, *theirs)]
            share = f"{1 / mine.ratio_to_cudnn:.2f}" if mine.ratio_to_cudnn else "-"
            table.add_row(f"{length:,}", data, *peaks, share)
    return table


def _table(title: str, columns: Sequence[str], first: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for name in first:
        table.add_column(name)
    table.add_column("tokens", justify="right")
    table.add_column("data")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _spread(row: Row | None) -> str:
    return "-" if row is None else f"{number(row.median_ms)} ({number(row.p20_ms)} to {number(row.p80_ms)})"


def number(ms: float | None) -> str:
    """Milliseconds to four digits or so."""
    return "-" if ms is None else f"{ms:.3f}" if ms < 10 else f"{ms:.2f}" if ms < 100 else f"{ms:.1f}"


def _ratio(ratio: float | None, valid: bool) -> str:
    return "invalid" if not valid else "-" if ratio is None else f"{ratio:.2f}x"
