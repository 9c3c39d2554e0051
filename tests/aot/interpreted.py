"""The fake driver with Triton's interpreter behind it: what the library launches runs, on host memory.

A launch arrives as a cubin, a grid and the addresses of arguments, as the driver gets it. The export's record of that cubin
says which Triton function it was, and with which constants; so a wrong argument, grid or variant computes something wrong here
too.
"""

from __future__ import annotations

import ctypes
import json
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_float, c_int32, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ELEMENTS = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "i16": torch.int16,
}  # fmt: skip


class FakeLaunch(Structure):
    _fields_ = (
        ("symbol", c_char_p),
        ("image", c_void_p),
        ("grid", c_uint * 3),
        ("threads", c_uint),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("context", c_void_p),
        ("dependent", c_int32),
    )


ON_LAUNCH = CFUNCTYPE(None, POINTER(FakeLaunch), POINTER(c_void_p))


@dataclass
class Launch:
    """A launch as the kernel sees it: arguments and constants by the names that the Triton function gives them.

    Pointers are addresses, and ``elements`` says of what.
    """

    role: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    elements: dict[str, torch.dtype]
    constants: dict[str, int]
    num_warps: int


class Recorder:
    """Understands launches while it is installed in the driver; ``check`` raises what went wrong with one."""

    def __init__(self, driver: Path, exported: Path) -> None:
        self.launches: list[Launch] = []
        self.blob = (exported / "kernels.bin").read_bytes()
        self.known = json.loads((exported / "kernels.json").read_text())
        self.error: BaseException | None = None
        self.callback = ON_LAUNCH(self._on_launch)  # lives as long as the driver may call it
        install = ctypes.CDLL(str(driver)).fake_on_launch
        install.argtypes = [ON_LAUNCH]
        install(self.callback)

    def check(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _on_launch(self, launch: Any, parameters: Any) -> None:
        try:
            if self.error is None:
                self._run(launch.contents, parameters)
        except BaseException as error:  # an exception would end here, in C
            self.error = error

    def _run(self, launch: FakeLaunch, parameters: Any) -> None:
        from nsa.aot.kernels import KERNELS

        facts = self._find(launch)
        assert launch.threads == 32 * facts["num_warps"]
        assert launch.shared == facts["shared"]
        assert launch.dependent == facts["constants"]["DEPENDENT"]
        names = [name for name in KERNELS[facts["role"]].function.arg_names if name not in facts["constants"]]
        kinds = {name: "*" + facts["type"] if kind == "*" else kind for name, (kind, _) in zip(names, facts["parameters"])}
        arguments = {name: _argument(kinds[name], parameters[i]) for i, name in enumerate(names)}
        elements = {name: ELEMENTS[kind.removeprefix("*")] for name, kind in kinds.items() if kind[0] == "*"}
        self.take(Launch(facts["role"], tuple(launch.grid), arguments, elements, facts["constants"], facts["num_warps"]))

    def take(self, launch: Launch) -> None:
        self.launches.append(launch)

    def _find(self, launch: FakeLaunch) -> dict[str, Any]:
        for facts in self.known:
            offset, size = facts["offset"], facts["size"]
            if (
                facts["symbol"].encode() == launch.symbol
                and ctypes.string_at(launch.image, size) == self.blob[offset : offset + size]
            ):
                return facts
        raise AssertionError(f"{launch.symbol!r} is none of the exported kernels")


class Interpreter(Recorder):
    """Runs them."""

    def take(self, launch: Launch) -> None:
        from nsa.aot.kernels import KERNELS

        arguments = {name: _at(x, launch.elements.get(name)) for name, x in launch.arguments.items()}
        constants = launch.constants | {"DEPENDENT": 0}  # here each ends before the next starts, and none can wait
        KERNELS[launch.role].function[launch.grid](**arguments, **constants, num_warps=launch.num_warps)


def _argument(kind: str, place: int) -> Any:
    """The value at ``place``."""
    if kind == "i32":
        return c_int32.from_address(place).value
    if kind == "fp32":
        return c_float.from_address(place).value
    address = c_uint64.from_address(place).value
    assert address, "a null pointer"
    assert address % 16 == 0, "a pointer that is not aligned as the export promised"
    return address


def _at(x: Any, element: torch.dtype | None) -> Any:
    """An address as a tensor of one element there, of which a kernel uses the address alone."""
    if element is None:
        return x
    return torch.frombuffer((ctypes.c_char * element.itemsize).from_address(x), dtype=element)
