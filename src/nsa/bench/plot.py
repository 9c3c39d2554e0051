"""The picture of a results file; it reads nothing but the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from nsa.bench.cases import STEPS, WHOLE
from nsa.bench.results import Row, find, geometry, read_rows
from nsa.train.atomic import replacing

LINES = {  # implementation, data (None: any): label, colour, line style
    ("cudnn", None): ("full attention, cuDNN", "#22577a", "-"),
    ("flash", None): ("full attention, FlashAttention", "#7a9e9f", "-"),
    ("nsa", "random"): ("nsa, random data", "#e0a030", "-"),
    ("nsa", "trained-like"): ("nsa, trained-like data", "#d1495b", "-"),
}
SHADES = ("#9db4c8", "#22577a", "#57a773", "#d1495b", "#e0a030", "#6d597a")


def draw(results: Path, picture: Path) -> None:
    """Time over length in both directions, and below what each step takes of it.

    Args:
        results: a CSV of ``nsa bench``. Of the first row's geometry; rows that are not valid are left out.
        picture: the file to write; its suffix gives the format.

    Raises:
        ValueError: ``results`` is no such file, or holds no valid time.
    """
    rows = [row for row in read_rows(results) if row.kind == "time" and row.valid and row.step in (*STEPS, WHOLE)]
    rows = [row for row in rows if row.chunk is None and geometry(row) == geometry(rows[0])]
    if not any(row.implementation == "nsa" for row in rows):
        raise ValueError(f"{results} must hold a valid time to draw, got none")
    directions = [d for d in ("forward", "backward") if find(rows, direction=d)]
    figure = Figure(figsize=(1 + 6 * len(directions), 9), layout="constrained", dpi=150)
    grid = figure.subplots(2, len(directions), squeeze=False)
    for column, direction in enumerate(directions):
        mine = [row for row in rows if row.direction == direction]
        _draw_lines(grid[0][column], mine, direction)
        _draw_bars(grid[1][column], mine)
    row = rows[0]
    figure.suptitle(f"{_machine(row)}\n{_geometry(row)}", fontsize=10)
    FigureCanvasAgg(figure)  # no display, whatever matplotlib's own default is
    with replacing(picture) as temporary:
        figure.savefig(temporary)


def _machine(row: Row) -> str:
    return f"{row.gpu}, torch {row.torch}, triton {row.triton or '-'}, {row.date[:10]}"


def _geometry(row: Row) -> str:
    return (
        f"{row.num_heads}/{row.num_kv_heads} heads of {row.head_dim}/{row.value_dim}, {row.dtype}, blocks "
        f"{row.block_length}/{row.block_stride}/{row.selection_block_size}, {row.num_selected_blocks} selected, "
        f"window {row.window_size}"
    )


def _draw_lines(axes: Axes, rows: Sequence[Row], direction: str) -> None:
    for (implementation, data), (label, colour, style) in LINES.items():
        line = [r for r in rows if r.step == WHOLE and r.implementation == implementation and data in (None, r.data)]
        line.sort(key=lambda row: row.length)
        if line:
            middle: Any = [row.median_ms for row in line]
            low: Any = [row.p20_ms for row in line]
            high: Any = [row.p80_ms for row in line]
            lengths = [row.length for row in line]
            axes.plot(lengths, middle, style, color=colour, marker="o", markersize=4, label=label)
            axes.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.length for row in rows}), minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(int(value)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(title=direction, xlabel="tokens", ylabel="ms, median and 20% to 80%")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """The steps in microseconds per token, so that all lengths share an axis; a dash marks the whole."""
    mine = [row for row in rows if row.implementation == "nsa"]
    bars = sorted({(row.length, row.data) for row in mine if row.step in STEPS})
    bottom = [0.0] * len(bars)
    for step, shade in zip(STEPS, SHADES, strict=True):
        heights = [_per_token(find(mine, step=step, length=length, data=data)) for length, data in bars]
        if any(heights):
            axes.bar(range(len(bars)), heights, 0.7, bottom=bottom, color=shade, label=step)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    totals = [_per_token(find(mine, step=WHOLE, length=length, data=data)) for length, data in bars]
    axes.plot(range(len(bars)), totals, "_", color="black", markersize=26, markeredgewidth=1.5, label="the whole, in one call")
    axes.set_xticks(range(len(bars)), [f"{_tokens(length)}\n{data}" for length, data in bars], fontsize=8)
    axes.set(title="nsa's steps", ylabel="µs per token")
    axes.set_ylim(0, 1.3 * max([*bottom, *totals]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")


def _per_token(row: Row | None) -> float:
    return 0.0 if row is None or row.median_ms is None else row.median_ms * 1e3 / row.length


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
