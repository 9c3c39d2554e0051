"""Options and settings of the whole suite."""

from __future__ import annotations

import os

import pytest
import torch

DEFAULT_CONFIGS = 320


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--configs", type=int, default=DEFAULT_CONFIGS, help=f"random configurations a test draws (default {DEFAULT_CONFIGS})"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than ten seconds; runs with the rest, and starts first")
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, so each of them takes one
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``seed`` runs once per random configuration; its id reruns it alone."""
    if "seed" in metafunc.fixturenames:
        seeds = range(metafunc.config.getoption("configs"))
        metafunc.parametrize("seed", seeds, ids=[f"seed{s}" for s in seeds])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that no worker begins it last: slow tests, then those that one worker takes together."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.get_closest_marker("xdist_group") is None))
