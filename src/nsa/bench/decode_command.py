"""The command ``nsa bench decode``: options in, a table, a CSV and its picture out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from nsa.bench.command import DTYPES, WIDTH, _one_of, _place
from nsa.bench.decode_cases import DecodeCase
from nsa.bench.decode_run import DecodeRow, copy_bandwidth, measure
from nsa.bench.newest import WrongStep
from nsa.bench.results import new_file
from nsa.config import NSAConfig
from nsa.train.atomic import replacing

CASES = {"cuda": "32x65536,8x131072,1x8192,1x65536,1x262144,1x1048576", "cpu": "1x256,2x512"}


def decode(
    cases: Annotated[str | None, typer.Option(help=f"BATCHxTOKENS, several with commas. Default: {CASES['cuda']}.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 64,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    page_size: Annotated[int | None, typer.Option(help="Tokens of a page. Default: contiguous caches.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    out: Annotated[Path, typer.Option(help="Folder for the CSV and its picture.")] = Path("benchmarks/results"),
    device: Annotated[str | None, typer.Option(help="Default: the GPU. The CPU only shows that all of it runs.")] = None,
) -> None:
    """Time a decode step (append, compress by the mean, attend, gate) in a CUDA graph against full attention.

    Each graph holds steps over several caches, so that nothing is warm. A wrong step ends the run without a speed.
    """
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    place = _place(console, device)
    cfg = NSAConfig(head_dim=head_dim, num_heads=heads, num_kv_heads=kv_heads)
    precision = DTYPES[_one_of("dtype", dtype, DTYPES)]
    wanted = [DecodeCase(*pair, cfg, precision, place, page_size) for pair in _pairs(cases or CASES[place.type])]
    out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth(place)
    rows: list[DecodeRow] = []
    for case in wanted:
        try:
            rows += measure(case, bandwidth, lambda line: console.print(f"skipped {line}", highlight=False, markup=False))
        except WrongStep as wrong:
            typer.echo(f"error: no speed is shown, because the check failed: {wrong}", err=True)
            raise typer.Exit(1) from None
        except torch.OutOfMemoryError:
            console.print(f"skipped {case.batch} x {case.length}: out of memory", highlight=False)
    console.print(_table(rows))
    path = new_file(out, rows[0].date, f"{rows[0].gpu}-decode")
    _write(path, rows)
    _draw(path.with_suffix(".png"), rows)
    console.print(f"results: {path}", highlight=False, soft_wrap=True)


def _pairs(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"cases must be like 32x65536 with commas between them, got {text!r}") from None
    if any(batch < 1 or length < 1 for batch, length in pairs):
        raise ValueError(f"cases must be of positive numbers, got {text!r}")
    return pairs


def _table(rows: Sequence[DecodeRow]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first.gpu}: microseconds of a step, median (20% to 80%); a copy moves {first.copy_gb_per_s:,.0f} GB/s",
        title_justify="left",
    )
    for name in ("batch", "tokens", "", "us", "MB to move", "share of the copy", "dense / nsa"):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in rows:
        table.add_row(
            f"{row.batch}", f"{row.length:,}", row.implementation,
            f"{row.median_us:.1f} ({row.p20_us:.1f} to {row.p80_us:.1f})", f"{row.bytes_moved / 1e6:,.1f}",
            f"{row.share_of_copy:.0%}", "" if row.ratio_to_dense is None else f"{row.ratio_to_dense:.1f}x",
        )  # fmt: skip
    return table


def _write(path: Path, rows: Sequence[DecodeRow]) -> None:
    """All of the file or nothing."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(DecodeRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _draw(picture: Path, rows: Sequence[DecodeRow]) -> None:
    """Latency over length, a colour for each batch size; dashed is the fastest full attention."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because no other command needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for number, batch in enumerate(sorted({row.batch for row in rows})):
        for ours, style in ((True, "o-"), (False, "s--")):
            best: dict[int, float] = {}
            for row in rows:
                if row.batch == batch and (row.implementation == "nsa") == ours:
                    best[row.length] = min(row.median_us, best.get(row.length, row.median_us))
            label = f"batch {batch}, {'nsa' if ours else 'full attention'}"
            axes.plot(*zip(*sorted(best.items())), style, color=f"C{number}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="microseconds of a step")
    axes.legend()
    first = rows[0]
    axes.set_title(f"{first.gpu}, {first.num_heads}/{first.num_kv_heads} heads of {first.head_dim}, {first.dtype}", fontsize=9)
    FigureCanvasAgg(figure)
    with replacing(picture) as temporary:
        figure.savefig(temporary)
