"""``nsa bench prefill`` from its options to its file, and what it refuses."""

import csv

import pytest
import torch
from typer.testing import CliRunner

import nsa
from nsa.bench import prefill_run
from nsa.bench.__main__ import app
from nsa.bench.newest import WrongStep
from nsa.bench.prefill_run import PrefillCase, PrefillRow, measure

SMALL = ("--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32")


def bench(*arguments):
    return CliRunner().invoke(app, ["prefill", *(str(a) for a in arguments)])


@pytest.mark.parametrize("pages", [(), ("--page-size", 64)])
def test_a_run_writes_a_row_for_each_chunk(tmp_path, pages):
    result = bench(*SMALL, "--tokens", 1000, "--chunk", 300, *pages, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (table,) = tmp_path.glob("*-cpu-prefill.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["end"]) for row in rows] == [300, 600, 900, 1000]
    assert set(rows[0]) == set(PrefillRow.__dataclass_fields__)
    assert [row["relative_error"] != "" for row in rows] == [True, False, True, True]
    assert all(float(row["relative_error"] or 0) < 2e-5 for row in rows)
    assert "1,000 tokens in" in result.output


@pytest.mark.parametrize("wrong", ["output", "blocks"])
def test_a_wrong_chunk_is_seen(wrong, monkeypatch):
    right = prefill_run.cached_attention

    def broken(q, gates, cache, **options):
        o, indices = right(q, gates, cache, **options)
        if wrong == "output":
            return torch.cat([o[:, :-2], o[:, -2:] * 1.001], 1), indices
        indices = indices.clone()
        indices[:, -3, :, 5] = next(j for j in range(1, 14) if j not in indices[0, -3].flatten().tolist())
        return right(q, gates, cache, **options)[0], indices

    monkeypatch.setattr(prefill_run, "cached_attention", broken)
    if wrong == "blocks":
        monkeypatch.setattr("nsa.bench.newest.RELATIVE_NORM", {torch.float32: 9.0})
    cfg = nsa.NSAConfig(head_dim=16, num_heads=4, num_kv_heads=2, num_selected_blocks=6)
    case = PrefillCase(1000, 1000, cfg, torch.float32, torch.device("cpu"))
    with pytest.raises(WrongStep, match="relative error" if wrong == "output" else "less importance"):
        list(measure(case, lambda done: None))


@pytest.mark.parametrize("sizes", [("--tokens", 0), ("--chunk", 0)])
def test_sizes_are_checked(sizes, tmp_path):
    result = bench(*SMALL, *sizes, "--out", tmp_path)
    assert result.exit_code != 0
    assert "tokens and chunk must be positive" in result.output
