"""Tile sizes are legal and fit, whatever the kernels say they take, on every architecture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

import nsa
from nsa import _dispatch, tuning

# What CUDA's programming guide gives a block by compute capability, and 64 KiB of local data share for AMD, which is 0 here.
KIBIBYTES = {0: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = range(16, 257, 8)
GROUPS = range(1, 129)
SIZES = range(8, 129)


@pytest.mark.parametrize("arch", KIBIBYTES)
def test_shared_memory(arch: int) -> None:
    assert tuning.shared_memory(arch) == KIBIBYTES[arch] << 10


def test_these_are_the_limits_of_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were they wider, the tests here would have to be."""
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)

    def reason(**changes: int) -> str | None:
        fields = {"head_dim": DIMS[-1], "num_heads": GROUPS[-1], "num_kv_heads": 1, "selection_block_size": SIZES[-1]} | changes
        return _dispatch.supports("triton", torch.device("cuda"), DTYPES[0], nsa.NSAConfig(**fields))

    assert reason() is None
    assert reason(head_dim=DIMS[-1] + 8) is not None
    assert reason(num_heads=GROUPS[-1] + 1) is not None
    assert reason(selection_block_size=SIZES[-1] + 16) is not None


def _tiles(dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> Iterator[tuple[str, tuple[int, int], tuning.Tile]]:
    """Every tile of these dims, with its kernel, and the group and selection block that it is for."""
    for windowed in (False, True):
        yield "forward", (1, 1), tuning.interval_forward(dim, value_dim, dtype, windowed, arch)
        yield "dq", (1, 1), tuning.interval_dq(dim, value_dim, dtype, windowed, arch)
        yield "dkv", (1, 1), tuning.interval_dkv(dim, value_dim, dtype, windowed, arch)
    yield "importance", (1, 1), tuning.importance(dim, dtype, arch)
    for group in GROUPS:
        for size in (8, 20, 64, 128):
            yield "forward", (group, size), tuning.selected_forward(dim, value_dim, dtype, group, size, arch)
            yield "dq", (group, size), tuning.selected_dq(dim, value_dim, dtype, group, size, arch)
            yield "dkv", (group, size), tuning.selected_dkv(dim, value_dim, dtype, group, size, arch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", KIBIBYTES)
def test_every_tile_is_legal_and_fits(arch: int, dtype: torch.dtype) -> None:
    # Dims count by what they are padded to.
    for dim, value_dim in [(16, 16), (64, 64), (64, 128), (128, 64), (128, 128), (192, 128), (128, 256), (256, 64), (256, 256)]:
        for kernel, case, tile in _tiles(dim, value_dim, dtype, arch):
            told = (kernel, dim, value_dim, case, tile)
            for rows in (tile.block_m, tile.block_n):
                assert rows >= 16, told  # the least that a matrix product takes
                assert rows & (rows - 1) == 0, told
            assert tile.num_warps in (4, 8), told
            assert tile.num_stages >= 1, told
            width = dim if kernel == "importance" else value_dim
            used = tuning.shared_bytes(kernel, tile.block_m, tile.block_n, dim, width, dtype, tile.num_stages, arch)
            assert used <= tuning.shared_memory(arch), told


def test_the_queries_of_a_tile_fit_its_rows() -> None:
    for group, rows, width in itertools.product(GROUPS, (16, 32, 64, 128), (1, 16, 33, 4096)):
        queries = tuning.union_queries(group, width, rows)
        assert queries & (queries - 1) == 0, "masks have a bit for each, and lists are of a power of two"
        assert queries == 1 or queries * group <= rows
        assert queries == 1 or queries * tuning.padded(width) <= 4096


def test_wide_lists_are_sorted_by_few_queries() -> None:
    assert [tuning.grouped_queries(width) for width in (1, 33, 512, 513, 5000, 100_000)] == [16, 16, 16, 8, 1, 1]


def test_padding_covers_every_dim() -> None:
    assert {tuning.padded_dim(dim) for dim in DIMS} == {64, 128, 256}
    assert all(tuning.padded(size) >= size for size in SIZES)
    assert max(map(tuning.padded, SIZES)) == 128


def test_a_tile_that_no_smaller_one_replaces_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "shared_memory", lambda arch: 1000)
    with pytest.raises(AssertionError, match="no tile of forward fits architecture 90"):
        tuning.selected_forward(64, 64, torch.float16, 4, 64, 90)


def test_registers_are_capped_only_where_nothing_spills() -> None:
    capped = lambda dim=128, dtype=torch.bfloat16, starting=4, arch=90: tuning.importance_registers(dim, dtype, starting, arch)
    assert capped() == capped(dim=64) == capped(dtype=torch.float16) == capped(starting=3) == capped(starting=64) == 160
    assert capped(dim=256) is capped(dtype=torch.float32) is None
    assert [capped(starting=starting) for starting in (1, 2, 65, 128)] == [None] * 4
    assert [capped(arch=arch) for arch in (0, 80, 89, 100, 120)] == [None] * 5


def test_what_was_measured_is_left_alone() -> None:
    """The tiles of an H100 for 16 bit, dims to 128 and blocks of 64 are those that measurements chose."""
    shape = (128, 128, torch.bfloat16)
    assert tuning.interval_forward(*shape, False, 90) == tuning.Tile(128, 64, 4, 2)
    assert tuning.interval_forward(*shape, True, 90) == tuning.Tile(64, 64, 4, 2)
    assert tuning.interval_dq(*shape, False, 90) == tuning.Tile(64, 64, 4, 2)
    assert tuning.interval_dq(*shape, True, 90) == tuning.Tile(64, 64, 4, 3)
    assert tuning.interval_dkv(*shape, False, 90) == tuning.Tile(32, 128, 8, 3)
    assert tuning.interval_dkv(*shape, True, 90) == tuning.Tile(32, 64, 4, 3)
    assert tuning.importance(128, torch.bfloat16, 90) == tuning.Tile(64, 128, 4, 2)
    for group, rows, key_rows, stages in ((1, 16, 32, 5), (16, 64, 32, 5), (48, 64, 64, 3), (128, 128, 128, 2)):
        assert tuning.selected_forward(*shape, group, 64, 90) == tuning.Tile(rows, 64, 4, 2)
        assert tuning.selected_dq(*shape, group, 64, 90) == tuning.Tile(rows, 64, 4, 2)
        assert tuning.selected_dkv(*shape, group, 64, 90) == tuning.Tile(key_rows, 64, 4, stages)
