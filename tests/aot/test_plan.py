"""How the C library splits a step is how Python does: ``plan.c`` beside ``decode_tuning.py``, and what it may do otherwise."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import nsa
from nsa import decode_tuning
from nsa.tuning import Tile
from tests.aot import binding, build
from tests.aot.interpreted import Launch, Recorder

# Heads, KV heads, stride, selection block, blocks, window, max_seq_len. The head dims are 64, the stride divides all.
CASES = [
    (8, 1, 16, 64, 16, 512, 131072),
    (64, 4, 16, 64, 16, 512, 65536),
    (64, 64, 16, 64, 16, 512, 4096),
    (128, 1, 16, 64, 16, 512, 1 << 20),
    (16, 1, 4, 64, 4, 40, 5000),
    (32, 2, 2, 64, 5, 64, 5000),
    (4, 2, 1, 64, 500, 33, 60000),
    (8, 8, 6, 12, 7, 5, 100),
    (2, 1, 16, 256, 16, 4096, 32768),
]
Recorded = dict[str, list[Launch]]


@pytest.fixture(scope="module")
def loaded() -> Any:
    exported, path = build.arrange("cpu")
    os.environ["NSA_CUDA_DRIVER"] = str(build.FOLDER / "libfake_cuda.so")
    return binding.load(path), Recorder(build.FOLDER / "libfake_cuda.so", exported)


def step(loaded: Any, cfg: nsa.NSAConfig, dtype: torch.dtype, max_seq_len: int) -> Recorded:
    """What a step launches, by kernel; nothing is computed."""
    library, recorder = loaded
    recorder.launches.clear()
    where = binding.pointer(torch.zeros(64, dtype=dtype))
    with binding.context(library, cfg, dtype, max_seq_len, recorder.check) as ctx:
        ctx.call("nsa_compute_attention", where, where, where, max_seq_len, where, None)
    found: Recorded = {}
    for launch in recorder.launches:
        found.setdefault(launch.role, []).append(launch)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_and_splits(loaded: Any, case: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, kv_heads, stride, size, n, window, longest = case
    cfg = nsa.NSAConfig(
        head_dim=64, num_heads=heads, num_kv_heads=kv_heads, block_length=stride, block_stride=stride,
        selection_block_size=size, num_selected_blocks=n, window_size=window,
    )  # fmt: skip
    found = step(loaded, cfg, dtype, longest)
    tile = decode_tuning.tile(cfg, 64 if cfg.group_size > 16 else 16, dtype, 90)  # two paddings of a group are exported
    _compressed(found["decode_compressed"][0], cfg, tile, longest)
    _layout(found["stream_begin"][0], found["decode_compressed"][0], cfg, longest)
    _tokens(found["decode_tokens"][0], cfg, tile, longest)
    (choose,) = found["decode_choose"]
    width = choose.constants["BJ"]
    assert width >= 4 * n  # or a program would choose all that it ranks
    assert choose.grid == (-(-choose.arguments["selection"] // width), kv_heads, 1)
    chunks = choose.grid[0]
    for again in found.get("decode_choose_again", []):
        assert again.arguments["count"] == chunks * n
        # Every other width of Python's is exported, for 16 blocks and for 512.
        width, _ = decode_tuning.ranking(16 if n <= 16 else 512, True, chunks * n, 64)
        assert width <= again.constants["BJ"] < 4 * width
        chunks = again.grid[0]
    assert chunks == 1
    (merge,) = found["decode_merge"]
    assert merge.grid == (heads, 1, 1)
    assert merge.arguments["parts"] <= merge.constants["ALL"] <= max(64, 4 * merge.arguments["parts"])


def _compressed(launch: Launch, cfg: nsa.NSAConfig, tile: Tile, longest: int) -> None:
    cells = decode_tuning.cells(cfg, longest, tile.block_n)
    told, head_tiles = launch.arguments, -(-cfg.group_size // tile.block_m)
    assert (launch.constants["BM"], launch.constants["BN"]) == (tile.block_m, tile.block_n)
    assert launch.constants["CELL"] >= min(cells.width, tile.block_n)
    assert told["cells"] == cells.per_block
    # The exported cells are 4, 16 and 64: where Python's is smaller, a tile holds fewer selection blocks.
    assert told["tiles"] == _tiles(cfg, longest, tile.block_n // launch.constants["CELL"], cells.per_block)
    splits = decode_tuning.compressed_splits(cfg.num_kv_heads * head_tiles, told["tiles"])
    assert launch.grid == (splits, head_tiles, cfg.num_kv_heads)


def _layout(begin: Launch, compressed: Launch, cfg: nsa.NSAConfig, longest: int) -> None:
    """Compressed rows of a head lie side by side, as in Python's cache, for who writes them and who reads them."""
    rows = longest // cfg.block_stride + 1
    for x, dim in (("k", cfg.head_dim), ("v", cfg.value_dim)):
        written = [begin.arguments[name] for name in (f"{x}_cmp", f"stride_{x}cr", f"stride_{x}ch")]
        assert written == [compressed.arguments[name] for name in (x, f"stride_{x}r", f"stride_{x}h")]
        assert written[1:] == [dim, rows * dim]
    bytes_of_keys = cfg.num_kv_heads * rows * cfg.head_dim * begin.elements["k"].itemsize
    assert begin.arguments["v_cmp"] >= begin.arguments["k_cmp"] + bytes_of_keys


def _tiles(cfg: nsa.NSAConfig, longest: int, per_tile: int, per_block: int) -> int:
    return max(1, -(-cfg.num_selection_blocks(longest) * per_block // per_tile))


def _tokens(launch: Launch, cfg: nsa.NSAConfig, tile: Tile, longest: int) -> None:
    assert cfg.window_size <= longest  # else the library's window is shorter
    head_tiles = -(-cfg.group_size // tile.block_m)
    splits = decode_tuning.token_splits(cfg, cfg.num_kv_heads * head_tiles, tile.block_n)
    told = launch.arguments
    tiles = min(splits.tiles, 32)
    assert told["tiles"] == tiles <= launch.constants["TILES"]
    if tiles == splits.tiles:
        assert told["selected_parts"] == splits.selected
        assert launch.grid == (cfg.num_kv_heads, head_tiles, splits.selected + splits.window)
