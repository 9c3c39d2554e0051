"""What a run shows while it trains."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nsa.train import Run
from nsa.train.corpus import Corpus

SHOWN_SKIPS = 5


class TrainProgress:
    """A bar with loss, tokens/s and time left, and a line for every validation. Its ``on_step`` is for ``train``."""

    def __init__(self, console: Console, run: Run, name: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[speed]}  left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._name, self._total = name, run.config.steps
        self._task = self._progress.add_task(name, total=self._total, completed=run.step, loss="", speed="")

    def on_step(self, line: dict[str, Any]) -> None:
        loss, speed = line["train_bits_per_byte"], line["tokens_per_second"]
        self._progress.update(self._task, completed=line["step"], loss=f"{loss:.3f} bits/byte", speed=f"{speed:,.0f} tokens/s")
        if "validation_bits_per_byte" in line:
            self._progress.console.print(
                f"{self._name:>6}  step {line['step']:>{len(str(self._total))}}/{self._total}  train {loss:.3f}  "
                f"validation {line['validation_bits_per_byte']:.3f} bits/byte  {speed:,.0f} tokens/s  {line['seconds']:.0f} s",
                highlight=False,
            )

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()


def describe_corpus(console: Console, corpus: Corpus) -> None:
    """Sizes of both parts, and a note on what was skipped."""
    console.print(
        f"corpus: {corpus.train.numel():,} bytes of {len(corpus.train_files)} files to train on, "
        f"{corpus.validation.numel():,} bytes of {len(corpus.validation_files)} files to validate with",
        highlight=False,
    )
    for path, reason in corpus.skipped[:SHOWN_SKIPS]:
        console.print(f"skipped {path}: {reason}", highlight=False, markup=False)
    if len(corpus.skipped) > SHOWN_SKIPS:
        console.print(f"skipped {len(corpus.skipped) - SHOWN_SKIPS} more files", highlight=False)
