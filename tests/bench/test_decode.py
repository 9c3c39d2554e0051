"""``nsa bench decode`` from its options to its files, and what it refuses."""

import csv

import pytest
import torch
from typer.testing import CliRunner

import nsa
from nsa.bench import newest
from nsa.bench.__main__ import app
from nsa.bench.decode_cases import COLD, DecodeCase, Work, copies
from nsa.bench.decode_run import DecodeRow, check
from nsa.bench.newest import WrongStep

SMALL = ("--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32")
CPU = torch.device("cpu")
CFG = nsa.NSAConfig(head_dim=16, num_heads=4, num_kv_heads=2)


def bench(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_run_writes_a_row_for_each_case_and_a_picture(tmp_path):
    result = bench("decode", *SMALL, "--cases", "1x100,3x1030", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (table,) = tmp_path.glob("*-cpu-decode.csv")
    assert table.with_suffix(".png").stat().st_size > 10_000
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["implementation"], r["batch"], r["length"]) for r in rows] == [
        (name, batch, length) for batch, length in (("1", "100"), ("3", "1030")) for name in ("math", "nsa")
    ]
    assert set(rows[0]) == set(DecodeRow.__dataclass_fields__)
    for dense, ours in zip(rows[::2], rows[1::2]):
        ratio = float(dense["median_us"]) / float(ours["median_us"])
        assert float(ours["ratio_to_dense"]) == pytest.approx(ratio)
        assert float(ours["relative_error"]) < 2e-5


def test_paged_caches_are_measured_too(tmp_path):
    assert bench("decode", *SMALL, "--cases", "2x200", "--page-size", 64, "--out", tmp_path).exit_code == 0


def test_the_bytes_that_must_move():
    """By hand: 4,095 blocks, 16 x 64 selected tokens and a window of 512, K and V of 256 bytes, 4 KV heads."""
    case = DecodeCase(32, 65536, nsa.NSAConfig(128, 64, 4), torch.bfloat16, CPU)
    assert case.bytes_moved == 32 * 4 * (4095 + 1024 + 512) * 512
    assert case.dense_bytes == 32 * 4 * 65536 * 512
    assert copies(case.bytes_moved) == 2
    alone = DecodeCase(1, 65536, case.cfg, torch.bfloat16, CPU)
    assert copies(alone.bytes_moved) * alone.bytes_moved > COLD


@pytest.mark.parametrize("wrong", ["output", "blocks"])
def test_a_wrong_step_is_seen(wrong, monkeypatch):
    work = Work(DecodeCase(2, 2000, CFG, torch.float32, CPU), 1)
    assert check(work) < 2e-5
    right = Work.step

    def broken(self, cache):
        o, indices = right(self, cache)
        if wrong == "output":
            return o * 1.001, indices
        shifted = indices.clone()
        shifted[..., 5] = next(j for j in range(1, 30) if j not in indices[0].flatten().tolist())
        monkeypatch.setattr(newest, "RELATIVE_NORM", {torch.float32: 9.0})
        return o, shifted

    monkeypatch.setattr(Work, "step", broken)
    with pytest.raises(WrongStep, match="relative error" if wrong == "output" else "less importance"):
        check(work)


def test_no_speed_after_a_wrong_step(tmp_path, monkeypatch):
    monkeypatch.setattr(newest, "RELATIVE_NORM", {torch.float32: 0.0})
    result = bench("decode", *SMALL, "--cases", "1x100", "--out", tmp_path)
    assert result.exit_code == 1
    assert "no speed is shown, because the check failed: 1 x 100" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cases", ["64", "1x", "0x64", "1x64,2"])
def test_cases_are_checked(cases, tmp_path):
    result = bench("decode", *SMALL, "--cases", cases, "--out", tmp_path)
    assert result.exit_code != 0
    assert "cases must be" in result.output
