"""The public functions' arguments: blocks chosen by the caller, defaults, dtypes, layouts in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsa
from tests import oracle
from tests.cases import Case, Inputs, make_inputs, random_case

CFG = nsa.NSAConfig(
    head_dim=4, num_heads=4, num_kv_heads=2, value_dim=6, block_length=4, block_stride=2, selection_block_size=4,
    num_selected_blocks=4, num_local_blocks=1, window_size=7,
)  # fmt: skip
T = 45
CASE = Case(3, "plain", CFG, (T, T), (T, T))
BLOCKS = 12


@pytest.fixture
def x() -> Inputs:
    return make_inputs(CASE)


def run(x: Inputs, cfg: nsa.NSAConfig = CFG, **options: object) -> Tensor:
    return nsa.nsa_attention(*x.tensors(), cfg, **options)


def messy_sets() -> Tensor:
    """Any order, duplicates, negatives, blocks of the future and past the end: int32 ``[2, T, 2, 9]``."""
    return torch.randint(-3, BLOCKS + 4, (2, T, 2, 9), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def tidy(indices: Tensor, width: int) -> Tensor:
    """The same sets, ascending, without what counts for nothing, in ``width`` places."""
    out = torch.full((*indices.shape[:3], width), -1, dtype=torch.int32)
    for b in range(2):
        for t in range(T):
            for kv in range(2):
                kept = sorted({int(j) for j in indices[b, t, kv] if 0 <= j <= t // CFG.selection_block_size})
                out[b, t, kv, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return out


def test_block_indices_are_sets(x: Inputs) -> None:
    messy = messy_sets()
    want = run(x, block_indices=tidy(messy, 9))
    assert torch.equal(run(x, block_indices=messy), want)
    assert torch.equal(run(x, block_indices=messy.flip(-1)), want)
    assert torch.equal(run(x, block_indices=torch.cat([messy, messy], -1)), want)
    assert torch.equal(run(x, block_indices=tidy(messy, 40)), want)


def test_block_indices_match_brute_force(x: Inputs) -> None:
    messy = messy_sets()
    got = nsa.selected_attention(x.q, x.k_slc, x.v_slc, messy, CFG)
    for b in range(2):
        want = oracle.selected(x.q[b].numpy(), x.k_slc[b].numpy(), x.v_slc[b].numpy(), messy[b].numpy(), CFG)
        torch.testing.assert_close(got[b], torch.from_numpy(want), rtol=0, atol=1e-12)


def test_nothing_is_forced_into_block_indices(x: Inputs) -> None:
    for empty in (torch.full((2, T, 2, 3), -1, dtype=torch.int32), torch.zeros((2, T, 2, 0), dtype=torch.int32)):
        assert (nsa.selected_attention(x.q, x.k_slc, x.v_slc, empty, CFG) == 0).all()
    future = torch.full((2, T, 2, 1), BLOCKS - 1, dtype=torch.int32)
    o = nsa.selected_attention(x.q, x.k_slc, x.v_slc, future, CFG)
    start = (BLOCKS - 1) * CFG.selection_block_size
    assert (o[:, :start] == 0).all()
    assert (o[:, start:] != 0).any(-1).all()


def test_block_indices_are_handed_back(x: Inputs) -> None:
    o, indices = run(x, return_block_indices=True)
    assert torch.equal(run(x, block_indices=indices), o)
    messy = messy_sets()
    assert run(x, block_indices=messy, return_block_indices=True)[1] is messy


def test_the_selection_ascends_and_holds_the_forced_blocks(x: Inputs) -> None:
    _, indices = run(x, return_block_indices=True)
    assert indices.shape == (2, T, 2, CFG.num_selected_blocks)
    for t in range(T):
        own = t // CFG.selection_block_size
        for row in indices[:, t].reshape(-1, CFG.num_selected_blocks).tolist():
            kept = [j for j in row if j >= 0]
            assert row == kept + [-1] * (len(row) - len(kept))
            assert kept == sorted(set(kept))
            assert len(kept) == min(own + 1, CFG.num_selected_blocks)
            assert {0, own} <= set(kept) <= set(range(own + 1))


def test_all_blocks_and_all_tokens_are_full_attention(x: Inputs) -> None:
    """What is sparse by choice only: with room for everything, both branches are causal attention."""
    cfg = replace(CFG, num_selected_blocks=BLOCKS, window_size=T)
    k, v = x.k_slc.repeat_interleave(2, 2), x.v_slc.repeat_interleave(2, 2)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (x.q, k, v)), is_causal=True, scale=cfg.softmax_scale
    ).transpose(1, 2)
    indices = nsa.nsa_attention(*x.tensors(), cfg, return_block_indices=True)[1]
    torch.testing.assert_close(nsa.selected_attention(x.q, x.k_slc, x.v_slc, indices, cfg), want)
    torch.testing.assert_close(nsa.window_attention(x.q, x.k_slc, x.v_slc, cfg), want)


@pytest.mark.parametrize("branch", range(3))
def test_a_gate_opens_its_own_branch(x: Inputs, branch: int) -> None:
    x.gates = torch.zeros_like(x.gates)
    x.gates[..., branch] = 1
    o_cmp, lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, CFG)
    indices = nsa.select_blocks(x.q, x.k_cmp, lse, CFG)
    alone = [
        o_cmp,
        nsa.selected_attention(x.q, x.k_slc, x.v_slc, indices, CFG),
        nsa.window_attention(x.q, x.k_win, x.v_win, CFG),
    ]
    torch.testing.assert_close(run(x), alone[branch])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = make_inputs(CASE, dtype)
    o_cmp, lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, CFG)
    assert o_cmp.dtype == run(x).dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    own = run(x)
    x.gates = x.gates.float()  # fp32 gates go with every dtype
    torch.testing.assert_close(run(x), own, rtol=2e-2, atol=2e-2)
    assert run(x).dtype == dtype


def test_queries_are_the_last_positions(x: Inputs) -> None:
    """However few they are, and however the number of keys is told."""
    want, want_indices = run(x, return_block_indices=True)
    for count in (0, 1, 5, T):
        late = Inputs(**{name: y[:, T - count :] if name in ("q", "gates") else y for name, y in x.items()})
        for told in (None, T, torch.tensor([T, T], dtype=torch.int32)):
            o, indices = run(late, seqlen_k=told, return_block_indices=True)
            torch.testing.assert_close(o, want[:, T - count :], rtol=0, atol=1e-13)
            assert torch.equal(indices, want_indices[:, T - count :])


def test_packed_sequences_are_computed_as_if_alone() -> None:
    for seed in range(4, 40, 6):
        case = random_case(seed)
        assert case.kind == "packed"
        x = make_inputs(case)
        o, indices = nsa.nsa_attention(*x.tensors(), case.cfg, **case.lengths(), return_block_indices=True)
        for (_, rows), (_, k_rows), (_, c_rows) in case.places():
            own = {"q": rows, "gates": rows, "k_cmp": c_rows, "v_cmp": c_rows}
            alone = Inputs(**{name: y[:, own.get(name, k_rows)] for name, y in x.items()})
            want, want_indices = nsa.nsa_attention(*alone.tensors(), case.cfg, return_block_indices=True)
            torch.testing.assert_close(o[:, rows], want, rtol=0, atol=1e-13)
            assert torch.equal(indices[:, rows], want_indices)


def test_inputs_need_not_be_contiguous(x: Inputs) -> None:
    strided = Inputs(**{name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in x.items()})
    assert not strided.q.is_contiguous()
    torch.testing.assert_close(run(strided), run(x), rtol=0, atol=1e-13)


def test_inputs_are_left_alone(x: Inputs) -> None:
    before = [y.clone() for y in x.tensors()]
    run(x)
    assert all(torch.equal(a, b) for a, b in zip(before, x.tensors()))


def test_no_later_token_is_seen(x: Inputs) -> None:
    """Changing everything from token t on changes nothing before it."""
    want = run(x)
    for t in (0, 1, 4, 11, 12, 13, 30, T - 1):
        changed = Inputs(**{name: y.clone() for name, y in x.items()})
        for name, y in changed.items():
            first = oracle.count_blocks(t, CFG.block_length, CFG.block_stride) if name.endswith("cmp") else t
            y[:, first:] = 100 if name != "gates" else 1
        torch.testing.assert_close(run(changed)[:, :t], want[:, :t], rtol=0, atol=1e-13)


def test_empty_batches_and_sequences(x: Inputs) -> None:
    none = Inputs(**{name: y[:0] for name, y in x.items()})
    assert run(none).shape == (0, T, 4, 6)
    short = Inputs(**{name: y[:, :0] for name, y in x.items()})
    o, indices = run(short, return_block_indices=True)
    assert o.shape == (2, 0, 4, 6)
    assert indices.shape == (2, 0, 2, 4)
    packed = Inputs(**{name: y[:1, :0] for name, y in x.items()})
    for offsets in ([0], [0, 0], [0, 0, 0]):
        assert run(packed, cu_seqlens=torch.tensor(offsets, dtype=torch.int32)).shape == (1, 0, 4, 6)


def test_extreme_scores_stay_finite(x: Inputs) -> None:
    x.q *= 1e4
    assert run(x).isfinite().all()
    x.q *= -1
    assert run(x).isfinite().all()


def test_runs_repeat_to_the_bit(x: Inputs) -> None:
    low = x.to(torch.bfloat16)
    assert torch.equal(run(low), run(low))
