"""The C library on a GPU (``-m gpu``), and its kernels in Triton's interpreter (``-m interpreter`` with TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest

from tests.aot.build import VARIANTS

DEVICES = {"cuda": pytest.mark.gpu, "cpu": pytest.mark.interpreter}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``device``, or ``device`` and the ``variant`` of the library that it has there; a test marked gpu has one device."""
    alone = metafunc.definition.get_closest_marker("gpu")
    devices = ["cuda"] if alone else list(DEVICES)
    if "variant" in metafunc.fixturenames:
        found = [(device, variant) for device in devices for variant in VARIANTS[device]]
        names = [f"{device}-{dims[0]}/{dims[1]}-{str(dtype).removeprefix('torch.')}" for device, (dims, dtype) in found]
        params = [pytest.param(*x, marks=DEVICES[x[0]], id=name) for x, name in zip(found, names)]
        metafunc.parametrize(("device", "variant"), params)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(name, marks=DEVICES[name]) for name in devices])
