"""The command from its options to its files, and what it refuses."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nsa
import nsa.reference
from nsa.bench.__main__ import app
from nsa.bench.baselines import BACKENDS
from nsa.bench.cases import Case
from nsa.bench.data import KINDS
from nsa.bench.measure import time_calls
from nsa.bench.plot import draw
from nsa.bench.results import Row, new_file, read_rows, write_rows
from nsa.bench.run import Plan, run, with_ratio

SMALL = ("--device", "cpu", "--heads", 4, "--kv-heads", 2, "--head-dim", 16)


def bench(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def row(**cells):
    numbers = {f.name: 1 for f in fields(Row) if f.type == "int"}
    words = {f.name: "x" for f in fields(Row) if f.type == "str"}
    return Row(**{**numbers, **words, **cells})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    result = bench(*SMALL, "--lengths", "128,192", "--out", out)
    assert result.exit_code == 0, result.output
    return result, out


def test_a_run_prints_checks_then_speeds_and_writes_both_files(measured):
    result, out = measured
    assert result.output.index("relative norm") < result.output.index("ms: median")
    assert "neighbours share" in result.output
    assert "skipped 128 cudnn: " in result.output
    (table,) = out.glob("*.csv")
    assert table.name.endswith("-cpu.csv")
    assert table.with_suffix(".png").stat().st_size > 10_000
    assert len(list(out.iterdir())) == 2


def test_the_csv_has_a_row_for_each_step_length_data_and_direction(measured):
    (table,) = measured[1].glob("*.csv")
    rows = read_rows(table)
    ours = {(r.length, r.data, r.step, r.direction) for r in rows if r.implementation == "nsa"}
    steps = ("compress", "compressed", "selection", "selected", "window", "combine", "whole")
    assert ours == {
        (length, data, step, direction)
        for length in (128, 192)
        for data in ("random", "trained-like")
        for step in steps
        for direction in ("forward", "backward")
        if (step, direction) != ("selection", "backward")
    }
    assert {(r.length, r.direction) for r in rows if r.implementation == "flash"} == {
        (length, direction) for length in (128, 192) for direction in ("forward", "backward")
    }
    for r in rows:
        assert (r.gpu, r.torch, r.nsa, r.dtype, r.num_heads) == ("cpu", torch.__version__, nsa.__version__, "bfloat16", 4)
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms
        assert r.samples >= 3
        assert r.backend == ("reference" if r.implementation == "nsa" else "scaled_dot_product_attention")
        assert (r.relative_error is not None) == (r.implementation == "nsa")
        assert r.valid == (r.implementation != "nsa" or r.data == "random"), "too short for trained-like figures"


def test_a_wrong_tensor_ends_the_run_without_a_speed(tmp_path, monkeypatch):
    right = nsa.reference.combine
    monkeypatch.setattr(nsa.reference, "combine", lambda *args: right(*args) * 1.1)
    result = bench(*SMALL, "--lengths", 128, "--out", tmp_path)
    assert result.exit_code == 1
    assert "ms" not in result.output.split()
    assert "WRONG combine" in result.stdout
    assert result.stderr.startswith("error: no speed is shown, because the check failed: 128 random: combine forward o")
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "nsa bench needs a GPU" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lengths", "8k"], "lengths must be whole numbers with commas between them, got '8k'"),
        (["--lengths", "100"], "lengths must be positive multiples of 64, got 100"),
        (["--data", "real"], "data must be one of random, trained-like, got 'real'"),
        (["--dtype", "fp8"], "dtype must be one of bf16, fp16, fp32, got 'fp8'"),
        (["--direction", "sideways"], "direction must be one of forward, backward, both, got 'sideways'"),
        (["--baselines", "cudnn,math"], "baselines must be one of cudnn, flash, efficient, got 'math'"),
        (["--kv-heads", "3"], "num_kv_heads must divide num_heads=4, got 3"),
        (["--device", "abacus"], "device must be one that torch can use here, got 'abacus'"),
    ],
)
def test_bad_options_end_in_one_line(options, words, tmp_path):
    result = bench(*SMALL, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1, result.output
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_quick_forward_takes_the_shortest_length_alone(tmp_path):
    result = bench(
        *SMALL, "--lengths", "192,128", "--quick", "--direction", "forward", "--data", "random", "--baselines", "",
        "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (table,) = tmp_path.glob("*.csv")
    rows = read_rows(table)
    assert {(r.length, r.data, r.direction, r.implementation) for r in rows} == {(128, "random", "forward", "nsa")}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_compares_time_and_memory_with_cudnn(tmp_path):
    result = bench("--heads", 16, "--kv-heads", 1, "--lengths", 8192, "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (table,) = tmp_path.glob("*.csv")
    rows = read_rows(table)
    ours = [r for r in rows if r.implementation == "nsa" and r.step == "whole"]
    assert {(r.data, r.direction) for r in ours} == {(d, x) for d in KINDS for x in ("forward", "backward", "both")}
    assert all(r.ratio_to_cudnn > 0 and r.valid and r.backend == "triton" for r in ours)
    assert all(r.peak_bytes > 0 for r in ours if r.kind == "memory")


def test_a_baseline_without_memory_is_skipped_and_the_rest_measured(tmp_path, monkeypatch):
    def full(step, backward):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("nsa.bench.run.refusal", full)
    result = bench(*SMALL, "--lengths", 128, "--data", "random", "--direction", "forward", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "skipped 128 cudnn: out of memory" in result.output
    assert "skipped 128 flash: out of memory" in result.output


@pytest.mark.parametrize(
    ("refused", "measured"),
    [
        ({"cudnn": (True, False)}, {("flash", "forward"), ("flash", "backward")}),
        ({"cudnn": (True,)}, {("cudnn", "forward"), ("flash", "forward"), ("flash", "backward")}),
        ({"cudnn": (True, False), "flash": (True, False)}, {("efficient", "forward"), ("efficient", "backward")}),
        ({}, {("cudnn", "forward"), ("cudnn", "backward")}),
    ],
    ids=["all", "the backward", "two", "nothing"],
)
def test_the_first_fallback_that_computes_takes_the_place_of_a_refused_baseline(refused, measured, monkeypatch):
    """Here the flash backend stands for all."""
    monkeypatch.setattr("nsa.bench.baselines.BACKENDS", dict.fromkeys(BACKENDS, BACKENDS["flash"]))
    monkeypatch.setattr(
        "nsa.bench.run.refusal", lambda step, backward: "no" if backward in refused.get(step.name, ()) else None
    )
    case = Case(128, "random", nsa.NSAConfig(head_dim=16, num_heads=4, num_kv_heads=2), torch.bfloat16, torch.device("cpu"))
    plan = Plan([case], baselines=("cudnn",), fallbacks=("flash", "efficient"), single_steps=False, milliseconds=0)
    skipped = []
    rows = run(plan, on_checked=lambda _: None, on_skipped=skipped.append)
    assert {(r.implementation, r.direction) for r in rows if r.implementation != "nsa"} == measured
    assert len(skipped) == len(refused)
    assert all(("backward" in line) == (set(refused.values()) == {(True,)}) for line in skipped)
    ours = {r.direction: r.ratio_to_cudnn for r in rows if r.implementation == "nsa"}
    assert {d for d, ratio in ours.items() if ratio is not None} == {d for name, d in measured if name == "cudnn"}


def test_rows_survive_the_csv(tmp_path):
    rows = [
        row(kind="time", median_ms=1 / 3, p20_ms=0.1, p80_ms=1e9, samples=7, valid=False, gpu='a "GPU", of sorts'),
        row(kind="memory", peak_bytes=2**40, ratio_to_cudnn=None),
    ]
    write_rows(tmp_path / "a.csv", rows)
    assert read_rows(tmp_path / "a.csv") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_rows(tmp_path / "a.csv", [row()])
    with pytest.raises(TypeError):
        write_rows(tmp_path / "a.csv", [row(), None])
    assert read_rows(tmp_path / "a.csv") == [row()]
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_files_from_before_a_column_was_added_are_read():
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    for table in sorted(folder.glob("*-hbm3.csv")):
        assert read_rows(table)[0].chunk is None


def test_another_csv_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("name,value\nx,1\n")
    with pytest.raises(ValueError, match=r"a\.csv must be a file that nsa bench wrote"):
        read_rows(tmp_path / "a.csv")


def test_a_second_run_of_the_day_gets_a_file_of_its_own(tmp_path):
    names = []
    for _ in range(3):
        path = new_file(tmp_path, "2026-01-02T03:04:05+00:00", "NVIDIA H100 80GB HBM3")
        path.touch()
        names.append(path.name)
    stem = "2026-01-02-nvidia-h100-80gb-hbm3"
    assert names == [f"{stem}.csv", f"{stem}-2.csv", f"{stem}-3.csv"]


def test_ratios_are_of_the_same_length_kind_and_direction():
    full = [
        row(implementation="cudnn", kind="time", direction="forward", length=1, median_ms=6.0),
        row(implementation="cudnn", kind="time", direction="forward", length=2, median_ms=30.0),
        row(implementation="cudnn", kind="memory", direction="both", length=2, peak_bytes=100),
    ]
    mine = row(implementation="nsa", kind="time", direction="forward", length=2, median_ms=5.0)
    assert with_ratio(mine, full).ratio_to_cudnn == 6.0
    assert (
        with_ratio(row(implementation="nsa", kind="memory", direction="both", length=2, peak_bytes=200), full).ratio_to_cudnn
        == 0.5
    )
    assert (
        with_ratio(row(implementation="nsa", kind="time", direction="backward", length=2, median_ms=5.0), full).ratio_to_cudnn
        is None
    )


def test_a_plot_needs_a_valid_time(tmp_path):
    write_rows(tmp_path / "a.csv", [row(kind="time", implementation="nsa", median_ms=1.0, valid=False)])
    with pytest.raises(ValueError, match="must hold a valid time to draw"):
        draw(tmp_path / "a.csv", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_timing_takes_at_least_five_samples_after_a_warm_up():
    calls = []
    timing = time_calls(lambda: calls.append(1), torch.device("cpu"), 0)
    assert (timing.samples, len(calls)) == (5, 6)
    assert timing.p20 <= timing.median <= timing.p80


def test_the_module_runs_as_a_program():
    found = subprocess.run(
        [sys.executable, "-m", "nsa.bench", "steps", "--help"], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(nsa.__file__).parents[1])},
    )  # fmt: skip
    assert "--lengths" in found.stdout
