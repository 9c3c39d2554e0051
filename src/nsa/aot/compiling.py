"""One variant of a kernel as a cubin, remembered under a hash of all that it is made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from nsa import tuning
from nsa.aot.kernels import KERNELS, Variant

ALIGNMENT = 16  # of what Kernel.aligned names


@dataclass(frozen=True)
class Build:
    """A kernel of ``KERNELS`` for compute capability ``arch``."""

    role: str
    arch: int
    variant: Variant

    def describe(self) -> dict[str, Any]:
        return {"role": self.role, "arch": self.arch, **asdict(self.variant)}

    def key(self) -> str:
        """Changes with the sources of the kernel and of what it calls, with its signature, and with Triton."""
        kernel = KERNELS[self.role]
        signature, aligned = kernel.signature(self.variant.type), kernel.aligned(self.variant)
        parts = [triton.__version__, kernel.function.cache_key, signature, aligned, kernel.options, self.describe()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Targeting:
    """As much of a driver as a compilation asks for: kernels may depend on the GPU that is current."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Binary:
    """What the host needs besides the cubin: the function's name in it, and bytes of shared memory."""

    build: Build
    symbol: str
    shared: int
    cubin: bytes


def binary(build: Build, cache: Path) -> Binary:
    """From ``cache``, or compiled into it.

    Raises:
        ValueError: the kernel needs what the host does not provide, or more shared memory than its GPUs have.
    """
    stem = cache / build.key()
    facts, image = stem.with_suffix(".json"), stem.with_suffix(".cubin")
    if not facts.exists():
        made = _compile(build)
        image.write_bytes(made.cubin)
        # The facts are written last, so that an export that was interrupted leaves nothing half remembered.
        facts.write_text(json.dumps({"symbol": made.symbol, "shared": made.shared}))
    return Binary(build, cubin=image.read_bytes(), **json.loads(facts.read_text()))


def _compile(build: Build) -> Binary:
    kernel, variant = KERNELS[build.role], build.variant
    signature = kernel.signature(variant.type)
    constants = {name: variant.constants[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = {(list(signature).index(name),): [["tt.divisibility", ALIGNMENT]] for name in kernel.aligned(variant)}
    source = ASTSource(kernel.function, signature, constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **kernel.options}
    target = GPUTarget("cuda", build.arch, 32)
    driver.set_active(Targeting(target))
    compiled = triton.compile(source, target=target, options=options)
    told = compiled.metadata
    scratch = told.global_scratch_size + told.profile_scratch_size
    if scratch or told.num_ctas != 1 or told.launch_cooperative_grid:
        raise ValueError(f"{build.describe()} needs scratch memory, clusters or a cooperative launch, which the host has not")
    # What is compiled for 8.0 also runs on 8.6 and 8.9, which have the least shared memory.
    most = tuning.shared_memory(86 if build.arch < 90 else build.arch)
    if told.shared > most:
        raise ValueError(f"{build.describe()} needs {told.shared} bytes of shared memory, of {most}")
    return Binary(build, told.name, told.shared, compiled.asm["cubin"])
