"""Train the same model with three kinds of attention on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from nsa.demo.reads import share_of_tokens_read
from nsa.models import LanguageModel
from nsa.models.language_model import AttentionKind
from nsa.train import Corpus, Run, start_run, train
from nsa.train.checkpoint import FILE_NAME
from nsa.train.metrics import read_metrics
from nsa.train.presets import Preset

OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Twin:
    """One trained model of the comparison.

    Attributes:
        attention: ``"nsa"``, ``"full"`` or ``"window"``.
        validation: the last validation loss, bits per byte.
        read: ``share_of_tokens_read``.
        seconds: training time.
        lines: its metrics, one for each step.
    """

    attention: str
    model: LanguageModel
    validation: float
    read: float
    seconds: float
    lines: list[dict[str, Any]]


def train_twins(
    chosen: Preset,
    corpus: Corpus,
    folder: Path,
    device: torch.device,
    watch: Callable[[Run], AbstractContextManager[OnStep]],
    data: tuple[str, ...] | None = None,
) -> Iterator[Twin]:
    """Train NSA, full attention and the window alone, each in ``folder/<attention>``, replacing what an earlier demo left.

    Args:
        watch: gives for each run a context whose value is called with every line of metrics.
    """
    corpus.require(chosen.train.context)
    for kind in get_args(AttentionKind):
        (folder / kind / FILE_NAME).unlink(missing_ok=True)
        run = start_run(folder / kind, replace(chosen.model, attention=kind), chosen.train, corpus, device=device, data=data)
        with watch(run) as on_step:
            train(run, on_step=on_step)
        lines = read_metrics(folder / kind / "metrics.jsonl")
        read = share_of_tokens_read(run.model.cfg, chosen.train.context)
        yield Twin(kind, run.model.eval(), lines[-1]["validation_bits_per_byte"], read, run.seconds, lines)
