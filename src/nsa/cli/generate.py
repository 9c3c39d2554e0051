"""``nsa generate``: continue prompts with a trained model."""

from __future__ import annotations

import codecs
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from nsa import models
from nsa.cli.device import pick_device
from nsa.train import load_checkpoint


def generate(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder, or its checkpoint file.")],
    prompt: Annotated[list[str], typer.Option(help="The text to continue; may be repeated, to continue several at once.")],
    max_new_tokens: Annotated[int, typer.Option(help="Bytes to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte each time; 1 draws as the model says.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Continue prompts with the cached decoder. The text goes to stdout; a bar and the speed go to stderr."""
    if not all(prompt):
        raise ValueError("prompt must hold at least one byte, got an empty text")
    saved, place = load_checkpoint(checkpoint), pick_device(device)
    if saved.model.vocab_size != 256:
        raise ValueError(f"vocab_size must be 256 to write bytes, got a checkpoint of {saved.model.vocab_size}")
    model = saved.build_model(place).eval()
    texts = [text.encode() for text in prompt]
    lengths = [len(text) for text in texts]
    tokens = torch.tensor([[*text, *bytes(max(lengths) - len(text))] for text in texts], device=place)
    draws, started = torch.Generator().manual_seed(seed), time.perf_counter()
    steps = models.generate(model, tokens, max_new_tokens, lengths=lengths, temperature=temperature, generator=draws)
    console = Console(stderr=True)
    # A single text shows itself as it grows, unless it goes elsewhere.
    alone = len(texts) == 1
    hidden = not console.is_terminal or (alone and Console().is_terminal)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in texts]
    found, first, count = list(prompt), 0.0, 0
    bar = track(steps, "bytes", max_new_tokens, console=console, transient=True, disable=hidden)
    for count, (drawn, _) in enumerate(bar, 1):
        if count == 1:
            first = time.perf_counter() - started
        pieces = [decoder.decode(bytes([byte])) for decoder, byte in zip(decoders, drawn.tolist())]
        if alone:
            typer.echo((prompt[0] if count == 1 else "") + pieces[0], nl=False)
        found = [text + piece for text, piece in zip(found, pieces)]
    ends = [decoder.decode(b"", final=True) for decoder in decoders]
    if alone:
        typer.echo(ends[0])
    else:
        typer.echo("\n\n".join(f"[{i}] {text}{end}" for i, (text, end) in enumerate(zip(found, ends), 1)))
    rest = time.perf_counter() - started - first
    speed = f", then {(count - 1) * len(texts) / rest:,.1f} tokens/s" if count > 1 else ""
    if max(lengths) + count > saved.train.context:
        typer.echo(f"note: longer than the {saved.train.context} tokens that the model was trained on", err=True)
    told = f"prompt of {lengths[0]} tokens" if alone else f"{len(texts)} prompts of {min(lengths)} to {max(lengths)} tokens"
    typer.echo(f"{told}: first token after {first:.2f} s{speed}", err=True)
