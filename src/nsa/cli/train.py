"""``nsa train``: options to configurations, a run with a progress bar, and the way back into an interrupted one."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from nsa.cli.device import pick_device
from nsa.cli.progress import TrainProgress, describe_corpus
from nsa.models import LMConfig
from nsa.train import Run, TrainConfig, load_checkpoint, read_corpus, resume_run, start_run
from nsa.train import train as train_run
from nsa.train.interrupt import stop_on_signals
from nsa.train.presets import PRESETS, preset

Whole = Annotated[int | None, typer.Option()]
PRESET_HELP = "; ".join(f"{name}: {p.about}" for name, p in PRESETS.items())


def train(
    more_data: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="Further paths for --data.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(metavar="PATH...", help="Files and folders of text. Default: Python's own source.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<attention>-<preset>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, with all of its settings.")] = None,
    preset_name: Annotated[str | None, typer.Option("--preset", help=PRESET_HELP)] = None,
    attention: Annotated[str | None, typer.Option(help="nsa, full, or window.")] = None,
    layers: Whole = None,
    width: Annotated[int | None, typer.Option(help="Channels of the residual stream.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    steps: Whole = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the batches.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between two validations.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    deterministic: Annotated[bool | None, typer.Option(help="The same bits on every run, on a GPU too.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Train a byte-level language model with native sparse, full or window attention.

    Ctrl-C and SIGTERM finish the step, save, and say how to go on; a second one stops at once.
    """
    console, place = Console(soft_wrap=True), pick_device(device)
    paths = tuple(str(p.resolve()) for p in [*(data or []), *(more_data or [])]) or None
    options = {
        "attention": attention, "num_layers": layers, "width": width, "heads": heads, "context": context, "batch_size": batch,
        "steps": steps, "learning_rate": lr, "seed": seed, "eval_every": eval_every, "checkpoint_every": checkpoint_every,
        "deterministic": deterministic,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    if resume is None:
        run = _start(console, place, paths, out, preset_name, given)
    elif out is not None:
        raise ValueError(f"out must not be given with resume, got {str(out)!r}: a run goes on in its own folder")
    else:
        run = _resume(console, place, paths, resume, preset_name, given)
    _carry_out(console, run, device)


def _start(
    console: Console,
    place: torch.device,
    paths: tuple[str, ...] | None,
    out: Path | None,
    name: str | None,
    given: dict[str, Any],
) -> Run:
    name, base = preset(name, place)
    model, config = configure(base.model, base.train, given)
    corpus = read_corpus(paths)
    describe_corpus(console, corpus)
    return start_run(out or Path("runs", f"{model.attention}-{name}"), model, config, corpus, device=place, data=paths)


def _resume(
    console: Console, place: torch.device, paths: tuple[str, ...] | None, folder: Path, name: str | None, given: dict[str, Any]
) -> Run:
    saved = load_checkpoint(folder)
    asked = (saved.model, saved.train) if name is None else (preset(name, place)[1].model, preset(name, place)[1].train)
    saved.require(*configure(*asked, given))
    corpus = read_corpus(paths or saved.data)
    describe_corpus(console, corpus)
    return resume_run(folder, corpus, device=place)


def _carry_out(console: Console, run: Run, device: str | None) -> None:
    if run.finished:
        console.print(f"already finished: {run.folder} did all of its {run.config.steps} steps", highlight=False)
        return
    model = run.model.cfg
    console.print(
        f"{model.attention} attention, {model.num_layers} layers, width {model.hidden_size}, "
        f"{run.model.num_parameters():,} parameters, on {run.device}; steps {run.step + 1} to {run.config.steps} "
        f"of {run.config.batch_size} x {run.config.context} tokens",
        highlight=False,
    )
    with stop_on_signals() as stop, TrainProgress(console, run, model.attention) as progress:
        finished = train_run(run, stop=stop, on_step=progress.on_step)
    if finished:
        console.print(f"finished; metrics and checkpoint are in {run.folder}", highlight=False)
        return
    command = [*_program(), "train", "--resume", str(run.folder), *(["--device", device] if device else [])]
    console.print(f"stopped after step {run.step} and saved. To go on:\n  {shlex.join(command)}", highlight=False, markup=False)
    assert stop.signal is not None
    raise typer.Exit(128 + stop.signal)


def _program() -> list[str]:
    """How this program was called."""
    return ["python", "-m", "nsa"] if Path(sys.argv[0]).name == "__main__.py" else ["nsa"]


def configure(model: LMConfig, config: TrainConfig, given: dict[str, Any]) -> tuple[LMConfig, TrainConfig]:
    """Both configurations with the options that were ``given``; heads share the width evenly.

    Raises:
        ValueError: an option that cannot be.
    """
    given = dict(given)
    width, heads = given.pop("width", None), given.pop("heads", None)
    ours: dict[str, Any] = {name: given.pop(name) for name in ("attention", "num_layers") if name in given}
    if width is not None or heads is not None:
        ours |= _shapes(model, width if width is not None else model.hidden_size, heads or model.nsa.num_heads)
    return replace(model, **ours), replace(config, **given)


def _shapes(model: LMConfig, width: int, heads: int) -> dict[str, Any]:
    if heads < 1 or width < 1 or width % (2 * heads):
        raise ValueError(f"width must be a positive multiple of twice the heads, {2 * heads}, got {width}")
    old, head_dim = model.nsa, width // heads
    kv_heads = old.num_kv_heads if heads % old.num_kv_heads == 0 else 1
    nsa = replace(
        old, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, softmax_scale=head_dim**-0.5
    )
    return {"hidden_size": width, "mlp_size": None, "nsa": nsa}
