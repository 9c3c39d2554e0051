"""The command ``nsa bench prefill``: options in, a table and a CSV out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nsa.bench.command import DTYPES, WIDTH, _one_of, _place
from nsa.bench.newest import WrongStep
from nsa.bench.prefill_run import PrefillCase, PrefillRow, measure
from nsa.bench.results import new_file
from nsa.config import NSAConfig
from nsa.train.atomic import replacing

TOKENS = {"cuda": 1 << 20, "cpu": 512}
SHOWN = 8  # rows of the table


def prefill(
    tokens: Annotated[int | None, typer.Option(help=f"Of the prompt. Default: {TOKENS['cuda']}.")] = None,
    chunk: Annotated[int, typer.Option(help="Tokens at a time.")] = 32768,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 64,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    page_size: Annotated[int | None, typer.Option(help="Tokens of a page. Default: a contiguous cache.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    out: Annotated[Path, typer.Option(help="Folder for the CSV.")] = Path("benchmarks/results"),
    device: Annotated[str | None, typer.Option(help="Default: the GPU. The CPU only shows that all of it runs.")] = None,
) -> None:
    """Fill one layer's cache with a long prompt, a chunk at a time: time and memory of each chunk.

    The newest queries of three chunks are compared with the reference. A wrong one ends the run without a speed.
    """
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    place = _place(console, device)
    length = TOKENS[place.type] if tokens is None else tokens
    if length < 1 or chunk < 1:
        raise ValueError(f"tokens and chunk must be positive, got {length} and {chunk}")
    cfg = NSAConfig(head_dim=head_dim, num_heads=heads, num_kv_heads=kv_heads)
    case = PrefillCase(length, chunk, cfg, DTYPES[_one_of("dtype", dtype, DTYPES)], place, page_size)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("prefill", total=length)
            rows = list(measure(case, lambda done: progress.update(task, completed=done)))
    except WrongStep as wrong:
        typer.echo(f"error: no speed is shown, because the check failed: {wrong}", err=True)
        raise typer.Exit(1) from None
    except torch.OutOfMemoryError:
        typer.echo(f"error: {length:,} tokens in chunks of {chunk:,} don't fit this device's memory", err=True)
        raise typer.Exit(1) from None
    console.print(_table(rows))
    seconds, peak = sum(row.ms for row in rows) / 1e3, max(row.peak_bytes for row in rows) / 2**30
    console.print(f"{length:,} tokens in {seconds:,.2f} s, {length / seconds:,.0f} tokens/s; at most {peak:.1f} GiB allocated")
    path = new_file(out, rows[0].date, f"{rows[0].gpu}-prefill")
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(PrefillRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    console.print(f"results: {path}", highlight=False, soft_wrap=True)


def _table(rows: Sequence[PrefillRow]) -> Table:
    table = Table(title=f"{rows[0].gpu}: chunks of {rows[0].chunk:,} tokens, of which some are shown", title_justify="left")
    for name in ("up to token", "ms", "tokens/s", "GiB at the peak", "relative error"):
        table.add_column(name, justify="right")
    sizes = [row.end - before for row, before in zip(rows, [0, *(row.end for row in rows)])]
    step = -(-len(rows) // SHOWN)
    for i, (row, size) in enumerate(zip(rows, sizes)):
        if i % step == 0 or row.relative_error is not None:
            table.add_row(
                f"{row.end:,}", f"{row.ms:,.1f}", f"{size / row.ms * 1e3:,.0f}", f"{row.peak_bytes / 2**30:.1f}",
                "" if row.relative_error is None else f"{row.relative_error:.1e}",
            )  # fmt: skip
    return table
