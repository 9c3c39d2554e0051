"""Compile every kernel for a GPU that this machine does not have: run the launchers with a driver that only compiles.

    python tests/kernels/ahead_of_time.py                           # the whole matrix
    python tests/kernels/ahead_of_time.py sm_90                     # one target
    python tests/kernels/ahead_of_time.py sm_90 bf16 192/128 16 64  # one case: dtype, head dims, group, selection block

Shared memory must be within the target's, and within what ``nsa.tuning`` reckons with. Must not run where TRITON_INTERPRET is
set.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import nsa
from nsa import _dispatch, tuning
from nsa.kernels import hopper

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
NARROW = re.compile(r"ld\.global\S*\.[bu]16\s")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """What the kernels are compiled for."""

    dtype: str
    dim: int
    value_dim: int
    group: int = 16
    size: int = 64

    def __str__(self) -> str:
        return f"{self.dtype} {self.dim}/{self.value_dim}, groups of {self.group}, blocks of {self.size}"


DIMS = ((16, 16), (40, 40), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
CASES = (
    *(Case(dtype, *dims) for dtype in DTYPES for dims in DIMS),
    # The ends of what groups and selection blocks may be: few rows and keys, many, and far too many to be held at once.
    Case("bf16", 128, 128, 1, 8),
    Case("bf16", 128, 128, 128),
    Case("bf16", 256, 256, 16, 128),
    Case("fp32", 256, 256, 128, 128),
)


@dataclass(frozen=True)
class Launch:
    """A kernel as it was compiled.

    Attributes:
        shared: bytes of shared memory that it was given.
        reckoned: how many ``tuning`` reckoned with where it chose the tile.
        narrow: loads of 2 bytes each in its code: rows that could not be seen to be aligned. 0 where it is not PTX.
    """

    kernel: str
    shared: int
    reckoned: int | None
    narrow: int


class CompilingDriver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, name: str) -> None:
        self.target, self.device = TARGETS[name], list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device  # Triton remembers a device's target

    def get_current_stream(self, device: int) -> int:
        return 0


def reckoned(kernel: str, operand: Any, arch: int, constants: dict[str, int]) -> int | None:
    """``tuning.shared_bytes`` of a launch whose first argument is ``operand``, a tensor or its descriptor."""
    module, _, name = kernel.rpartition(".")
    kind = name.removesuffix("_kernel").split("_")[-1]
    if (
        not module.startswith("triton.")
        or module.startswith("triton.decode")
        or kind not in ("forward", "dq", "dkv", "importance")
    ):
        return None
    keys = constants["BJ"] * constants["SUB"] if kind == "importance" else constants["BN"]
    dim = constants["BD"] * constants.get("PIECES", 1)
    value_dim = constants.get("BDV", dim)
    dtype = getattr(operand, "base", operand).dtype
    return tuning.shared_bytes(kind, constants["BM"], keys, dim, value_dim, dtype, constants["num_stages"], arch)


@contextmanager
def compiling(name: str) -> Iterator[list[Launch]]:
    """Inside, launches compile for target ``name`` and run nothing; yields them, as they come."""
    target, launches, run = TARGETS[name], [], JITFunction.run
    arch = target.arch if target.backend == "cuda" else 0

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.module.removeprefix('nsa.kernels.')}.{self.__name__}"
        narrow = len(NARROW.findall(kernel.asm.get("ptx", "")))
        launches.append(Launch(name, kernel.metadata.shared, reckoned(name, args[0], arch, kwargs), narrow))
        return kernel

    with (
        mock.patch.object(triton.runtime.driver, "_active", CompilingDriver(name)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tuning, "arch", return_value=arch),
        mock.patch.object(_dispatch, "_triton", return_value=None),
    ):
        yield launches


def twins(name: str) -> Iterator[object]:
    """Where Hopper's kernels would run, their portable twins must compile too."""
    yield contextlib.nullcontext()
    if name == "sm_90":
        yield mock.patch.object(hopper, "supports", return_value="switched off")


def compile_all(name: str, case: Case) -> list[Launch]:
    """Every kernel that a training step and the steps alone launch, batched and packed."""
    group, size, dtype = case.group, case.size, DTYPES[case.dtype]
    cfg = nsa.NSAConfig(
        head_dim=case.dim, value_dim=case.value_dim, num_heads=2 * group, num_kv_heads=2,
        block_length=min(32, size), block_stride=min(16, size), selection_block_size=size,
    )  # fmt: skip
    launches: list[Launch] = []
    for cu_seqlens in (None, torch.tensor([0, 100, 256], dtype=torch.int32)):
        make = lambda heads, width: torch.zeros(1, 256, heads, width, dtype=dtype, requires_grad=True)
        q, k, v = make(2 * group, case.dim), make(2, case.dim), make(2, case.value_dim)
        gates = torch.zeros(1, 256, 2 * group, 3, dtype=dtype, requires_grad=True)
        for twin in twins(name):
            with compiling(name) as found, twin:
                k_cmp = nsa.compress_blocks(k, cfg, cu_seqlens=cu_seqlens, backend="triton")
                v_cmp = nsa.compress_blocks(v, cfg, cu_seqlens=cu_seqlens, backend="triton")
                nsa.ops.blocks_op(k, cu_seqlens, cfg.block_length, cfg.block_stride, False).sum().backward()
                o = nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, cfg, cu_seqlens=cu_seqlens, backend="triton")
                o.backward(torch.zeros_like(o))
                indices = torch.zeros(1, 256, 2, 16, dtype=torch.int32)
                o = nsa.selected_attention(q, k, v, indices, cfg, cu_seqlens=cu_seqlens, backend="triton")
                o = nsa.combine(o, o, o, gates, backend="triton")
                o.backward(torch.zeros_like(o))
            launches += found
    return launches


def wrong_with(target: str, case: Case) -> bool:
    """Compile ``case`` and say on a line how it went."""
    began = time.time()
    launches = compile_all(target, case)
    over = {x.kernel: x.shared for x in launches if x.shared > SHARED[target]}
    beyond = {x.kernel: (x.shared, x.reckoned) for x in launches if x.reckoned is not None and x.shared > x.reckoned}
    most = max(launches, key=lambda x: x.shared)
    verdict = f"TOO MUCH: {over}" if over else f"most {most.shared} of {SHARED[target]} bytes ({most.kernel})"
    if beyond:
        verdict += f", MORE THAN RECKONED: {beyond}"
    print(f"{target} {case}: {len({x.kernel for x in launches})} kernels, {verdict}, {time.time() - began:.0f} s", flush=True)
    return bool(over or beyond)


def main(target: str | None = None, dtype: str = "", dims: str = "", *sizes: str) -> int:
    cases: tuple[Case, ...] = CASES
    if dims:
        dim, _, value_dim = dims.partition("/")
        cases = (Case(dtype, int(dim), int(value_dim or dim), *map(int, sizes)),)
    elif dtype:
        cases = tuple(case for case in CASES if case.dtype == dtype)
    wrong = [wrong_with(name, case) for name in ([target] if target else TARGETS) for case in cases]
    print(f"{len(wrong)} cases, {sum(wrong)} wrong")
    return min(1, sum(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
