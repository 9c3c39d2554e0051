"""The command ``nsa bench steps``: options in, tables, a CSV and its picture out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from nsa.bench.baselines import BACKENDS
from nsa.bench.cases import Case
from nsa.bench.data import KINDS
from nsa.bench.report import print_checked, print_machine, print_results, print_wrong
from nsa.bench.results import Row, new_file, write_rows
from nsa.bench.run import DIRECTIONS, CheckFailed, Plan, run
from nsa.config import NSAConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LENGTHS = {"cuda": "8192,32768,65536", "cpu": "256,512"}
WIDTH = 140  # columns, where there is no terminal to ask


def bench(
    lengths: Annotated[str | None, typer.Option(help=f"Tokens, several with commas. Default: {LENGTHS['cuda']}.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 64,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels of a query or key head.")] = 128,
    value_dim: Annotated[int | None, typer.Option(help="Channels of a value head. Default: head-dim.")] = None,
    data: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(KINDS)}; may be repeated. Default: both.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "both",
    baselines: Annotated[str, typer.Option(help="Full attention to compare with; several with commas.")] = "cudnn,flash",
    out: Annotated[Path, typer.Option(help="Folder for the CSV and its picture.")] = Path("benchmarks/results"),
    quick: Annotated[bool, typer.Option("--quick", help="Only the shortest length, with few repeats.")] = False,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: the GPU. The CPU only shows that all of it runs.")] = None,
) -> None:
    """Time every step and the whole of one shape against full attention, after checking the tensors that are timed.

    Block sizes are the paper's; the mean compressor and the gate are included. A wrong tensor ends the run without a speed.
    """
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    place = _place(console, device)
    shortest_first = sorted(set(_numbers("lengths", lengths or LENGTHS[place.type])))
    kinds = [_one_of("data", kind, KINDS) for kind in data or KINDS]
    cfg = NSAConfig(head_dim=head_dim, num_heads=heads, num_kv_heads=kv_heads, value_dim=value_dim or head_dim)
    precision = DTYPES[_one_of("dtype", dtype, DTYPES)]
    cases = [
        Case(length, kind, cfg, precision, place, seed=seed)
        for length in (shortest_first[:1] if quick else shortest_first)
        for kind in dict.fromkeys(kinds)
    ]
    _require(cases)
    directions = DIRECTIONS if _one_of("direction", direction, (*DIRECTIONS, "both")) == "both" else (direction,)
    full = [_one_of("baselines", name, BACKENDS) for name in baselines.split(",") if name]
    out.mkdir(parents=True, exist_ok=True)
    _carry_out(console, Plan(cases, directions, full, milliseconds=20 if quick or place.type == "cpu" else 100), out)


def _carry_out(console: Console, plan: Plan, out: Path) -> None:
    start = time.monotonic()
    with ending_if_wrong(console):
        rows = run(
            plan,
            on_checked=lambda checked: print_checked(console, checked),
            on_skipped=lambda line: console.print(f"skipped {line}", highlight=False, markup=False),
        )
    require_some(rows)
    print_machine(console, rows[0])
    print_results(console, rows)
    save(console, rows, out, start)


@contextmanager
def ending_if_wrong(console: Console) -> Iterator[None]:
    """A failed check ends the command, and says what was wrong."""
    try:
        yield
    except CheckFailed as failed:
        print_wrong(console, failed.findings)
        typer.echo(f"error: no speed is shown, because the check failed: {failed}", err=True)
        raise typer.Exit(1) from None


def require_some(rows: Sequence[Row]) -> None:
    """A run without a row ends the command."""
    if not rows:
        typer.echo("error: nothing could be measured", err=True)
        raise typer.Exit(1)


def save(console: Console, rows: Sequence[Row], out: Path, start: float) -> None:
    """Write the CSV and its picture. ``start``: ``time.monotonic()`` of the command."""
    from nsa.bench.plot import draw  # here, because it takes matplotlib, which no other command needs

    path = new_file(out, rows[0].date, rows[0].gpu)
    write_rows(path, rows)
    console.print(f"results, in {time.monotonic() - start:.0f} s: {path}", highlight=False, soft_wrap=True)
    if any(row.implementation == "nsa" and row.valid for row in rows):
        picture = path.with_suffix(".png")
        draw(path, picture)
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def _place(console: Console, name: str | None) -> torch.device:
    """The device to measure; without a GPU the CPU must be asked for."""
    if name is None and not torch.cuda.is_available():
        typer.echo(
            "nsa bench needs a GPU, and torch sees none; --device cpu shows that it runs, on the reference backend", err=True
        )
        raise typer.Exit(2)
    try:
        device = torch.device(name or "cuda")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device must be one that torch can use here, got {name!r}: {str(error).splitlines()[0]}") from None
    if device.type not in LENGTHS:
        raise ValueError(f"device must be cuda or cpu, got {name!r}")
    if device.type == "cpu":
        console.print("on the CPU with the reference backend: these times say nothing about the kernels")
    return device


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between them, got {text!r}") from None


def _one_of(name: str, value: str, known: Iterable[str]) -> str:
    if value not in (names := list(known)):
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")
    return value


def _require(cases: list[Case]) -> None:
    for case in cases:
        size = case.cfg.selection_block_size
        if case.length < size or case.length % size:
            raise ValueError(f"lengths must be positive multiples of {size}, got {case.length}")
