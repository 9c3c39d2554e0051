"""The tables of a whole run: every number that it was made for, from the rows of its CSV and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nsa.bench.cases import WHOLE
from nsa.bench.report import LABELS, number
from nsa.bench.results import Row, find, geometry
from nsa.bench.training import TRAINING_STEP

DIRECTIONS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}
GIB = 2**30


@dataclass(frozen=True)
class Place:
    """Everything whole of one geometry, one length and one kind of data; full attention is of any kind of data."""

    rows: Sequence[Row]
    ours: Row

    def milliseconds(self, implementation: str, direction: str) -> float | None:
        """The median, or the sum of both directions' medians."""
        data = {"data": self.ours.data} if implementation == "nsa" else {}
        found = [
            find(self.rows, kind="time", implementation=implementation, direction=d, **data) for d in DIRECTIONS[direction]
        ]
        times = [row.median_ms for row in found if row is not None and row.median_ms is not None]
        return sum(times) if len(times) == len(found) else None

    def full(self, direction: str) -> str | None:
        """The full attention to compare with: cuDNN, else what was measured in its place."""
        names = [name for name in LABELS if name != "nsa"]
        return next((name for name in names if self.milliseconds(name, direction) is not None), None)

    def ratio(self, direction: str) -> float | None:
        """cuDNN's time over ours."""
        theirs, mine = (self.milliseconds(name, direction) for name in ("cudnn", "nsa"))
        return theirs / mine if theirs is not None and mine else None


def print_summary(console: Console, rows: Sequence[Row]) -> None:
    """Times and memory beside full attention, long sequences, and the training step; each where there are such rows."""
    places = list(_places(rows))
    compared = [place for place in places if place.full("forward")]
    if compared:
        console.print(_times(compared))
    if any(row.kind == "memory" for row in rows):
        console.print(_memory(compared))
    alone = [row for row in rows if row.step == WHOLE and row.chunk is not None]
    alone += [row for place in places if place not in compared for row in place.rows if row.data == place.ours.data]
    if alone:
        console.print(_alone(alone))
    if find(rows, step=TRAINING_STEP):
        console.print(_training([row for row in rows if row.step == TRAINING_STEP]))


def _places(rows: Sequence[Row]) -> Iterator[Place]:
    whole = [row for row in rows if row.step == WHOLE and row.chunk is None]
    ours = {(geometry(row), row.length, row.data): row for row in reversed(whole) if row.implementation == "nsa"}
    for row in reversed(ours.values()):
        yield Place([r for r in whole if (geometry(r), r.length) == (geometry(row), row.length)], row)


def _times(places: Sequence[Place]) -> Table:
    first = geometry(places[0].ours)
    base = {(place.ours.length, place.ours.data): place for place in places if geometry(place.ours) == first}
    table = _table("ms, medians", ["data", "direction", "nsa", "full attention", "by", "cuDNN / nsa", "over first shape's"])
    for place in places:
        row = place.ours
        for direction in DIRECTIONS:
            mine, name, ratio = place.milliseconds("nsa", direction), place.full(direction), place.ratio(direction)
            if mine is None:
                continue
            beside = base.get((row.length, row.data))
            comparable = beside is not None and beside is not place and beside.ours.valid and row.valid
            theirs = beside.ratio(direction) if beside is not None and comparable else None
            table.add_row(
                *_shape(row), row.data, direction, number(mine),
                number(place.milliseconds(name, direction) if name else None), LABELS[name] if name else "-",
                _times_as_much(ratio) if row.valid else "invalid",
                f"{ratio / theirs:.2f}" if ratio and theirs else "",
            )  # fmt: skip
    return table


def _memory(places: Sequence[Place]) -> Table:
    table = _table("GiB at the peak of forward and backward", ["data", "nsa", "full attention", "by", "nsa / full attention"])
    for place in places:
        mine = find(place.rows, kind="memory", implementation="nsa", data=place.ours.data)
        theirs = next((row for row in place.rows if row.kind == "memory" and row.implementation != "nsa"), None)
        if mine is not None and mine.peak_bytes:
            share = f"{mine.peak_bytes / theirs.peak_bytes:.2f}" if theirs and theirs.peak_bytes else "-"
            label = LABELS[theirs.implementation] if theirs else "-"
            table.add_row(*_shape(mine), mine.data, _gib(mine), _gib(theirs), label, share)
    return table


def _alone(rows: Sequence[Row]) -> Table:
    table = _table("nsa alone", ["direction", "queries a call", "ms", "tokens/s", "GiB at the peak"])
    for row in rows:
        speed = f"{row.length / row.median_ms * 1e3:,.0f}" if row.median_ms else ""
        calls = f"{row.chunk:,}" if row.chunk is not None else "all"
        ms = number(row.median_ms) if row.median_ms else ""
        table.add_row(*_shape(row), row.direction, calls, ms, speed, _gib(row) if row.peak_bytes else "")
    return table


def _training(rows: Sequence[Row]) -> Table:
    first = rows[0]
    title = (
        f"training step, {first.num_layers} layers of width {first.hidden_size}, {first.num_heads}/{first.num_kv_heads} heads"
    )
    table = Table(title=f"{title} of {first.head_dim}, {first.dtype}", title_justify="left")
    for name in ("tokens", "attention", "ms", "tokens/s", "nsa's over it", "GiB at the peak"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    labels = {"nsa": "nsa", "sdpa": "full, as PyTorch picks", "cudnn": "full, cuDNN"}
    for row in rows:
        if row.kind != "time" or row.median_ms is None:
            continue
        mine = find(rows, kind="time", implementation="nsa", length=row.length)
        ratio = row.median_ms / mine.median_ms if mine is not None and mine is not row and mine.median_ms else None
        peak = find(rows, kind="memory", implementation=row.implementation, length=row.length)
        table.add_row(
            f"{row.length:,}", labels[row.implementation], number(row.median_ms), f"{row.tokens_per_s:,.0f}",
            _times_as_much(ratio) if ratio else "", _gib(peak),
        )  # fmt: skip
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("heads", "D/DV", "tokens", *columns):
        table.add_column(name, justify="left" if name in ("data", "direction", "by") else "right")
    return table


def _shape(row: Row) -> tuple[str, str, str]:
    return f"{row.num_heads}/{row.num_kv_heads}", f"{row.head_dim}/{row.value_dim}", f"{row.length:,}"


def _gib(row: Row | None) -> str:
    return "-" if row is None or row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}"


def _times_as_much(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
