"""The names of torch that the kernels' files use when they are imported, for an environment without torch."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

DTYPES = ("float64", "float32", "float16", "bfloat16", "int32", "int64")


class Dtype:
    """A dtype as the tuning tables tell them apart: by identity, and by size."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.itemsize = int(name.removeprefix("b").removeprefix("float").removeprefix("int")) // 8


def stand_in() -> None:
    """Where torch is missing, a module of that name which holds types and dtypes, and computes nothing."""
    if "torch" in sys.modules or importlib.util.find_spec("torch") is not None:
        return
    torch = ModuleType("torch", "Names of torch, for an export without it.")
    for name in ("Tensor", "device"):
        setattr(torch, name, type(name, (), {}))
    torch.dtype = Dtype  # type: ignore[attr-defined]
    for name in DTYPES:
        setattr(torch, name, Dtype(name))
    sys.modules["torch"] = torch
