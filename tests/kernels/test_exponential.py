"""Powers of two by multiply-adds: the instructions, carried out one by one in fp32."""

from __future__ import annotations

import re

import numpy as np
import pytest

from nsa.kernels.triton.exponential import OF_2, OF_4


def carry_out(text: str, arguments: list[np.ndarray]) -> list[np.ndarray]:
    """What the PTX leaves in its first registers, given its last ones."""
    count = len(arguments)
    registers = {f"${count + i}": x for i, x in enumerate(arguments)}

    def value(name: str) -> np.ndarray | int:
        if name.startswith("0f"):
            return np.array(int(name[2:], 16), np.uint32).view(np.float32)
        return int(name) if name.isdigit() else registers[name]

    floats = {
        "ex2.approx.ftz.f32": np.exp2,
        "max.f32": np.maximum,
        "add.rn.f32": np.add,
        "sub.rn.f32": np.subtract,
        # One rounding, of a product that fp64 holds.
        "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
        "mov.b32": lambda a: a,
        "shl.b32": lambda a, by: (a.view(np.uint32) << np.uint32(by)).view(np.float32),
        "add.s32": lambda a, b: (a.view(np.uint32) + b.view(np.uint32)).view(np.float32),
    }
    for operation, to, rest in re.findall(r"^\s*([a-z]\S+) (\S+), (.*);$", text, re.M):
        if operation != ".reg":
            registers[to] = floats[operation](*map(value, rest.split(", ")))
    return [registers[f"${i}"] for i in range(count)]


@pytest.mark.parametrize("text", [OF_2.value, OF_4.value], ids=["of 2", "of 4"])
def test_powers_of_two(text: str) -> None:
    count = text.count("ex2.approx") + 1
    x = np.concatenate([np.linspace(-125.9, 127.4, 200_001), -np.logspace(-9, 2, 10_001), [0.0, 0.5, -0.5, 1.5, 126.5]])
    x = x.astype(np.float32)
    for got in carry_out(text, [x] * count):
        want = np.exp2(x.astype(np.float64))
        assert (np.abs(got - want) / want).max() <= 2.5e-7


def test_next_to_nothing_is_nothing() -> None:
    x = np.array([-127, -128, -1000, -3.0e38, -np.inf], np.float32)
    assert (carry_out(OF_4.value, [x] * 4)[3] == 0).all()
    x = np.linspace(-127, -125, 1001).astype(np.float32)
    got = carry_out(OF_4.value, [x] * 4)[3]
    assert (np.diff(got) >= 0).all()
    assert (got <= 2.0**-124).all()
