"""Every kernel compiles for GPUs that this machine does not have, and fits their shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NUMBER, HOPPERS = 17, 7  # portable kernels, and those that only Hopper has, two of which make lists
SCRIPT = Path(__file__).with_name("ahead_of_time.py")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_bf16_128(target: str) -> None:
    """In a process of its own, without the interpreter; ``make compile`` goes through all targets, dtypes and dims."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target, "bf16", "128"],
        env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NUMBER + HOPPERS * (target == 'sm_90')} kernels" in done.stdout
