"""A run's state as one safetensors file: weights, optimizer state, and the configurations as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsa.models import LanguageModel, LMConfig
from nsa.train.atomic import replacing
from nsa.train.config import TrainConfig

FILE_NAME = "checkpoint.safetensors"
FORMAT = "nsa-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        model, train: the run's configurations.
        step: steps done.
        seconds: time spent training them.
        data: the corpus' paths, or None for the standard library.
        fingerprint: the corpus' own.
        tensors: ``model.<parameter>`` and ``optimizer.<parameter>.<state>``.
    """

    model: LMConfig
    train: TrainConfig
    step: int
    seconds: float
    data: tuple[str, ...] | None
    fingerprint: str
    tensors: Mapping[str, Tensor]

    def build_model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """The model with its weights, on ``device``.

        Raises:
            ValueError: the tensors don't fit the configuration.
        """
        model = LanguageModel(self.model)
        saved = {name.removeprefix("model."): x for name, x in self.tensors.items() if name.startswith("model.")}
        mine = model.state_dict()
        for name in sorted(set(mine) | set(saved)):
            if name not in saved or name not in mine:
                raise ValueError(f"the checkpoint's weight {name} is {'missing' if name in mine else 'not in the model'}")
            if saved[name].shape != mine[name].shape:
                raise ValueError(
                    f"the checkpoint's weight {name} must be {list(mine[name].shape)} for its configuration, "
                    f"got {list(saved[name].shape)}"
                )
        model.load_state_dict(saved)
        return model.to(device)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give ``optimizer``, which optimizes ``model``, its state back."""
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}
            # AdamW counts its steps on the CPU; the moments live beside their parameter.
            placed = {key: x if key == "step" else x.to(parameter.device) for key, x in state.items()}
            if placed:
                optimizer.state[parameter] = placed

    def require(self, model: LMConfig, train: TrainConfig) -> None:
        """Raise ``ValueError``, naming every field that differs, unless the configurations are the checkpoint's."""
        differing = _differences(asdict(self.model) | asdict(self.train), asdict(model) | asdict(train))
        if differing:
            raise ValueError("the checkpoint was trained with another configuration: " + "; ".join(differing))


def save_checkpoint(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, train: TrainConfig, *,
    step: int, seconds: float, data: tuple[str, ...] | None, fingerprint: str,
) -> Path:  # fmt: skip
    """Write ``folder/checkpoint.safetensors`` atomically: after a crash the one before is still whole. Returns its path."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": x for key, x in optimizer.state.get(parameter, {}).items()}
    described = {"model": asdict(model.cfg), "train": asdict(train), "step": step, "seconds": seconds, "data": data}
    metadata = {"format": FORMAT, "run": json.dumps(described | {"fingerprint": fingerprint})}
    path = folder / FILE_NAME
    with replacing(path) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint of a run's folder, or a checkpoint file.

    Raises:
        ValueError: there is none, or the file is damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"checkpoint must be a run's folder or a checkpoint file, got {str(path)!r}: there is no {file}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a checkpoint: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file} must be a checkpoint of format {FORMAT!r}, got {metadata.get('format')!r}")
    run: dict[str, Any] = json.loads(metadata["run"])
    return Checkpoint(
        LMConfig.from_dict(run["model"]), TrainConfig.from_dict(run["train"]), run["step"], run["seconds"],
        None if run["data"] is None else tuple(run["data"]), run["fingerprint"], tensors,
    )  # fmt: skip


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in saved.items():
        if isinstance(value, Mapping):
            found += _differences(value, asked[name], f"{prefix}{name}.")
        elif value != asked[name]:
            found.append(f"{prefix}{name} is {value!r} in the checkpoint, got {asked[name]!r}")
    return found
