"""Where a command computes."""

from __future__ import annotations

import torch


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; None: the GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch can use here, got {name!r}: {reason}") from None
    return device
