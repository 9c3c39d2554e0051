"""Kernels that start while the one before them still runs, and wait for what it writes only where they read it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa import decode_tuning, tuning


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Until every launch before this one has ended and what it wrote can be read."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def dependents_may_start(DEPENDENT: tl.constexpr):
    """Once all programs have come here: the next launch may fill what is free of the GPU."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(device: torch.device) -> tuple[bool, dict[str, Any]]:
    """``DEPENDENT``, and what a launch that starts early needs to be told."""
    dependent = decode_tuning.dependent_launch(tuning.arch(device))
    return dependent, {"launch_pdl": True} if dependent else {}
