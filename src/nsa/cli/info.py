"""``nsa info``: versions, the device, and which backend computes on it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated

import torch
import typer

import nsa
from nsa import _dispatch
from nsa.cli.device import pick_device


def info(
    device: Annotated[str | None, typer.Option(help="Ask about this device. Default: the GPU if there is one.")] = None,
) -> None:
    """Show versions, the device, which backend runs by default, and why the others don't."""
    place = pick_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    lines = [
        ("nsa", nsa.__version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("CUDA", torch.version.cuda or "not in this torch"),
        ("device", _describe(place)),
    ]
    chosen = _dispatch.default(place)
    for backend in _dispatch.BACKENDS:
        reason = _dispatch.supports(backend, place, dtype)
        state = f"can't run: {reason}" if reason else "runs by default" if backend == chosen else "can run, when it is named"
        lines.append((f"backend {backend}", f"{state} ({place.type}, {str(dtype).removeprefix('torch.')})"))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{device}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    return f"{device}: {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
