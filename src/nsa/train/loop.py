"""The training loop: one step after another, measured, logged, saved, and stopped without losing anything."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.models import LanguageModel, LMConfig
from nsa.train.batches import train_batch, validation_sequences
from nsa.train.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from nsa.train.config import TrainConfig
from nsa.train.corpus import Corpus
from nsa.train.metrics import MetricsFile

METRICS_NAME = "metrics.jsonl"


@dataclass
class Run:
    """A run between two steps.

    Attributes:
        folder: where metrics and checkpoint are written.
        model, optimizer: on ``device``.
        config: how it trains.
        corpus: what it trains on.
        data: the corpus' paths, or None for the standard library; only recorded.
        step: steps done.
        seconds: time spent on them.
    """

    folder: Path
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    corpus: Corpus
    device: torch.device
    data: tuple[str, ...] | None = None
    step: int = 0
    seconds: float = 0.0
    _validation: Tensor | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def save(self) -> Path:
        """Write the checkpoint; returns its path."""
        return save_checkpoint(
            self.folder, self.model, self.optimizer, self.config,
            step=self.step, seconds=self.seconds, data=self.data, fingerprint=self.corpus.fingerprint,
        )  # fmt: skip


def start_run(
    folder: Path,
    model: LMConfig,
    config: TrainConfig,
    corpus: Corpus,
    *,
    device: torch.device | str = "cpu",
    data: tuple[str, ...] | None = None,
) -> Run:
    """A fresh run in ``folder``, which is made; everything is checked before anything is written.

    Raises:
        ValueError: the folder holds a run already, the corpus is too short, the vocabulary can't hold bytes.
    """
    if (folder / FILE_NAME).exists():
        raise ValueError(f"out must be a folder without a run, got {str(folder)!r}; resume that run or name another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(folder)!r}")
    if model.vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256 to train on bytes, got {model.vocab_size}")
    corpus.require(config.context)
    torch.manual_seed(config.seed)
    built = LanguageModel(model).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, built, make_optimizer(built, config), config, corpus, torch.device(device), data)


def resume_run(folder: Path, corpus: Corpus, *, device: torch.device | str = "cpu") -> Run:
    """The run in ``folder`` as its checkpoint left it.

    Raises:
        ValueError: no checkpoint or a damaged one, or another corpus than the run began with.
    """
    saved = load_checkpoint(folder)
    if saved.fingerprint != corpus.fingerprint:
        raise ValueError(
            f"data must be what the run began with, whose fingerprint is {saved.fingerprint[:12]}, "
            f"got a corpus of {corpus.fingerprint[:12]}: files were changed, added or removed"
        )
    model = saved.build_model(device)
    optimizer = make_optimizer(model, saved.train)
    saved.load_optimizer(model, optimizer)
    return Run(folder, model, optimizer, saved.train, corpus, torch.device(device), saved.data, saved.step, saved.seconds)


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms' scales have no reason to be small."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def train(
    run: Run, *, stop: Callable[[], bool] = lambda: False, on_step: Callable[[dict[str, Any]], None] = lambda line: None
) -> bool:
    """Train until the last step, or until ``stop()``; both end with a checkpoint. Returns whether the run is finished.

    Args:
        run: changed in place.
        stop: asked after every step.
        on_step: called with every line of ``metrics.jsonl``: ``step`` (done so far), ``tokens``, ``train_bits_per_byte``,
            ``learning_rate``, ``grad_norm``, ``seconds``, ``tokens_per_second``, and where it was measured
            ``validation_bits_per_byte``.

    Raises:
        FloatingPointError: the loss is no longer a number; the last checkpoint is kept.
    """
    config = run.config
    with MetricsFile(run.folder / METRICS_NAME, run.step) as metrics, _deterministic(run):
        while not run.finished:
            line = _one_step(run)
            metrics.write(line)
            on_step(line)
            stopping = stop()
            if run.finished or stopping or run.step % config.checkpoint_every == 0:
                metrics.sync()
                run.save()
            if stopping:
                break
    return run.finished


def _one_step(run: Run) -> dict[str, Any]:
    config, started = run.config, time.perf_counter()
    batch = train_batch(run.corpus.train, config.seed, run.step, config.batch_size, config.context).to(run.device)
    rate = config.learning_rate_at(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    loss = bits_per_token(run.model, batch)
    torch.autograd.backward(loss * math.log(2))  # the gradient of the natural logarithm, in which clipping is usually stated
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    measured = loss.item()
    if not math.isfinite(measured):
        raise FloatingPointError(f"the loss of step {run.step + 1} is {measured}; a lower learning_rate than {rate:g} may help")
    run.optimizer.step()
    run.step += 1
    spent = time.perf_counter() - started
    line: dict[str, Any] = {
        "step": run.step,
        "tokens": run.step * config.batch_size * config.context,
        "train_bits_per_byte": round(measured, 6),
        "learning_rate": rate,
        "grad_norm": round(norm.item(), 6),
    }
    if run.step % config.eval_every == 0 or run.finished:
        line["validation_bits_per_byte"] = round(validation_loss(run), 6)
    run.seconds += time.perf_counter() - started
    return line | {"seconds": round(run.seconds, 3), "tokens_per_second": round(batch[:, 1:].numel() / spent, 1)}


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Bits per byte over the run's validation sequences, ``batch_size`` at a time."""
    config = run.config
    if run._validation is None:
        run._validation = validation_sequences(run.corpus.validation, config.eval_sequences, config.context)
    run.model.eval()
    sums = [
        bits_per_token(run.model, part.to(run.device)).item() * len(part)
        for part in torch.split(run._validation, config.batch_size)
    ]
    return sum(sums) / len(run._validation)


def bits_per_token(model: LanguageModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy in bits of every token of ``batch [B, T + 1]`` after the first. bf16 products on a GPU."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = model(batch[:, :-1])
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()) / math.log(2)


@contextmanager
def _deterministic(run: Run) -> Iterator[None]:
    """Deterministic algorithms on the CPU always, where they cost nothing; on a GPU where the run asks for them."""
    if run.device.type != "cpu" and not run.config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a second write of every tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
