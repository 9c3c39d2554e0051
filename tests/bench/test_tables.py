"""``nsa bench`` without options of one shape: every part of it, its CSV and its tables, and that each part's check can fail."""

import dataclasses
import io
from functools import partial

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nsa.bench import long, tables_command, training
from nsa.bench.__main__ import app
from nsa.bench.ahead import compile_ahead, touch_case, touch_model
from nsa.bench.cases import Case
from nsa.bench.long import LongWork, check_long, make_long_work, measure_long
from nsa.bench.measure import Timing
from nsa.bench.results import geometry, read_rows
from nsa.bench.run import CheckFailed
from nsa.bench.summary import print_summary
from nsa.bench.tables import TABLES
from nsa.bench.training import check_training, make_training_work, measure_training
from tests.bench.planting import plant, wrong
from tests.bench.test_command import row

CPU = torch.device("cpu")
TABLE = TABLES["cpu"]
LONG = Case(320, "random", TABLE.shape, torch.bfloat16, CPU)


def bench(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    result = bench("--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    (table,) = out.glob("*.csv")
    return result.output, read_rows(table), table


def test_one_run_measures_every_part(measured):
    _, rows, table = measured
    assert table.with_suffix(".png").stat().st_size > 10_000
    ours = [r for r in rows if r.implementation == "nsa" and r.kind == "time"]
    found = {
        (geometry(r)[1:3], r.length, r.data, r.step, r.direction, r.chunk)
        for r in ours
        if r.step in ("whole", training.TRAINING_STEP)
    }
    both = ("forward", "backward")
    wanted = [
        (TABLE.shape, n, data, "whole", d, None) for n in TABLE.lengths for data in ("random", "trained-like") for d in both
    ]
    wanted += [
        (cfg, TABLE.others_length, data, "whole", d, None)
        for cfg in TABLE.others
        for data in ("random", "trained-like")
        for d in both
    ]
    wanted += [(TABLE.shape, TABLE.long_both, "random", "whole", d, None) for d in both]
    wanted += [(TABLE.shape, TABLE.long_forward, "random", "whole", "forward", TABLE.chunk)]
    wanted += [(TABLE.model.nsa, n, "random", training.TRAINING_STEP, "both", None) for n in TABLE.model_lengths]
    sizes = geometry(dataclasses.replace(rows[0]))[1:3]
    assert sizes == (TABLE.shape.head_dim, TABLE.shape.num_heads)
    assert found == {((cfg.head_dim, cfg.num_heads), *rest) for cfg, *rest in wanted}
    assert {r.length for r in ours if r.step == "selected"} == set(TABLE.lengths), "single steps of the first shape alone"
    assert all(r.relative_error is not None for r in ours if r.step in ("whole", training.TRAINING_STEP))


def test_the_twin_is_measured_beside_the_model(measured):
    _, rows, _ = measured
    for length in TABLE.model_lengths:
        twin, mine = (
            next(r for r in rows if (r.step, r.length, r.implementation) == (training.TRAINING_STEP, length, name))
            for name in ("sdpa", "nsa")
        )
        assert mine.ratio_to_sdpa == pytest.approx(twin.median_ms / mine.median_ms)
        assert mine.tokens_per_s == pytest.approx(length / mine.median_ms * 1e3)
        assert (mine.num_layers, mine.hidden_size) == (TABLE.model.num_layers, TABLE.model.hidden_size)


def test_checks_come_before_the_tables_that_tell_of_every_part(measured):
    output, _, _ = measured
    assert (
        output.index("tensors checked")
        < output.index("ms, medians")
        < output.index("nsa alone")
        < output.index("training step, 2 layers")
    )
    assert "layer 1" in output


def test_an_option_of_one_shape_measures_that_shape(tmp_path):
    result = bench(
        "--device", "cpu", "--out", tmp_path, "--lengths=128", "--heads", 4, "--kv-heads", 2, "--head-dim", 16,
        "--data", "random",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (table,) = tmp_path.glob("*.csv")
    assert {(r.length, r.head_dim, r.chunk) for r in read_rows(table)} == {(128, 16, None)}


def test_the_tables_are_made_from_the_rows_alone():
    """By hand: sums over sums, a fallback without a ratio, the first shape's ratio, and memory."""
    shared = {"step": "whole", "data": "random"}

    def time(implementation, direction, ms, **cells):
        return row(kind="time", implementation=implementation, direction=direction, median_ms=ms, **cells, **shared)

    def memory(implementation, peak):
        return row(kind="memory", implementation=implementation, direction="both", peak_bytes=peak, **shared)

    rows = [
        time("cudnn", "forward", 30.0), time("cudnn", "backward", 60.0), memory("cudnn", 2**30),
        time("nsa", "forward", 10.0), time("nsa", "backward", 20.0), memory("nsa", 3 * 2**29),
        time("cudnn", "forward", 12.0, head_dim=2),
        time("efficient", "forward", 70.0, head_dim=2), time("efficient", "backward", 80.0, head_dim=2),
        time("nsa", "forward", 8.0, head_dim=2), time("nsa", "backward", 16.0, head_dim=2),
    ]  # fmt: skip
    printed = io.StringIO()
    print_summary(Console(width=140, file=printed), rows)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.getvalue().splitlines() if "│" in line]
    assert [line[4:] for line in lines if line[1] == "1/1" and len(line) == 10] == [
        ["forward", "10.00", "30.00", "cuDNN", "3.00x", ""],
        ["backward", "20.00", "60.00", "cuDNN", "3.00x", ""],
        ["both", "30.00", "90.00", "cuDNN", "3.00x", ""],
    ]
    assert [line[4:] for line in lines if line[1] == "2/1" and len(line) == 10] == [
        ["forward", "8.000", "12.00", "cuDNN", "1.50x", "0.50"],
        ["backward", "16.00", "80.00", "memory-efficient", "-", ""],
        ["both", "24.00", "150.0", "memory-efficient", "-", ""],
    ]
    assert ["1/1", "1/1", "1", "random", "1.50", "1.00", "cuDNN", "1.50"] in lines


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda o, rows: o * 1.1, "o"),
        (lambda o, rows: torch.where(torch.arange(o.shape[1])[:, None, None] == 77, torch.nan, o), "o"),
    ],
    ids=["all", "NaN outside the sample"],
)
def test_a_wrong_long_forward_is_found(change, tensor, monkeypatch):
    right = long.functional.nsa_attention

    def broken(*args, **options):
        o, indices = right(*args, **options)
        return (change(o, options["seqlen_k"]) if options["seqlen_k"] == 256 else o), indices

    assert wrong(check_long(make_long_work(LONG, 128))) == set()
    monkeypatch.setattr(long.functional, "nsa_attention", broken)
    monkeypatch.setattr(long, "sample_positions", lambda case, chunk: torch.tensor([0, 5, 127, 128, 200, 255, 256, 319]))
    assert wrong(check_long(make_long_work(LONG, 128))) == {("whole", "forward", tensor)}


