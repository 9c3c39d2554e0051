"""NSAConfig: defaults, arithmetic on blocks, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

import nsa
from tests import oracle

VALID = {"head_dim": 64, "num_heads": 32}


def test_the_papers_defaults() -> None:
    cfg = nsa.NSAConfig(**VALID)
    assert dataclasses.asdict(cfg) == {
        "head_dim": 64, "num_heads": 32, "num_kv_heads": 2, "value_dim": 64, "block_length": 32, "block_stride": 16,
        "selection_block_size": 64, "num_selected_blocks": 16, "num_initial_blocks": 1, "num_local_blocks": 2,
        "window_size": 512, "softmax_scale": 0.125,
    }  # fmt: skip
    assert nsa.create_default_config(head_dim=64, num_heads=32) == cfg


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (8, 1), (15, 1), (16, 1), (32, 2), (48, 3), (64, 4), (40, 2), (37, 1), (96, 6)]
)
def test_default_kv_heads(heads: int, kv_heads: int) -> None:
    assert nsa.NSAConfig(head_dim=8, num_heads=heads).num_kv_heads == kv_heads


def test_a_config_is_frozen_and_hashable() -> None:
    cfg = nsa.NSAConfig(**VALID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.window_size = 3  # type: ignore[misc]
    assert hash(cfg) == hash(nsa.NSAConfig(**VALID))
    assert dataclasses.replace(cfg, window_size=7).window_size == 7


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 2), (32, 16), (8, 8), (12, 3)])
def test_blocks_of_a_sequence(length: int, stride: int) -> None:
    cfg = nsa.NSAConfig(**VALID, block_length=length, block_stride=stride, selection_block_size=4 * length)
    for tokens in range(100):
        assert cfg.num_compressed_blocks(tokens) == oracle.count_blocks(tokens, length, stride)
        assert cfg.num_selection_blocks(tokens) == len(range(0, tokens, 4 * length))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(nsa.NSAConfig)])
@pytest.mark.parametrize("value", [0, -3])
def test_every_field_must_be_positive(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be positive.*got {value}"):
        nsa.NSAConfig(**{**VALID, field: value})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(nsa.NSAConfig)])
@pytest.mark.parametrize("value", ["64", True, 1 + 2j])
def test_every_field_must_be_a_number(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{field} must be a .*number, got"):
        nsa.NSAConfig(**{**VALID, field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 5}, "num_kv_heads must divide num_heads=32, got 5"),
        ({"num_kv_heads": 64}, "num_kv_heads must divide num_heads=32, got 64"),
        ({"block_length": 24}, "block_length must be a multiple of block_stride=16, got 24"),
        ({"selection_block_size": 72}, "selection_block_size must be a multiple of block_stride=16, got 72"),
        ({"block_length": 80}, "block_length must be at most selection_block_size=64, got 80"),
        ({"num_selected_blocks": 2}, r"num_selected_blocks must be at least num_initial_blocks \+ num_local_blocks = 3, got 2"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be positive and finite, got nan"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be positive and finite, got inf"),
        ({"head_dim": 0}, "head_dim must be positive, got 0"),
    ],
)
def test_what_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nsa.NSAConfig(**{**VALID, **fields})


def test_whole_numbers_only() -> None:
    with pytest.raises(TypeError, match=r"window_size must be a whole number, got 2\.5"):
        nsa.NSAConfig(**VALID, window_size=2.5)
