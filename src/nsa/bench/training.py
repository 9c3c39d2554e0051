"""A training step of the language model beside its twin with full attention: forward, backward, clipping, AdamW.

Weights, gradients and the optimizer's state are bf16: with fp32 weights and autocast, what 24 layers of width 1024 keep for the
backward at 65,536 tokens takes more than 80 GB. Nothing is compiled, and nothing computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from nsa.bench.baselines import BACKENDS
from nsa.bench.cases import Case
from nsa.bench.check import Finding
from nsa.bench.layer_check import check_layer
from nsa.bench.measure import time_slow
from nsa.bench.results import Row, environment, find
from nsa.bench.run import blank_row, free, require_right, with_ratio
from nsa.models import LanguageModel, LMConfig
from nsa.module import NativeSparseAttention
from nsa.train import TrainConfig
from nsa.train.loop import make_optimizer

TRAINING_STEP = "training step"
DTYPE = torch.bfloat16
# Implementation: the model's attention, and the backends it may choose from. Full attention both as PyTorch picks and by cuDNN,
# which is what everything else is compared with.
TWINS: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]]]] = {
    "sdpa": ("full", nullcontext),
    "cudnn": ("full", lambda: sdpa_kernel(BACKENDS["cudnn"])),
    "nsa": ("nsa", nullcontext),
}


@dataclass(frozen=True)
class TrainingWork:
    """A model on one sequence: ``batch`` int64 ``[1, T + 1]``, random tokens and the token after each."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    batch: Tensor

    def step(self) -> tuple[Tensor, Tensor]:
        """The loss and the norm of the gradient, after the weights have changed."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(self.batch[:, :-1]).float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, self.batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach(), norm.detach()


def make_training_work(cfg: LMConfig, length: int, device: torch.device, seed: int = 0) -> TrainingWork:
    torch.manual_seed(seed)
    with device:  # drawn there: on the host it would take seconds
        model = LanguageModel(cfg).to(DTYPE)
        batch = torch.randint(cfg.vocab_size, (1, length + 1))
    return TrainingWork(model, make_optimizer(model, TrainConfig(learning_rate=1e-4)), batch)


def check_training(work: TrainingWork) -> list[Finding]:
    """The first and the last attention layer on the very input that they got in a step, and of the step what is not finite."""
    inputs: dict[int, Tensor] = {}
    layers: list[Any] = list(work.model.layers)
    sparse = {i: layers[i].attention for i in (0, len(layers) - 1) if isinstance(layers[i].attention, NativeSparseAttention)}
    with ExitStack() as stack:
        for i, layer in sparse.items():
            hook = layer.register_forward_pre_hook(lambda _layer, args, i=i: inputs.__setitem__(i, args[0].detach()))
            stack.callback(hook.remove)
        loss, norm = work.step()
    findings = [
        Finding(TRAINING_STEP, direction, tensor, math.inf, 0.0, math.inf, 0.0, "not finite")
        for direction, tensor, value in (("forward", "loss", loss), ("backward", "norm", norm))
        if not torch.isfinite(value)
    ]
    work.optimizer.zero_grad(set_to_none=True)
    for i, layer in sparse.items():
        findings += check_layer(f"layer {i}", layer, inputs[i])
    return findings


def measure_training(
    cfg: LMConfig,
    length: int,
    device: torch.device,
    on_checked: Callable[[Sequence[Finding]], None],
    on_skipped: Callable[[str], None],
) -> list[Row]:
    """The time and, on a GPU, the memory of a step of the model that ``cfg`` describes, and of its twins.

    Args:
        on_checked: called with the findings before the model's first timing.
        on_skipped: called with a line for what can't be measured.

    Raises:
        CheckFailed: a loss, a gradient or a layer is wrong.
    """
    case = Case(length, "random", cfg.nsa, DTYPE, device)
    blank = replace(
        blank_row(case, environment(device)), step=TRAINING_STEP, direction="both", num_layers=cfg.num_layers,
        hidden_size=cfg.hidden_size,
    )  # fmt: skip
    rows: list[Row] = []
    for name, (attention, backends) in TWINS.items():
        backend = blank.backend if name == "nsa" else "scaled_dot_product_attention"
        filled = replace(blank, implementation=name, backend=backend)
        try:
            with backends():
                twin = replace(cfg, attention=attention)
                rows += [_with_ratios(row, rows) for row in _measure(twin, filled, device, on_checked)]
        except torch.OutOfMemoryError:
            on_skipped(f"{length} {TRAINING_STEP} {name}: out of memory")
        except RuntimeError as error:  # SDPA: a backend was asked for that can't compute this
            if attention == "nsa":
                raise
            on_skipped(f"{length} {TRAINING_STEP} {name}: {str(error).splitlines()[0]}")
        free(device)
    return rows


def _measure(cfg: LMConfig, blank: Row, device: torch.device, on_checked: Callable[[Sequence[Finding]], None]) -> Iterator[Row]:
    work = make_training_work(cfg, blank.length, device)
    findings = check_training(work)
    require_right(f"{blank.length} {TRAINING_STEP} {blank.implementation}", findings)
    if blank.implementation == "nsa":
        on_checked(findings)
    free(device)
    error = max((f.relative_norm for f in findings), default=None)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    t, added = time_slow(work.step, device)
    yield replace(
        blank, kind="time", median_ms=t.median, p20_ms=t.p20, p80_ms=t.p80, samples=t.samples, relative_error=error,
        tokens_per_s=blank.length / t.median * 1e3,
    )  # fmt: skip
    if device.type == "cuda":
        yield replace(blank, kind="memory", peak_bytes=held + added)


def _with_ratios(row: Row, full: Sequence[Row]) -> Row:
    row = with_ratio(row, full)
    picked = find(full, implementation="sdpa", kind=row.kind)
    if picked is None:
        return row
    theirs, mine = (x.median_ms if row.kind == "time" else x.peak_bytes for x in (picked, row))
    return replace(row, ratio_to_sdpa=theirs / mine if theirs is not None and mine else None)
