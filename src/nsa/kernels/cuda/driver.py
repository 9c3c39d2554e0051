"""The few calls of CUDA's driver that it takes to load and launch machine code, and to describe a tensor to the hardware."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nsa.kernels.cuda.nvrtc import Unavailable

T = TypeVar("T")
MAP_BYTES = 128
COLUMNS = 64  # that the widest swizzle takes
MAX_DYNAMIC_SHARED = 8  # a function's attribute
STARTS_EARLY = 6  # a launch's: programmatic stream serialization
FLOAT16, BFLOAT16 = 6, 9  # element types of a map
NO_INTERLEAVE, SWIZZLE_128, PROMOTE_256, FILL_ZEROS = 0, 3, 3, 0


class Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: a union of 64 bytes, of which what is used here is a number."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("_rest", ctypes.c_int * 15))


class Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The driver's, with the types of what is called often.

    Raises:
        Unavailable: it isn't there, or too old for the hardware's descriptors.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        encode, _ = cuda.cuTensorMapEncodeTiled, cuda.cuLaunchKernelEx
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the driver can't be used: {error}") from error
    number, address = ctypes.c_uint, ctypes.c_void_p
    cuda.cuLaunchKernelEx.argtypes = [address] * 4
    encode.argtypes = [address, ctypes.c_int, number, *[address] * 5, *[ctypes.c_int] * 4]
    return cuda


def check(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        library().cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"{what}: {(name.value or b'error').decode()} ({code})")


def enter(device: int) -> None:
    """Give this thread the context that PyTorch works in, if nothing that ran in it did so yet."""
    cuda, context = library(), ctypes.c_void_p()
    check(cuda.cuCtxGetCurrent(ctypes.byref(context)), "the current context")
    if not context.value:
        check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "the primary context")
        check(cuda.cuCtxSetCurrent(context), "the primary context")


class Kernel:
    """A function of a loaded module, and how it is launched.

    Attributes:
        threads: of a block.

    ``shared`` bytes, at most, are given to a block at a launch, besides what it has of its own.
    """

    def __init__(self, module: ctypes.c_void_p, name: str, threads: int, shared: int) -> None:
        self.name, self.threads, self.function = name, threads, ctypes.c_void_p()
        check(library().cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), name)
        if shared:
            check(library().cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED, shared), name)

    def launch(self, grid: tuple[int, int], shared: int, arguments: Sequence[int], early: bool = False) -> None:
        """On PyTorch's current stream; ``arguments`` are the addresses of the parameters, which are copied here and now.

        ``early``: it may start before the launch ahead of it has ended, and waits for that itself.
        """
        stream = torch.cuda.current_stream().cuda_stream
        parameters = (ctypes.c_void_p * len(arguments))(*arguments)
        allowed = Attribute(id=STARTS_EARLY, value=1)
        config = Config(*grid, 1, self.threads, 1, 1, shared, stream, ctypes.addressof(allowed) if early else None, int(early))
        check(library().cuLaunchKernelEx(ctypes.byref(config), self.function, parameters, None), f"launching {self.name}")


def load(code: bytes, device: int) -> ctypes.c_void_p:
    """A module of machine code, in the context of ``device``, the current one."""
    enter(device)
    module = ctypes.c_void_p()
    check(library().cuModuleLoadData(ctypes.byref(module), code), "loading a module")
    return module


def attempt(name: str, load: Callable[[], T], stacklevel: int = 3) -> T | None:
    """What ``load`` gives; None, after a warning to the caller's caller, where ``name`` can't be compiled or loaded."""
    try:
        return load()
    except (Unavailable, RuntimeError) as reason:
        warnings.warn(f"{name} takes its slower kernel: {reason}", RuntimeWarning, stacklevel=stacklevel)
        return None


def described(boxes: Sequence[tuple[Tensor, int, int]]) -> tuple[ctypes.Array[ctypes.c_char], list[int]]:
    """A map of each tensor in boxes of so many rows and heads: the memory that holds them all, and where in it each lies."""
    # Nobody reads an empty tensor, but none can be described.
    boxes = [(x if x.numel() else x.new_zeros(1, 1, *x.shape[2:]), rows, heads) for x, rows, heads in boxes]
    room = ctypes.create_string_buffer(len(boxes) * MAP_BYTES + 63)
    maps = [(ctypes.addressof(room) + 63 & ~63) + i * MAP_BYTES for i in range(len(boxes))]
    for at, box in zip(maps, boxes):
        describe(at, *box)
    return room, maps


def describe(to: int, x: Tensor, rows: int, heads: int) -> None:
    """At ``to``, aligned to 64 bytes, a map of 16-bit ``x [B, T, H, D]`` in boxes of ``rows`` rows of ``heads`` heads by
    ``COLUMNS``, swizzled.

    What a box has outside of ``x`` is 0.
    """
    batch, tokens, every_head, dim = x.shape
    # The stride of an axis of length 1 is never used, and may be anything but what the hardware takes.
    strides = [s if size > 1 else dim for size, s in zip((every_head, tokens, batch), (x.stride(2), x.stride(1), x.stride(0)))]
    four, bytes_apart = ctypes.c_uint32 * 4, (ctypes.c_uint64 * 3)(*(s * x.element_size() for s in strides))
    code = library().cuTensorMapEncodeTiled(
        to, FLOAT16 if x.dtype == torch.float16 else BFLOAT16, 4, x.data_ptr(),
        (ctypes.c_uint64 * 4)(dim, every_head, tokens, batch), bytes_apart, four(COLUMNS, heads, rows, 1), four(1, 1, 1, 1),
        NO_INTERLEAVE, SWIZZLE_128, PROMOTE_256, FILL_ZEROS,
    )  # fmt: skip
    check(code, f"describing a tensor of shape {[*x.shape]} and strides {[*x.stride()]}")
