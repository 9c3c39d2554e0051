"""Compile every kernel for a GPU that this machine does not have: run the launchers with a driver that only compiles.

    python tests/kernels/ahead_of_time.py                  # the whole matrix
    python tests/kernels/ahead_of_time.py sm_90 bf16 128   # one case

Must not run where TRITON_INTERPRET is set.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (16, 40, 64, 80, 128, (192, 128), 256)


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


@contextmanager
def compiling(name: str) -> Iterator[dict[str, int]]:
    """Inside, launches compile for target ``name`` and run nothing; yields shared memory by kernel name, as it fills."""
    target, used, run = TARGETS[name], {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.module.removeprefix('nsa.kernels.')}.{self.__name__}"
        used[name] = max(used.get(name, 0), kernel.metadata.shared)
        return kernel

    arch = target.arch if target.backend == "cuda" else 0
    with (
        mock.patch.object(triton.runtime.driver, "_active", CompilingDriver(name)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tuning, "arch", return_value=arch),
        mock.patch.object(_dispatch, "_triton", return_value=None),
    ):
        yield used


def twins(name: str) -> Iterator[object]:
    """Where Hopper's kernels would run, their portable twins must compile too."""
    yield contextlib.nullcontext()
    if name == "sm_90":
        yield mock.patch.object(hopper, "supports", return_value="switched off")


def compile_all(name: str, dtype: torch.dtype, dim: int, value_dim: int, group: int = 16) -> dict[str, int]:
    """Shared memory in bytes of every kernel that a training step and the steps alone launch, batched and packed."""
    cfg = nsa.NSAConfig(head_dim=dim, value_dim=value_dim, num_heads=2 * group, num_kv_heads=2)
    used: dict[str, int] = {}
    for cu_seqlens in (None, torch.tensor([0, 100, 256], dtype=torch.int32)):
        make = lambda heads, width: torch.zeros(1, 256, heads, width, dtype=dtype, requires_grad=True)
        q, k, v = make(2 * group, dim), make(2, dim), make(2, value_dim)
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
            used = {kernel: max(found.get(kernel, 0), used.get(kernel, 0)) for kernel in {*found, *used}}
    return used


def main(targets: list[str], dtypes: list[str], dims: list[int | tuple[int, int]]) -> int:
    wrong = 0
    for target, dtype, dim in itertools.product(targets, dtypes, dims):
        d, dv = dim if isinstance(dim, tuple) else (dim, dim)
        began = time.time()
        used = compile_all(target, DTYPES[dtype], d, dv)
        over = {kernel: size for kernel, size in used.items() if size > SHARED[target]}
        wrong += bool(over)
        most = max(used, key=used.__getitem__)
        verdict = f"TOO MUCH: {over}" if over else f"most {used[most]} of {SHARED[target]} bytes ({most})"
        print(f"{target} {dtype} {d}/{dv}: {len(used)} kernels, {verdict}, {time.time() - began:.0f} s", flush=True)
    return wrong


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(
        main(
            arguments[0:1] or list(TARGETS),
            arguments[1:2] or list(DTYPES),
            [int(x) for x in arguments[2:3]] or list(DIMS),
        )
    )
