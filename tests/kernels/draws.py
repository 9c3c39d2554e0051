"""Random calls of the kernels. What is compiled in comes from a list, so that compiling does not eat the run."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

import nsa
from nsa.kernels import hopper
from tests.cases import KINDS, Case, Inputs, make_inputs, random_call


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for: dtype, head dims, KV heads and their groups, block sizes and the selection's width."""

    dtype: str
    dim: int
    value_dim: int
    kv_heads: int
    group: int
    length: int
    stride: int
    size: int
    n: int

    def config(self, rng: random.Random) -> nsa.NSAConfig:
        local = rng.randint(1, self.n - 1)
        return nsa.NSAConfig(
            head_dim=self.dim, value_dim=self.value_dim, num_kv_heads=self.kv_heads, num_heads=self.kv_heads * self.group,
            block_length=self.length, block_stride=self.stride, selection_block_size=self.size, num_selected_blocks=self.n,
            num_local_blocks=local, num_initial_blocks=rng.randint(1, self.n - local),
            window_size=rng.choice([2, 17, 64, rng.randint(3, 300), 1000]),
        )  # fmt: skip


GPU_SHAPES = (
    Shape("bfloat16", 128, 128, 2, 16, 32, 16, 64, 16),
    Shape("bfloat16", 64, 64, 1, 16, 32, 16, 64, 7),
    Shape("bfloat16", 192, 128, 1, 8, 32, 16, 64, 5),
    Shape("bfloat16", 256, 256, 1, 4, 16, 8, 32, 4),
    Shape("bfloat16", 40, 72, 3, 3, 12, 4, 24, 5),
    Shape("bfloat16", 16, 16, 4, 1, 8, 8, 8, 16),
    Shape("bfloat16", 80, 80, 2, 2, 16, 16, 128, 3),
    Shape("bfloat16", 128, 64, 1, 48, 32, 16, 64, 16),
    Shape("float16", 128, 128, 4, 4, 32, 16, 64, 16),
    Shape("float16", 64, 128, 2, 5, 8, 2, 20, 6),
    Shape("float16", 96, 96, 1, 128, 16, 8, 40, 8),
    Shape("float16", 24, 16, 2, 20, 3, 1, 12, 33),
    Shape("bfloat16", 32, 32, 2, 4, 16, 8, 32, 8),
    Shape("float16", 256, 128, 1, 1, 64, 16, 64, 4),
    Shape("float16", 128, 128, 1, 7, 48, 16, 96, 12),
    Shape("bfloat16", 64, 64, 2, 6, 8, 4, 64, 9),
    Shape("float16", 128, 128, 1, 12, 32, 32, 64, 8),
    Shape("float32", 64, 64, 2, 4, 16, 8, 32, 6),
    Shape("float32", 128, 128, 1, 3, 32, 16, 64, 4),
    Shape("float32", 40, 24, 3, 1, 4, 4, 16, 9),
    Shape("float32", 16, 32, 1, 16, 8, 4, 8, 5),
    # Too much to be held at once: selection blocks go in pieces, and groups in shares.
    Shape("bfloat16", 256, 192, 1, 80, 20, 20, 100, 3),
    Shape("float32", 256, 256, 1, 40, 32, 16, 64, 4),
)
INTERPRETER_SHAPES = (
    Shape("float32", 16, 16, 2, 3, 8, 4, 8, 4),
    Shape("float16", 24, 40, 1, 5, 4, 2, 12, 5),
    Shape("float32", 40, 16, 1, 1, 8, 8, 16, 3),
    Shape("float16", 16, 16, 3, 2, 6, 3, 9, 7),
)


def shapes(device: str) -> tuple[Shape, ...]:
    return GPU_SHAPES if device == "cuda" else INTERPRETER_SHAPES


LAYOUTS = ("plain", "table", "packed")  # of lengths, each compiled for itself
EVERY_LAYOUT = 6  # of the shapes on a GPU, the first: compiling is most of the suite's time


def layout(kind: str) -> str:
    return "packed" if kind.startswith("packed") else "table" if kind.endswith("tensor") else "plain"


def kinds(number: int, device: str) -> tuple[str, ...]:
    """The kinds of calls of a shape: all of them, or those of two layouts in three."""
    left_out = LAYOUTS[number % 3] if device == "cuda" and number >= EVERY_LAYOUT else None
    return tuple(kind for kind in KINDS if layout(kind) != left_out)


def kind_of(draw: int, device: str) -> str:
    known = len(shapes(device))
    some = kinds(draw % known, device)
    return some[draw // known % len(some)]


def portable(draw: int, device: str) -> bool:
    """Whether case ``draw`` does without kernels that only one kind of GPU runs: every other round, where there are any."""
    known = shapes(device)
    shape = known[draw % len(known)]
    some = shape.dtype != "float32" and (shape.dim, shape.value_dim) in hopper.HEAD_DIMS
    return some and draw // (len(known) * len(kinds(draw % len(known), device))) % 2 == 1


def drawn_case(draw: int, device: str) -> tuple[Case, torch.dtype]:
    """Case number ``draw``: consecutive ones visit every shape, then every kind of call."""
    known = shapes(device)
    shape, rng = known[draw % len(known)], random.Random(draw)
    kind = kind_of(draw, device)
    cfg = shape.config(rng)
    while True:
        case = random_call(rng, draw, cfg, kind, 500 if device == "cuda" else 40)
        if _has_gradients(case):
            return case, getattr(torch, shape.dtype)


def _has_gradients(case: Case) -> bool:
    """Whether some query sees two keys of each branch. Else the gradients of its scores are exactly 0, which is no scale for an
    error: ``test_steps.py`` has a test of its own for them.
    """
    enough = case.cfg.block_length + case.cfg.block_stride
    return any(q and k >= enough for q, k in zip(case.lens_q, case.lens_k))


def guarded_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """The case's tensors as strided views into larger ones full of NaN: what a kernel reads outside, an output shows."""

    def guard(x: Tensor) -> Tensor:
        batch, rows, heads, dim = x.shape
        around = x.new_full((batch, rows + 9, heads + 1, dim + 8), float("nan"))
        view = around[:, 4 : 4 + rows, :heads, :dim]
        return view.copy_(x)

    x = make_inputs(case, dtype, device)
    guards = {name: y if name == "gates" else guard(y) for name, y in x.items()}
    return Inputs(**{name: y.detach().requires_grad_() for name, y in guards.items()})
