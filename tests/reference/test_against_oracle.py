"""The reference backend computes what brute force computes, in fp64, on random configurations."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import nsa
from tests import oracle
from tests.cases import Case, Inputs, make_inputs, random_case

TOLERANCE = 1e-10
TIE = 1e-12


@dataclass
class Outputs:
    """What the steps return, one after the other, and the whole in one call."""

    o_cmp: Tensor
    lse: Tensor
    indices: Tensor
    o_slc: Tensor
    o_win: Tensor
    o: Tensor
    whole: Tensor
    whole_indices: Tensor


def compute(case: Case, x: Inputs) -> Outputs:
    cfg, lengths = case.cfg, case.lengths()
    o_cmp, lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, cfg, **lengths)
    indices = nsa.select_blocks(x.q, x.k_cmp, lse, cfg, **lengths)
    o_slc = nsa.selected_attention(x.q, x.k_slc, x.v_slc, indices, cfg, **lengths)
    o_win = nsa.window_attention(x.q, x.k_win, x.v_win, cfg, **lengths)
    o = nsa.combine(o_cmp, o_slc, o_win, x.gates)
    return Outputs(
        o_cmp, lse, indices, o_slc, o_win, o, *nsa.nsa_attention(*x.tensors(), cfg, **lengths, return_block_indices=True)
    )


def assert_close(case: Case, step: str, got: Tensor, want: np.ndarray) -> None:
    """Within 1e-10 of the larger of 1 and the largest value, with infinities in the same places; says where not."""
    mine = got.numpy()
    assert mine.shape == want.shape, f"{step} has shape {mine.shape}, not {want.shape}: {case}"
    allowed = TOLERANCE * max(1, np.abs(want[np.isfinite(want)]).max(initial=0))
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(mine - want) <= allowed) | (mine == want))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        pytest.fail(f"{step}{list(where)} is {mine[where]!r}, not {want[where]!r} ({wrong.sum()} wrong): {case}")


def assert_same_selection(case: Case, got: np.ndarray, scores: np.ndarray, first: int) -> None:
    """got ``[TQ, HK, n]``: equal index by index where the scores decide, equal in score where they tie within rounding."""
    for row, kv in np.ndindex(got.shape[:2]):
        want, gap = oracle.select(scores[row, kv], first + row, case.cfg)
        mine = got[row, kv].tolist()
        if gap > TIE:
            assert mine == want, f"blocks of row {row}, key head {kv}: {mine}, not {want} (gap {gap}): {case}"
        else:
            assert mine == sorted(set(mine)), f"blocks of row {row}, key head {kv} must ascend, got {mine}: {case}"
            worth = [sorted(scores[row, kv][[j for j in blocks if j >= 0]]) for blocks in (mine, want)]
            np.testing.assert_allclose(*worth, rtol=TIE, err_msg=f"row {row}, key head {kv}: {mine}, not {want}: {case}")


def test_every_step_and_the_whole(seed: int) -> None:
    case = random_case(seed)
    x = make_inputs(case)
    out = compute(case, x)
    assert torch.equal(out.indices, out.whole_indices)
    assert out.indices.dtype == torch.int32
    assert out.lse.dtype == torch.float64
    for (b, rows), (_, k_rows), (_, c_rows) in case.places():
        check_sequence(case, x, out, b, rows, k_rows, c_rows)
    check_rows_of_no_sequence(case, out)


def check_sequence(case: Case, x: Inputs, out: Outputs, b: int, rows: slice, k_rows: slice, c_rows: slice) -> None:
    """One sequence against the oracle, which never sees the others."""
    cfg, tokens = case.cfg, k_rows.stop - k_rows.start
    q, gates = x.q[b, rows].numpy(), x.gates[b, rows].numpy()
    k_cmp, v_cmp = x.k_cmp[b, c_rows].numpy(), x.v_cmp[b, c_rows].numpy()
    indices = out.indices[b, rows].numpy()
    o_cmp, lse = oracle.compressed(q, k_cmp, v_cmp, tokens, cfg)
    assert_same_selection(case, indices, oracle.importance(q, k_cmp, lse, tokens, cfg), tokens - len(q))
    o_slc = oracle.selected(q, x.k_slc[b, k_rows].numpy(), x.v_slc[b, k_rows].numpy(), indices, cfg)
    o_win = oracle.window(q, x.k_win[b, k_rows].numpy(), x.v_win[b, k_rows].numpy(), cfg)
    o = oracle.combine(o_cmp, o_slc, o_win, gates)
    for name, want in {"o_cmp": o_cmp, "lse": lse, "o_slc": o_slc, "o_win": o_win, "o": o, "whole": o}.items():
        assert_close(case, name, getattr(out, name)[b, rows], want)


def check_rows_of_no_sequence(case: Case, out: Outputs) -> None:
    """Packed tensors may have more rows than their sequences: nothing that lies there, NaN included, comes out."""
    owned = sum(case.lens_q) if case.packed else out.o.shape[1]
    nothing = {"lse": -torch.inf, "indices": -1, "whole_indices": -1}
    for name, y in asdict(out).items():
        assert (y[:, owned:] == nothing.get(name, 0)).all(), f"{name} past the last sequence: {case}"


def test_exact_ties_go_to_the_lowest_block(seed: int) -> None:
    case = random_case(seed)
    x = make_inputs(case)
    x.q.masked_fill_(~x.q.isnan(), 0)
    _, lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, case.cfg, **case.lengths())
    indices = nsa.select_blocks(x.q, x.k_cmp, lse, case.cfg, **case.lengths())
    cfg = case.cfg
    for (b, rows), (_, k_rows), (_, c_rows) in case.places():
        tokens, first = k_rows.stop - k_rows.start, (k_rows.stop - k_rows.start) - (rows.stop - rows.start)
        for row, mine in enumerate(indices[b, rows].tolist()):
            # With q = 0 every visible block weighs the same; whole numbers in place of fractions keep the ties exact.
            ends = [i * cfg.block_stride + cfg.block_length - 1 for i in range(c_rows.stop - c_rows.start)]
            scores = oracle.spread([float(end <= first + row) for end in ends], -(-tokens // cfg.selection_block_size), cfg)
            want, _ = oracle.select(scores, first + row, cfg)
            assert mine == [want] * cfg.num_kv_heads, f"blocks of row {row}: {mine}, not {want}: {case}"


def test_compression(seed: int) -> None:
    case = random_case(seed)
    kind = ("mlp", "linear", "mean")[seed % 3]
    x = make_inputs(case).k_slc
    compressor = nsa.BlockCompressor(case.cfg.head_dim, case.cfg, kind, hidden=1 + seed % 7, dtype=torch.float64)
    rng = torch.Generator().manual_seed(seed)
    for p in compressor.parameters():
        torch.nn.init.normal_(p, generator=rng)
    embedding, weights = oracle_weights(compressor)
    with torch.no_grad():
        # Only packed calls say where a sequence ends; elsewhere the rows past it are sliced off by whoever owns them.
        got = compressor(x, case.key_offsets() if case.packed else None)
    for (b, k_rows), (_, c_rows) in zip(case.slices(case.lens_k), case.slices(case.lens_cmp)):
        want = oracle.compress(x[b, k_rows].numpy(), case.cfg, kind, embedding, weights)
        assert_close(case, kind, got[b, c_rows], want)
    if case.packed:
        assert got.shape[1] == x.shape[1] // case.cfg.block_stride
        assert got.isfinite().all()


def oracle_weights(compressor: nsa.BlockCompressor) -> tuple[np.ndarray | None, list[np.ndarray]]:
    embedding = None if compressor.embedding is None else compressor.embedding.detach().numpy()
    return embedding, [w.detach().numpy() for w in compressor.weights]


def test_the_cases_visit_what_they_promise() -> None:
    """A generator that never draws a hard case proves nothing: count them."""
    drawn = [random_case(seed) for seed in range(320)]
    cfgs = [case.cfg for case in drawn]
    seen = {
        "T = 1": sum(1 in case.lens_k for case in drawn),
        "T < l": sum(any(0 < n < case.cfg.block_length for n in case.lens_k) for case in drawn),
        "TQ < T": sum(case.lens_q != case.lens_k for case in drawn),
        "empty sequence": sum(0 in case.lens_k for case in drawn),
        "rows past the queries": sum(case.extra_q > 0 for case in drawn),
        "rows past the keys": sum(case.extra_k > 0 for case in drawn),
        "rows past the blocks": sum(case.extra_cmp > 0 for case in drawn),
        "DV != D": sum(cfg.value_dim != cfg.head_dim for cfg in cfgs),
        "G not a power of two": sum((cfg.num_heads // cfg.num_kv_heads) in (3, 5) for cfg in cfgs),
        "n not a power of two": sum(cfg.num_selected_blocks & (cfg.num_selected_blocks - 1) != 0 for cfg in cfgs),
        "window of one": sum(cfg.window_size == 1 for cfg in cfgs),
        "l = d": sum(cfg.block_length == cfg.block_stride for cfg in cfgs),
        "something to select": sum(
            max(case.lens_k) > case.cfg.selection_block_size * (case.cfg.num_selected_blocks + 2) for case in drawn
        ),
    }
    assert min(seen.values()) >= 20, seen
