"""The same tests on a GPU (``-m gpu``) and in Triton's interpreter (``-m interpreter`` with TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest

from tests.kernels.draws import kind_of, layout, portable, shapes

DEVICES = {"cuda": pytest.mark.gpu, "cpu": pytest.mark.interpreter}
FEWEST = {"cuda": 504, "cpu": 24}  # 24: every kind of call with every shape


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "draw" in metafunc.fixturenames:
        metafunc.parametrize(("device", "draw"), [p for device in DEVICES for p in _draws(metafunc.config, device)])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(name, marks=mark) for name, mark in DEVICES.items()])


def _draws(config: pytest.Config, device: str) -> list[object]:
    """One test a configuration. Those that share compiled kernels go to one xdist worker (``--dist loadgroup``)."""
    asked = config.getoption("configs")
    count = max(FEWEST[device], asked) if device == "cuda" else FEWEST[device]
    known = len(shapes(device))

    def group(draw: int) -> str:
        return f"{draw % known}-{layout(kind_of(draw, device))}-{portable(draw, device)}"

    return [
        pytest.param(device, draw, marks=[DEVICES[device], pytest.mark.xdist_group(group(draw))], id=f"{device}-{draw}")
        for draw in range(count)
    ]
