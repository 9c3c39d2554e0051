"""Which kernels are exported, in which variants, and what the host must know of each: the one list of both.

A kernel's arguments come from its signature. What an argument or a constant means to the host is a *value*: an entry of the
enum in ``native/src/values.h``, called as the argument is unless ``names`` says otherwise. The host picks a variant by rules
that compare a constant with a value, so neither the order of arguments nor the number of variants is written down twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nsa import decode_tuning, tuning
from nsa.config import NSAConfig
from nsa.kernels.triton import stream_begin, stream_compress, stream_window
from nsa.kernels.triton.decode_compressed import decode_compressed_kernel
from nsa.kernels.triton.decode_merge import PARTS, decode_merge_kernel
from nsa.kernels.triton.decode_select import TILE, UNFUSED, decode_choose_again_kernel, decode_choose_kernel
from nsa.kernels.triton.decode_tokens import decode_tokens_kernel
from nsa.kernels.triton.stream_begin import stream_begin_kernel
from nsa.kernels.triton.stream_compress import stream_weighted_kernel
from nsa.kernels.triton.stream_window import stream_window_kernel
from nsa.tuning import padded_dim

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
ROWS = (16, 64)  # query heads of a tile; larger groups take several
CELLS = (4, 16, 64)  # compressed blocks of a selection block that a tile holds together
TOKEN_TILES = (1, 32)  # that one program of the selected or window branch takes, at most
SPLITS = (64, 512)  # parts of the compressed branch, at most
CHOSEN = (16, 512)  # selected blocks, at most
MERGED = (64, 256, 1024)  # parts of all branches, at most
MANY = 1 << 20
CHUNKS = (4, 16, 64, MANY)  # whose chosen blocks are chosen among again, at most


@dataclass(frozen=True)
class Case:
    """What the kernels of a library are compiled for."""

    arch: int
    dtype: str
    dim: int
    value_dim: int

    def tile(self, rows: int) -> tuning.Tile:
        cfg = NSAConfig(head_dim=self.dim, value_dim=self.value_dim, num_heads=rows, num_kv_heads=1)
        return decode_tuning.tile(cfg, rows, DTYPES[self.dtype], self.arch)


@dataclass(frozen=True)
class Variant:
    """Constants of a kernel, and how it is launched. ``type`` is the dtype of tensors, or ``any``."""

    type: str
    constants: dict[str, int]
    num_warps: int
    num_stages: int = 3  # what Triton takes where Python launches without a number


@dataclass(frozen=True)
class Rule:
    """How the host holds a constant against one of its values.

    ``is``: equal. ``at_least``: not below it; the lowest such wins. ``nearest``: likewise, or the highest there is.
    """

    kind: str
    value: str


@dataclass(frozen=True)
class Kernel:
    """A Triton function as the host launches it.

    Attributes:
        function: under ``@triton.jit``.
        pointers: of each pointer the type of elements, ``*`` for that of the variant. Others are int32, or in ``floats``.
        rules: of the constants by which a variant is picked, the first counting most.
        variants: of a case; the same variant of several cases is compiled once.
        names: the host's names of arguments that have others here.
        options: of the compiler, where Python gives some.
    """

    function: Any
    pointers: dict[str, str]
    rules: dict[str, Rule]
    variants: Callable[[Case], Iterator[Variant]]
    names: dict[str, str] = field(default_factory=dict)
    floats: tuple[str, ...] = ("scale",)
    options: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> Iterator[tuple[str, str]]:
        """Triton's type and the host's name of every argument that is none at compile time."""
        for p in self.function.params:
            if not p.is_constexpr:
                yield self.type_of(p.name), self.names.get(p.name, p.name)

    def type_of(self, argument: str) -> str:
        if argument in self.pointers:
            return "*" + self.pointers[argument].removeprefix("*")
        return "fp32" if argument in self.floats else "i32"

    def aligned(self, variant: Variant) -> list[str]:
        """Arguments that are multiples of 16: pointers, and strides where the head dims are.

        The alignment of a row's loads follows from its stride. Other integers are not specialised on.
        """
        even = all(variant.constants.get(name, 0) % 16 == 0 for name in ("D", "DV"))
        names = [p.name for p in self.function.params if not p.is_constexpr]
        return [name for name in names if name in self.pointers or (even and name.startswith("stride_"))]

    def signature(self, type: str) -> dict[str, str]:
        """Of one variant, as Triton takes it."""
        own = {p.name: "constexpr" if p.is_constexpr else self.type_of(p.name) for p in self.function.params}
        return {name: "*" + type if own[name] == "*" else own[name] for name in own}


def _dims(case: Case) -> dict[str, int]:
    return {"D": case.dim, "BD": padded_dim(case.dim), "DV": case.value_dim, "BDV": padded_dim(case.value_dim)}


def _dependent(case: Case) -> dict[str, int]:
    """Of every kernel: the host launches those early that are told to wait."""
    return {"DEPENDENT": int(decode_tuning.dependent_launch(case.arch))}


def _tiles(case: Case) -> list[tuning.Tile]:
    return list(dict.fromkeys(case.tile(rows) for rows in ROWS))


def _cells(case: Case) -> list[int]:
    return sorted({min(cell, case.tile(1).block_n) for cell in CELLS})


def _compressed(case: Case) -> Iterator[Variant]:
    for tile in _tiles(case):
        for cell in _cells(case):
            sizes = {"CELL": cell, "PER_PAGE": 0, "BM": tile.block_m, "BN": tile.block_n, **_dependent(case)}
            yield Variant(case.dtype, _dims(case) | sizes, tile.num_warps, tile.num_stages)


def _tokens(case: Case) -> Iterator[Variant]:
    for tile in _tiles(case):
        for tiles in TOKEN_TILES:
            sizes = {"TILES": tiles, "PER_PAGE": 0, "BM": tile.block_m, "BN": tile.block_n, **_dependent(case)}
            yield Variant(case.dtype, _dims(case) | sizes, tile.num_warps, tile.num_stages)


def _choose(case: Case) -> Iterator[Variant]:
    for n in CHOSEN:
        width, warps = decode_tuning.ranking(n, False, MANY)
        for cell in _cells(case):
            for splits in SPLITS:
                sizes = {"BC": case.tile(1).block_n // cell, "BG": max(1, TILE // width), "BP": splits, "BJ": width}
                yield Variant("any", sizes | {"BN": n, "GROUPS": n, "AHEAD": 1} | _dependent(case), warps)


def _choose_again(case: Case) -> Iterator[Variant]:
    for n in CHOSEN:
        for width, warps in dict.fromkeys(decode_tuning.ranking(n, True, n * chunks) for chunks in CHUNKS):
            yield Variant("any", {"BJ": width, "BN": n, "GROUPS": n, **_dependent(case)}, warps)


def _merge(case: Case) -> Iterator[Variant]:
    for parts in MERGED:
        sizes = {"DV": case.value_dim, "BDV": padded_dim(case.value_dim), "BP": min(PARTS, parts), "ALL": parts}
        yield Variant(case.dtype, sizes | _dependent(case), 8)


def _begin(case: Case) -> Iterator[Variant]:
    yield Variant(case.dtype, _dims(case) | {"BT": stream_begin.TOKENS, "BH": stream_begin.HEADS} | _dependent(case), 4)


def _weighted(case: Case) -> Iterator[Variant]:
    columns = stream_compress.hidden_columns(BITS[case.dtype])
    for dim in dict.fromkeys((case.dim, case.value_dim)):
        for mlp in (0, 1):
            sizes = {"D": dim, "BM": stream_compress.BLOCKS, "BH": columns, "BD": padded_dim(dim), "MLP": mlp}
            yield Variant(case.dtype, sizes | _dependent(case), 4, 1)


def _window(case: Case) -> Iterator[Variant]:
    yield Variant(f"i{BITS[case.dtype]}", {"BC": stream_window.COLUMNS} | _dependent(case), 4)


def _strides(*tensors: str) -> dict[str, str]:
    """The host's names of the strides of all heads' rows in one page: those of a page, of a row and of a head."""
    named = {}
    for x in tensors:
        named[f"stride_{x}p"] = "page_stride"
        named[f"stride_{x}r"], named[f"stride_{x}h"] = ("width", "head_dim") if x[0] == "k" else ("value_width", "value_dim")
    return named


def _compressed_strides(*tensors: str) -> dict[str, str]:
    """Likewise of compressed keys and values, which lie as the plan says: those of a row and of a head."""
    return {f"stride_{x}{axis[0]}": f"{x[0]}_cmp_{axis}" for x in tensors for axis in ("row", "head")}


FP32, INT32 = "fp32", "i32"
IS_DIM, IS_VALUE_DIM = Rule("is", "head_dim"), Rule("is", "value_dim")
KEPT = {"weights": FP32, "edges": FP32, "peaks": FP32}

KERNELS: dict[str, Kernel] = {
    "stream_begin": Kernel(
        stream_begin_kernel,
        {
            **dict.fromkeys(("q", "gate_weights", "k", "v", "k_cmp", "v_cmp"), "*"),
            **{"gates": FP32, "lengths": INT32},
        },
        {"D": IS_DIM, "DV": IS_VALUE_DIM},
        _begin,
        _compressed_strides("kc", "vc"),
    ),
    "stream_weighted": Kernel(
        stream_weighted_kernel,
        {"x": "*", "out": "*", "embedding": "*", "w1": "*", "w2": "*"},
        {"D": Rule("is", "compressed_dim"), "MLP": Rule("is", "mlp")},
        _weighted,
        {"stride_or": "out_row", "stride_oh": "out_head"},
    ),
    "stream_window": Kernel(
        stream_window_kernel,
        {"new_k": "*", "new_v": "*", "k_win": "*", "v_win": "*"},
        {},
        _window,
    ),
    "decode_compressed": Kernel(
        decode_compressed_kernel,
        {"q": "*", "k": "*", "v": "*", "table": INT32, "lengths": INT32, "o": FP32, "lse": FP32, **KEPT},
        {"D": IS_DIM, "DV": IS_VALUE_DIM, "BM": Rule("nearest", "group"), "CELL": Rule("nearest", "per_block")},
        _compressed,
        {
            **{"k": "k_cmp", "v": "v_cmp", "o": "part_o", "lse": "part_lse"},
            **{"stride_kp": "page_stride", "stride_vp": "page_stride", **_compressed_strides("k", "v")},
        },
    ),
    "decode_choose": Kernel(
        decode_choose_kernel,
        {**KEPT, "lse": FP32, "lengths": INT32, "importance": FP32, "out": INT32},
        {"BC": Rule("is", "per_tile"), "BN": Rule("at_least", "n"), "BP": Rule("at_least", "splits")},
        _choose,
        {"lse": "part_lse", "out": "chosen"},
        options=UNFUSED,
    ),
    "decode_choose_again": Kernel(
        decode_choose_again_kernel,
        {"importance": FP32, "chosen": INT32, "lengths": INT32, "out": INT32},
        {"BN": Rule("at_least", "n"), "BJ": Rule("nearest", "count")},
        _choose_again,
        {"chosen": "chosen_before", "out": "chosen"},
    ),
    "decode_tokens": Kernel(
        decode_tokens_kernel,
        {
            **dict.fromkeys(("q", "k_slc", "v_slc", "k_win", "v_win"), "*"),
            **dict.fromkeys(("indices", "table", "lengths"), INT32),
            **dict.fromkeys(("o", "lse"), FP32),
        },
        {"D": IS_DIM, "DV": IS_VALUE_DIM, "BM": Rule("nearest", "group"), "TILES": Rule("nearest", "token_tiles")},
        _tokens,
        {
            **{"k_slc": "k", "v_slc": "v", "o": "part_o", "lse": "part_lse"},
            **{"first_part": "splits", "tiles": "token_tiles"},
            **_strides("ks", "vs", "kw", "vw"),
        },
    ),
    "decode_merge": Kernel(
        decode_merge_kernel,
        {"part_o": FP32, "part_lse": FP32, "gates": FP32, "o": "*"},
        {"DV": IS_VALUE_DIM, "ALL": Rule("at_least", "parts")},
        _merge,
        {"o": "out", "first_slc": "splits"},
    ),
}
