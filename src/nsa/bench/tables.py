"""What ``nsa bench`` measures when it is asked for everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nsa.bench.ahead import touch_case, touch_model
from nsa.bench.cases import Case
from nsa.bench.data import KINDS
from nsa.bench.run import Plan
from nsa.config import NSAConfig
from nsa.models import LMConfig

DTYPE = torch.bfloat16
COMPILED = 65536  # tokens; no longer case is compiled ahead, because all shapes share the memory then


@dataclass(frozen=True)
class Tables:
    """Lengths in tokens.

    Attributes:
        shape, lengths: step by step and whole, on every kind of data, beside full attention.
        others, others_length: more shapes, whole, on every kind of data, beside full attention.
        long_both: forward and backward of ``shape``, whole, on random data.
        long_forward, chunk: its forward alone, ``chunk`` queries at a time.
        model, model_lengths: a training step beside its twin with full attention.
        milliseconds: about how long each call is repeated.
    """

    shape: NSAConfig
    lengths: Sequence[int]
    others: Sequence[NSAConfig]
    others_length: int
    long_both: int
    long_forward: int
    chunk: int
    model: LMConfig
    model_lengths: Sequence[int]
    milliseconds: float

    def plans(self, device: torch.device, seed: int) -> list[Plan]:
        """Those of ``shape``, of each of ``others``, and of ``long_both``, in this order."""

        def plan(cfg: NSAConfig, lengths: Sequence[int], kinds: Sequence[str], baselines: bool, single_steps: bool) -> Plan:
            return Plan(
                [Case(length, kind, cfg, DTYPE, device, seed=seed) for length in lengths for kind in kinds],
                baselines=("cudnn",) if baselines else (), fallbacks=("flash", "efficient") if baselines else (),
                single_steps=single_steps, milliseconds=self.milliseconds,
            )  # fmt: skip

        return [
            plan(self.shape, self.lengths, KINDS, baselines=True, single_steps=True),
            *(plan(cfg, [self.others_length], KINDS, baselines=True, single_steps=False) for cfg in self.others),
            plan(self.shape, [self.long_both], KINDS[:1], baselines=False, single_steps=False),
        ]

    def jobs(self, device: torch.device, seed: int) -> list[Callable[[], object]]:
        """A call for each shape that compiles its kernels; those of other lengths are nearly all the same."""
        found: list[Callable[[], object]] = [partial(touch_model, self.model, min(self.model_lengths), device)]
        for plan in self.plans(device, seed):
            short = [case for case in plan.cases if case.length <= COMPILED]
            if short:
                found.append(partial(touch_case, max(short, key=lambda case: case.length), plan.single_steps))
        return found


TABLES = {
    "cuda": Tables(
        shape=NSAConfig(head_dim=128, num_heads=64, num_kv_heads=4),
        lengths=(8192, 32768, 65536, 131072),
        others=(
            NSAConfig(head_dim=128, num_heads=16, num_kv_heads=4),
            NSAConfig(head_dim=128, num_heads=4, num_kv_heads=4),
            NSAConfig(head_dim=192, value_dim=128, num_heads=64, num_kv_heads=4),
            NSAConfig(head_dim=64, num_heads=64, num_kv_heads=4),
        ),
        others_length=65536,
        long_both=1 << 18,
        long_forward=1 << 20,
        chunk=65536,
        model=LMConfig(
            NSAConfig(head_dim=64, num_heads=16, num_kv_heads=1), hidden_size=1024, num_layers=24, compressor="mean"
        ),
        model_lengths=(32768, 65536),
        milliseconds=50,
    ),
    "cpu": Tables(  # shows that all of it runs
        shape=NSAConfig(head_dim=16, num_heads=4, num_kv_heads=2),
        lengths=(128, 192),
        others=(NSAConfig(head_dim=24, value_dim=16, num_heads=4, num_kv_heads=4),),
        others_length=192,
        long_both=256,
        long_forward=320,
        chunk=128,
        model=LMConfig(NSAConfig(head_dim=16, num_heads=4, num_kv_heads=1), hidden_size=64, num_layers=2, compressor="mean"),
        model_lengths=(128, 192),
        milliseconds=1,
    ),
}