def test_a_chunk_at_the_wrong_place_is_found_before_it_is_timed(monkeypatch):
    right = long.functional.nsa_attention
    monkeypatch.setattr(
        long.functional, "nsa_attention",
        lambda *args, **options: right(*args, **{**options, "seqlen_k": max(options["seqlen_k"] - 1, 128)}),
    )  # fmt: skip
    monkeypatch.setattr(long, "time_slow", lambda *_: pytest.fail("timed a wrong tensor"))
    with pytest.raises(CheckFailed, match=r"320 random: .*whole forward o"):
        list(measure_long(LONG, 128, lambda _: pytest.fail("passed")))


def test_a_chunk_that_is_never_written_is_found(monkeypatch):
    right = LongWork.forward

    def forward(work, on_chunk):
        before = work.o[:, -1:].clone()
        done = right(work, on_chunk)
        work.o[:, -1:] = before
        return done

    monkeypatch.setattr(LongWork, "forward", forward)
    assert ("whole", "forward", "o") in wrong(check_long(make_long_work(LONG, 128)))


def test_every_tensor_of_two_layers_is_checked_and_right():
    findings = check_training(make_training_work(TABLE.model, 192, CPU))
    assert wrong(findings) == set()
    names = ["indices", "o", "dx", "dq_proj", "dk_proj", "dv_proj", "dgate_proj", "do_proj"]
    assert [(f.step, f.tensor) for f in findings] == [(f"layer {i}", name) for i in (0, 1) for name in names]
    assert all(f.max_error > 0 for f in findings if f.tensor != "indices")


