"""The C library and the fake driver as the tests need them: exported and compiled once, in ``build/tests``."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"
FOLDER = ROOT / "build" / "tests"
# Head dims of keys and values, and dtypes: all that a release has, and little for the interpreter, which has no bf16.
DIMS = {"cuda": ((64, 64), (128, 128), (256, 256), (192, 128)), "cpu": ((64, 64), (48, 32))}
DTYPES = {"cuda": (torch.float32, torch.float16, torch.bfloat16), "cpu": (torch.float32, torch.float16)}
VARIANTS = {device: tuple(itertools.product(DIMS[device], DTYPES[device])) for device in DIMS}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def run(*command: object, **environment: str) -> None:
    """Fail with what the command printed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of several workers, one compiles."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def export(arch: str, device: str) -> Path:
    """The folder of an export for a device's variants. It costs little if nothing changed since the last one."""
    folder = FOLDER / f"{device}-{arch}"
    dims = " ".join(f"{dim}/{value_dim}" for dim, value_dim in DIMS[device])
    dtypes = " ".join(NAMES[dtype] for dtype in DTYPES[device])
    asked = ("--archs", arch, "--dims", dims, "--dtypes", dtypes)
    run(sys.executable, "-m", "nsa.aot", "--output", folder, *asked, PYTHONPATH=str(ROOT / "src"))
    return folder


def compiler() -> str:
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not found:
        pytest.skip("there is no C compiler")
    return found


def library(exported: Path) -> Path:
    """``libnsa.so`` of an export, without CMake: any machine with a C compiler can test it."""
    out, flags = exported / "libnsa.so", ("-std=c11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Werror", "-Wall")
    sources = [*sorted((NATIVE / "src").glob("*.c")), exported / "kernels.c", NATIVE / "src" / "embed.S"]
    include = (f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'src'}", f'-DNSA_CUBINS="{exported / "kernels.bin"}"')
    _compile(out, *flags, *include, *sources, "-ldl", "-lm")
    return out


def fake_driver() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    out = FOLDER / "libfake_cuda.so"
    _compile(out, "-std=gnu11", "-O1", "-fPIC", "-shared", NATIVE / "tests" / "fake_cuda.c", "-lpthread")
    return out


def _compile(out: Path, *arguments: object) -> None:
    """Put in place when it is whole: another worker may have loaded the one before."""
    fresh = out.with_suffix(f".{os.getpid()}")
    run(compiler(), *arguments, "-o", fresh)
    fresh.replace(out)


def arrange(device: str) -> tuple[Path, Path]:
    """The export for a device, and its library; on the CPU the fake driver too."""
    arch = "90"
    if device == "cuda":
        arch = "".join(map(str, torch.cuda.get_device_capability()))
    with locked(FOLDER):
        exported = export(arch, device)
        if device == "cpu":
            fake_driver()
        return exported, library(exported)
