"""The CSV: one row for each thing measured, with all that is needed to read it years later."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nsa
from nsa.bench.cases import Case
from nsa.config import NSAConfig
from nsa.train.atomic import replacing


@dataclass(frozen=True)
class Row:
    """One measurement. Times in ms, memory in bytes; None is an empty cell.

    Attributes:
        kind: ``"time"``, or ``"memory"`` for the peak of forward and backward.
        implementation: ``"nsa"``, or full attention by ``"cudnn"``, ``"flash"``, ``"efficient"``, or ``"sdpa"`` where PyTorch
            picked one.
        step: a step, ``"whole"``, or ``"training step"`` of a language model.
        direction: ``"forward"``, ``"backward"`` or ``"both"``.
        data: what it was measured on; full attention is measured once for each length.
        ratio_to_cudnn: cuDNN's median over this row's (cuDNN's peak over this row's).
        relative_error: the largest relative norm among the step's tensors in the check before.
        overlap, union_of_4: see ``selection_figures``.
        valid: False if the data's selections are not what they are to stand for.
        chunk: queries of a call where the whole was made in several calls.
        num_layers, hidden_size: of a language model.
        tokens_per_s: of its training step.
        ratio_to_sdpa: as ``ratio_to_cudnn``, to the full attention that PyTorch picked.
    """

    date: str
    gpu: str
    backend: str
    torch: str
    triton: str
    cuda: str
    nsa: str
    kind: str
    implementation: str
    step: str
    direction: str
    data: str
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    block_length: int
    block_stride: int
    selection_block_size: int
    num_selected_blocks: int
    num_initial_blocks: int
    num_local_blocks: int
    window_size: int
    dtype: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    peak_bytes: int | None = None
    ratio_to_cudnn: float | None = None
    relative_error: float | None = None
    overlap: float | None = None
    union_of_4: float | None = None
    valid: bool = True
    chunk: int | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    tokens_per_s: float | None = None
    ratio_to_sdpa: float | None = None


def environment(device: torch.device) -> dict[str, Any]:
    """The cells that all rows of a run share: date (UTC), device and versions."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "nsa": nsa.__version__,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def shapes(case: Case) -> dict[str, Any]:
    """The cells that all rows of a case share."""
    names = {field.name for field in fields(Row)}
    sizes = {name: value for name, value in asdict(case.cfg).items() if name in names}
    return {**sizes, "data": case.data, "length": case.length, "dtype": str(case.dtype).removeprefix("torch.")}


def new_file(folder: Path, date: str, gpu: str) -> Path:
    """``<folder>/<day>-<gpu>.csv``, numbered from the second run of a day on, so that no result is lost."""
    stem = f"{date[:10]}-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}"
    path, number = folder / f"{stem}.csv", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.csv", number + 1
    return path


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All of the file or nothing."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path) -> list[Row]:
    """What ``write_rows`` wrote.

    Raises:
        ValueError: a column is missing or unknown, or a cell is not what its column holds; the message names the file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [Row(**{name: _parse(name, text) for name, text in line.items()}) for line in csv.DictReader(file)]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} must be a file that nsa bench wrote: {error}") from None


_TYPES = {field.name: str(field.type).split(" | ")[0] for field in fields(Row)}


def _parse(name: str, text: str) -> Any:
    kind = _TYPES[name]
    if kind == "str":
        return text
    if text == "":
        return None
    return text == "True" if kind == "bool" else int(text) if kind == "int" else float(text)


def geometry(row: Row) -> tuple[Any, ...]:
    """What two rows must share to lie on one line of a picture: heads, channels, blocks and dtype."""
    sizes = [field.name for field in fields(NSAConfig) if field.name in _TYPES]
    return (row.dtype, *(getattr(row, name) for name in sizes))


def find(rows: Sequence[Row], **cells: object) -> Row | None:
    """The first row with these cells."""
    return next((row for row in rows if all(getattr(row, name) == value for name, value in cells.items())), None)
