"""``nsa/nsa.h`` through ctypes, as far as the tests use it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char, c_double, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsa

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SIZES = (
    "head_dim", "num_heads", "num_kv_heads", "value_dim", "block_length", "block_stride", "selection_block_size",
    "num_selected_blocks", "num_initial_blocks", "num_local_blocks", "window_size",
)  # fmt: skip


class Config(Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        *((name, c_int) for name in (*SIZES, "dtype", "max_seq_len", "incremental", "device")),
        ("softmax_scale", c_double),
    )


class CContext(Structure):
    _fields_ = (("state", c_void_p), ("check", c_uint64), ("error", c_char * 512))


class CompressionWeights(Structure):
    _fields_ = (("embedding", c_void_p), ("w1", c_void_p), ("w2", c_void_p), ("hidden", c_int))


class Context:
    """One ``NSAContext``. ``after`` is called after each call, to raise what a launch raised."""

    def __init__(self, library: ctypes.CDLL, after: Callable[[], None], stream: int = 0) -> None:
        self.library, self.after, self.stream, self.c = library, after, stream, CContext()
        self.kept: list[Tensor] = []  # weights, which stay the caller's

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(byref(self.c), *arguments)
        self.after()
        if code:
            raise RuntimeError(f"{name}: {code}: {self.library.nsa_last_error(byref(self.c)).decode()}")

    def update_window(self, k: Tensor, v: Tensor) -> None:
        self.call("nsa_update_window", pointer(k), pointer(v), len(k), c_void_p(self.stream))

    def compute_attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        self.call("nsa_compute_attention", pointer(q), pointer(k), pointer(v), len(k), pointer(out), c_void_p(self.stream))
        return out

    def set_gate_weights(self, weights: Tensor | None) -> None:
        self.kept += [weights] if weights is not None else []
        self.call("nsa_set_gate_weights", None if weights is None else pointer(weights))

    def set_compression_weights(self, *pairs: tuple[Tensor, tuple[Tensor, ...]] | None) -> None:
        """Embedding and weights of keys and of values; None for the mean."""
        told = []
        for pair in pairs:
            if pair is None:
                told.append(None)
                continue
            embedding, weights = pair
            self.kept += [embedding, *weights]
            mlp = len(weights) == 2
            where = (pointer(embedding), pointer(weights[0]), pointer(weights[1]) if mlp else None)
            told.append(byref(CompressionWeights(*where, len(weights[0]) if mlp else 0)))
        self.call("nsa_set_compression_weights", *told)

    def reset(self) -> None:
        self.call("nsa_reset")


def pointer(x: Tensor) -> c_void_p:
    assert x.is_contiguous()
    return c_void_p(x.data_ptr())


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.nsa_create_default_config.restype = Config
    library.nsa_last_error.restype = library.nsa_version.restype = ctypes.c_char_p
    library.nsa_workspace_size.argtypes = [c_void_p, POINTER(Config), POINTER(c_size_t)]
    return library


@contextmanager
def context(
    library: ctypes.CDLL, cfg: nsa.NSAConfig, dtype: torch.dtype, max_seq_len: int, after: Callable[[], None],
    *, incremental: bool = False, stream: int = 0,
) -> Iterator[Context]:  # fmt: skip
    config = library.nsa_create_default_config(cfg.head_dim, cfg.num_heads)
    for name in (*SIZES, "softmax_scale"):
        setattr(config, name, getattr(cfg, name))
    config.dtype, config.max_seq_len, config.incremental = DTYPES[dtype], max_seq_len, int(incremental)
    ctx = Context(library, after, stream)
    ctx.call("nsa_init", byref(config))
    try:
        yield ctx
    finally:
        ctx.call("nsa_free")
