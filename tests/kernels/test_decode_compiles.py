"""The kernels of a decode step compile for GPUs that this machine does not have, and fit their shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_bf16_128(target: str) -> None:
    """In a process of its own, without the interpreter; the script alone goes through all targets, dtypes and dims."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.decode_ahead_of_time", target, "bf16", "128"], cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 kernels" in done.stdout
