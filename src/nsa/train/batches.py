"""Which tokens a step sees: a pure function of the seed and the step's number, so that a resumed run needs no state."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def train_batch(text: Tensor, seed: int, step: int, batch_size: int, context: int) -> Tensor:
    """``batch_size`` random stretches of ``text`` (uint8): int64 ``[B, context + 1]``, inputs and the token after each."""
    draw = random.Random(f"{seed}/{step}")  # a string seeds the same generator on every machine
    starts = [draw.randrange(text.numel() - context) for _ in range(batch_size)]
    return torch.stack([text[i : i + context + 1] for i in starts]).long()


def validation_sequences(text: Tensor, count: int, context: int) -> Tensor:
    """Up to ``count`` stretches spread evenly over ``text``: int64 ``[count, context + 1]``, fewer where it is short."""
    count = max(1, min(count, text.numel() // (context + 1)))
    room = text.numel() - context - 1
    starts = [room * i // max(1, count - 1) for i in range(count)]
    return torch.stack([text[i : i + context + 1] for i in starts]).long()