class _FirstBlockDoubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[:, :64] *= 2
        return grad


@pytest.mark.parametrize(
    ("step", "change", "tensors"),
    [
        ("combine", lambda right: lambda *args: right(*args) * 1.1, {"o"}),
        ("select_blocks", lambda right: lambda q, *rest: right(torch.zeros_like(q), *rest), {"indices"}),
        (
            "selected_attention",
            lambda right: lambda q, k, v, *rest: right(q, k, _FirstBlockDoubled.apply(v), *rest),
            {"dx", "dv_proj"},
        ),
    ],
)
def test_a_wrong_layer_is_found_before_its_step_is_timed(step, change, tensors, monkeypatch):
    model = dataclasses.replace(TABLE.model, nsa=dataclasses.replace(TABLE.model.nsa, num_selected_blocks=4))
    plant(monkeypatch, step, change)
    timed = []
    monkeypatch.setattr(training, "time_slow", lambda *args: timed.append(args) or (Timing(1.0, 1.0, 1.0, 1), 0))
    with pytest.raises(CheckFailed, match="512 training step nsa: ") as failed:
        measure_training(model, 512, CPU, lambda _: pytest.fail("passed"), lambda _: None)
    assert tensors <= {tensor for _, _, tensor in wrong(failed.value.findings)}
    assert len(timed) == 1, "the twin alone"


def test_a_loss_that_is_no_number_is_found():
    work = make_training_work(TABLE.model, 128, CPU)
    with torch.no_grad():
        work.model.norm.weight[3] = torch.nan
    assert (training.TRAINING_STEP, "forward", "loss") in wrong(check_training(work))


def test_a_wrong_part_ends_the_run_without_a_speed(tmp_path, monkeypatch):
    right = long.check_long
    monkeypatch.setattr(long, "check_long", lambda work: [dataclasses.replace(f, wrong="broken") for f in right(work)])
    result = bench("--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 1
    assert "ms, medians" not in result.output
    assert "no speed is shown, because the check failed: 320 random: selection forward indices: broken" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_parts_that_had_ended(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables_command, "measure_long", interrupted)
    result = bench("--device", "cpu", "--out", tmp_path)
    assert result.exit_code == tables_command.INTERRUPTED
    assert "interrupted" in result.output
    (table,) = tmp_path.glob("*.csv")
    rows = read_rows(table)
    assert {r.length for r in rows} == {*TABLE.lengths, TABLE.others_length, TABLE.long_both}
    assert not any(r.step == training.TRAINING_STEP or r.chunk for r in rows)


def test_shapes_are_compiled_ahead_in_processes_and_failures_forgotten(tmp_path):
    case = Case(128, "random", TABLE.shape, torch.bfloat16, CPU)
    done = tmp_path / "done"
    compile_ahead([partial(touch_case, dataclasses.replace(case, length=100, data="trained-like"), False), done.touch])
    assert done.exists()
    with pytest.raises(ValueError, match="multiple of 64"):
        touch_case(dataclasses.replace(case, length=100, data="trained-like"), False)


def test_there_is_a_job_for_each_shape():
    jobs = TABLES["cuda"].jobs(CPU, 0)
    assert jobs[0].func is touch_model
    cases = [job.args for job in jobs[1:]]
    assert {case.cfg for case, _ in cases} == {TABLES["cuda"].shape, *TABLES["cuda"].others}
    assert all(case.length == 65536 and steps == (case.cfg == TABLES["cuda"].shape) for case, steps in cases)
    for job in TABLE.jobs(CPU, 0):
        job()
