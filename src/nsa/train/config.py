"""The hyper-parameters of a training run, and the learning rate they give each step."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains.

    Args:
        steps: optimizer steps of the whole run.
        batch_size: sequences of a step.
        context: tokens of a sequence.
        learning_rate: the peak, reached after the warm-up.
        final_learning_rate: what the cosine ends at, as a share of the peak.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's, for matrices only.
        grad_clip: the largest norm of the gradient.
        seed: of the weights and the batches.
        eval_every: steps between two measurements of the validation loss; the last step is always measured.
        eval_sequences: sequences of a measurement, the same each time.
        checkpoint_every: steps between two checkpoints; the last step is always saved.
        deterministic: use deterministic algorithms on a GPU; on a CPU they always are.

    Raises:
        TypeError, ValueError: a value that cannot be; the message names the field, what it got and what it needs.
    """

    steps: int = 300
    batch_size: int = 4
    context: int = 1024
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.1
    warmup_steps: int = 20
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    eval_every: int = 50
    eval_sequences: int = 16
    checkpoint_every: int = 100
    deterministic: bool = False

    def __post_init__(self) -> None:
        least = {"seed": 0, "warmup_steps": 0}
        for name in (
            "steps", "batch_size", "context", "warmup_steps", "seed", "eval_every", "eval_sequences", "checkpoint_every"
        ):  # fmt: skip
            value, floor = getattr(self, name), least.get(name, 1)
            try:
                low = operator.index(value) < floor
            except TypeError:
                raise TypeError(f"{name} must be a whole number, got {value!r}") from None
            if low:
                raise ValueError(f"{name} must be at least {floor}, got {value}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must be between 0 and 1, got {self.final_learning_rate}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of ``dataclasses.asdict``.

        Raises:
            ValueError: a field that this version does not know.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields of the training configuration: {', '.join(unknown)}")
        return cls(**values)

    def learning_rate_at(self, step: int) -> float:
        """The rate of step ``step``, counted from 0: linear warm-up, then half a cosine down to the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2)
