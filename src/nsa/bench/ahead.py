"""Compile what will be measured before it is: a process for each shape, all at once, into the kernels' caches on disk.

One after another the shapes compile for minutes; none is timed here, so they may share the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace

import torch

from nsa.bench.cases import Case, make_work
from nsa.bench.run import current
from nsa.bench.training import make_training_work
from nsa.models import LMConfig


def compile_ahead(jobs: Sequence[Callable[[], object]]) -> None:
    """Run each of ``jobs``, which must pickle, in a process of its own.

    A job that fails is forgotten: its work fails again where it is measured, and is told of there.
    """
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(job) for job in jobs])


def touch_case(case: Case, single_steps: bool) -> None:
    """Forward and backward of everything that is measured of ``case``, once."""
    with current(case.device):
        work = make_work(case, single_steps)
        for step in work.steps.values():
            outputs = step.forward()
            if step.inputs:
                step.gradients(outputs, step.grad_outputs)


def touch_model(cfg: LMConfig, length: int, device: torch.device) -> None:
    """A training step of one layer of the model."""
    with current(device):
        make_training_work(replace(cfg, num_layers=1), length, device).step()
