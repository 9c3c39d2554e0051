"""The command ``nsa bench tables``, which is ``nsa bench`` itself: everything in one run, one CSV and its picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from nsa.bench.ahead import compile_ahead
from nsa.bench.cases import Case
from nsa.bench.check import Finding
from nsa.bench.command import WIDTH, _place, ending_if_wrong, require_some, save
from nsa.bench.data import KINDS
from nsa.bench.long import measure_long
from nsa.bench.report import print_checked, print_findings, print_machine, print_steps
from nsa.bench.results import Row
from nsa.bench.run import current, free, run
from nsa.bench.summary import print_summary
from nsa.bench.tables import DTYPE, TABLES, Tables
from nsa.bench.training import TRAINING_STEP, measure_training

INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended


def tables(
    out: Annotated[Path, typer.Option(help="Folder for the CSV and its picture.")] = Path("benchmarks/results"),
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: the GPU. The CPU only shows that all of it runs.")] = None,
) -> None:
    """Time everything beside full attention: lengths, shapes, long sequences and a model's training step, with the memory.

    Block sizes are the paper's; the mean compressor and the gate are included. The tensors that are timed are checked first;
    a wrong one ends the run without a speed.
    """
    console, start = Console(), time.monotonic()
    if not console.is_terminal:
        console.width = WIDTH
    place = _place(console, device)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    interrupted = False
    try:
        with ending_if_wrong(console), current(place):
            for name, part in _parts(console, TABLES[place.type], place, seed):
                began = time.monotonic()
                rows += part()
                console.print(f"[{name}: {time.monotonic() - began:.0f} s]", highlight=False, markup=False)
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: what follows, if anything, are the parts that had ended")
    require_some(rows)
    print_machine(console, rows[0])
    print_steps(console, rows)
    print_summary(console, rows)
    save(console, rows, out, start)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _parts(
    console: Console, wanted: Tables, device: torch.device, seed: int
) -> Iterator[tuple[str, Callable[[], Sequence[Row]]]]:
    """The parts of a run, with their names, in their order."""

    def skipped(line: str) -> None:
        console.print(f"skipped {line}", highlight=False, markup=False)

    def told(title: str) -> Callable[[Sequence[Finding]], None]:
        return lambda findings: print_findings(console, title, findings)

    def compiled() -> list[Row]:
        compile_ahead(wanted.jobs(device, seed))
        return []

    def long() -> list[Row]:
        case = Case(wanted.long_forward, KINDS[0], wanted.shape, DTYPE, device, seed=seed)
        title = f"{case.length:,} tokens, {case.data}, {wanted.chunk:,} queries at a time"
        try:
            return list(measure_long(case, wanted.chunk, told(title)))
        except torch.OutOfMemoryError:
            skipped(f"{title}: out of memory")
            return []
        finally:
            free(device)

    if device.type == "cuda":
        yield "compiling, a process for each shape", compiled
    for plan in wanted.plans(device, seed):
        cfg = plan.cases[0].cfg
        name = f"{cfg.num_heads}/{cfg.num_kv_heads} heads of {cfg.head_dim}/{cfg.value_dim}"
        yield name, partial(run, plan, partial(print_checked, console), skipped)
    yield "the longest forward", long
    for length in wanted.model_lengths:
        title = f"{TRAINING_STEP}, {length:,} tokens"
        yield title, partial(measure_training, wanted.model, length, device, told(title), skipped)
