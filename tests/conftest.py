"""Options and settings of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEFAULT_CONFIGS = 320
KEPT = 1 << 30  # bytes


@pytest.fixture(autouse=True)
def shared_memory() -> Iterator[None]:
    """Many workers share a GPU: what a large test leaves to its worker's allocator goes back."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()


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
