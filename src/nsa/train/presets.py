"""Named sizes to start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.config import NSAConfig
from nsa.models import LMConfig
from nsa.train.config import TrainConfig


@dataclass(frozen=True)
class Preset:
    """A model and how to train it; ``about`` says for what."""

    about: str
    model: LMConfig
    train: TrainConfig


PRESETS = {
    "micro": Preset(
        "seconds on a CPU; learns next to nothing, shows that everything runs",
        LMConfig(
            NSAConfig(
                head_dim=16, num_heads=2, num_kv_heads=1, block_length=8, block_stride=4, selection_block_size=8,
                num_selected_blocks=4, window_size=8,
            ),
            hidden_size=32, num_layers=2,
        ),
        TrainConfig(steps=8, batch_size=2, context=64, warmup_steps=2, eval_every=4, eval_sequences=4, checkpoint_every=4),
    ),
    "tiny": Preset(
        "minutes on two CPU cores",
        LMConfig(
            NSAConfig(
                head_dim=64, num_heads=2, num_kv_heads=1, block_length=16, block_stride=8, selection_block_size=16,
                num_selected_blocks=8, window_size=64,
            ),
            # In so short a run the mean learns as well as the MLP (2.78 and 2.82 bits per byte after 300 steps), with half of
            # the parameters, so that the twins are of nearly one size.
            hidden_size=128, num_layers=2, compressor="mean",
        ),
        TrainConfig(steps=400, batch_size=2, context=1024, warmup_steps=50, eval_every=40, checkpoint_every=100),
    ),
    "small": Preset(
        "a GPU",
        LMConfig(
            NSAConfig(head_dim=64, num_heads=16, num_kv_heads=1),
            hidden_size=512, num_layers=6,
        ),
        TrainConfig(
            steps=600, batch_size=4, context=8192, learning_rate=1e-3, warmup_steps=60, eval_every=50, eval_sequences=16,
            checkpoint_every=200,
        ),
    ),
}  # fmt: skip


def preset(name: str | None, device: torch.device) -> tuple[str, Preset]:
    """The preset called ``name``; None: ``"tiny"`` on a CPU, ``"small"`` on anything faster.

    Raises:
        ValueError: there is none of that name.
    """
    name = name or ("tiny" if device.type == "cpu" else "small")
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return name, PRESETS[name]
