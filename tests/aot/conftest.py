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
        params = [pytest.param(*x, marks=_marks(*x), id=name) for x, name in zip(found, names)]
        metafunc.parametrize(("device", "variant"), params)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(name, marks=_marks(name)) for name in devices])


def _marks(device: str, variant: object = None) -> list[pytest.MarkDecorator]:
    """Few workers (``--dist loadgroup``) wait for the library, which takes one a minute to build; on the CPU one does."""
    part = variant[0] if isinstance(variant, tuple) and device == "cuda" else None
    return [DEVICES[device], pytest.mark.xdist_group(f"libnsa {part}")]
