"""The data stands for what it is said to stand for."""

import math

import pytest
import torch

import nsa
from nsa.bench.data import OVERLAP, UNION_OF_4, counts, random_like, selection_figures, trained_like

ONE_GROUP = nsa.NSAConfig(head_dim=128, value_dim=8, num_heads=16, num_kv_heads=1)


def figures(q, k, v, cfg):
    k_cmp, v_cmp = nsa.compress_blocks(k, cfg), nsa.compress_blocks(v, cfg)
    _, lse = nsa.compressed_attention(q, k_cmp, v_cmp, cfg)
    return selection_figures(nsa.select_blocks(q, k_cmp, lse, cfg))


def test_trained_like_selections_lie_in_the_measured_ranges():
    q, k, v = trained_like(8192, ONE_GROUP, dtype=torch.float32)
    overlap, union = figures(q, k, v, ONE_GROUP)
    assert OVERLAP[0] <= overlap <= OVERLAP[1]
    assert UNION_OF_4[0] <= union <= UNION_OF_4[1]
    assert counts("trained-like", overlap, union)


@pytest.mark.parametrize(("dim", "group"), [(128, 4), (128, 1), (64, 16)])
def test_other_shapes_have_a_strength_of_their_own(dim, group):
    cfg = nsa.NSAConfig(head_dim=dim, value_dim=8, num_heads=group, num_kv_heads=1)
    assert counts("trained-like", *figures(*trained_like(8192, cfg, dtype=torch.float32), cfg))


def test_random_selections_overlap_less():
    q, k, v = random_like(8192, ONE_GROUP, dtype=torch.float32)
    overlap, union = figures(q, k, v, ONE_GROUP)
    assert overlap < OVERLAP[0]
    assert union > UNION_OF_4[1]
    assert counts("random", overlap, union)
    assert not counts("trained-like", overlap, union)


def test_the_same_seed_draws_the_same_numbers():
    cfg = nsa.NSAConfig(head_dim=32, value_dim=16, num_heads=4, num_kv_heads=2)
    for draw in (random_like, trained_like):
        first, again, other = (draw(256, cfg, seed=seed) for seed in (0, 0, 1))
        assert [x.shape for x in first] == [(1, 256, 4, 32), (1, 256, 2, 32), (1, 256, 2, 16)]
        assert all(x.dtype == torch.bfloat16 for x in first)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("length", [0, 100])
def test_trained_like_refuses_half_a_segment(length):
    with pytest.raises(ValueError, match=f"multiple of 64 for trained-like data, got {length}"):
        trained_like(length, ONE_GROUP)


def test_figures_of_selections_written_by_hand():
    """Queries 0-3 select {0, 1}, {0, 2}, {0, 1}, {0}: each shares block 0 with the one before, and the four read 3 blocks."""
    indices = torch.tensor([[0, 1], [0, 2], [0, 1], [0, -1]], dtype=torch.int32)[None, :, None]
    assert selection_figures(indices, start=0) == (0.5, 3.0)


def test_figures_of_too_few_queries_never_count():
    overlap, union = selection_figures(torch.zeros(1, 64, 1, 4, dtype=torch.int32))
    assert math.isnan(overlap)
    assert math.isnan(union)
    assert not counts("trained-like", overlap, union)
