"""``nsa generate``: continue a prompt with a trained model."""

from __future__ import annotations

import codecs
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from nsa import models
from nsa.cli.device import pick_device
from nsa.train import load_checkpoint


def generate(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder, or its checkpoint file.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Bytes to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte each time; 1 draws as the model says.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Continue a prompt with the cached decoder. The text goes to stdout, the speed to stderr."""
    if not prompt:
        raise ValueError("prompt must hold at least one byte, got an empty text")
    saved, place = load_checkpoint(checkpoint), pick_device(device)
    if saved.model.vocab_size != 256:
        raise ValueError(f"vocab_size must be 256 to write bytes, got a checkpoint of {saved.model.vocab_size}")
    model = saved.build_model(place).eval()
    tokens = torch.tensor([list(prompt.encode())], device=place)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    draws, started = torch.Generator().manual_seed(seed), time.perf_counter()
    steps = models.generate(model, tokens, max_new_tokens, temperature=temperature, generator=draws)
    first, count = 0.0, 0
    for count, (token, _) in enumerate(steps, 1):
        if count == 1:
            first = time.perf_counter() - started
            typer.echo(prompt, nl=False)
        typer.echo(decoder.decode(bytes(token.tolist())), nl=False)
    typer.echo(decoder.decode(b"", final=True))
    rest = time.perf_counter() - started - first
    speed = f", then {(count - 1) / rest:,.1f} tokens/s" if count > 1 else ""
    if tokens.shape[1] + count > saved.train.context:
        typer.echo(f"note: longer than the {saved.train.context} tokens that the model was trained on", err=True)
    typer.echo(f"prompt of {tokens.shape[1]} tokens: first token after {first:.2f} s{speed}", err=True)
