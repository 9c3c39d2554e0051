"""The check passes what is right, and finds what is planted, forward and backward, outside and inside the sample."""

import dataclasses

import pytest
import torch

import nsa
import nsa.reference.whole
from nsa.bench.cases import Case, make_work
from nsa.bench.check import check, sample_positions
from nsa.bench.run import CheckFailed, Plan, run
from tests.bench.planting import plant, wrong

CFG = nsa.NSAConfig(
    head_dim=16, value_dim=24, num_heads=4, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8,
    num_selected_blocks=6, window_size=24,
)  # fmt: skip
CASE = Case(192, "random", CFG, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("data", ["random", "trained-like"])
def test_every_output_and_gradient_is_checked_and_right(data, dtype):
    findings = check(make_work(dataclasses.replace(CASE, data=data, dtype=dtype)))
    assert wrong(findings) == set()
    assert {(f.step, f.tensor) for f in findings if f.direction == "backward"} == {
        ("compress", "dk"), ("compress", "dv"), ("compressed", "dq"), ("compressed", "dk_cmp"), ("compressed", "dv_cmp"),
        ("selected", "dq"), ("selected", "dk"), ("selected", "dv"), ("window", "dq"), ("window", "dk"), ("window", "dv"),
        ("combine", "do_cmp"), ("combine", "do_slc"), ("combine", "do_win"), ("combine", "dgates"),
        ("whole", "dq"), ("whole", "dk"), ("whole", "dv"), ("whole", "dgates"),
    }  # fmt: skip
    assert all(f.max_error > 0 for f in findings if f.step != "selection"), (
        "a reference that is the thing itself checks nothing"
    )


def test_other_shapes_of_blocks_are_right_too():
    cfg = nsa.NSAConfig(head_dim=16, num_heads=6, num_kv_heads=2, block_length=16, block_stride=16, num_selected_blocks=3)
    assert wrong(check(make_work(dataclasses.replace(CASE, cfg=cfg, length=320)))) == set()


def test_the_whole_alone_is_checked_and_right():
    work = make_work(CASE, single_steps=False)
    findings = check(work)
    assert list(work.steps) == ["whole"]
    assert wrong(findings) == set()
    assert [(f.step, f.tensor) for f in findings] == [
        ("selection", "indices"), ("whole", "o"), ("whole", "dq"), ("whole", "dk"), ("whole", "dv"), ("whole", "dgates"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "change", "tensor"),
    [
        ("window_attention", lambda right: lambda q, k, *rest: right(q, _LastRowDoubled.apply(k), *rest), "dk"),
        ("combine", lambda right: lambda *args: right(*args) * 1.1, "o"),
        ("select_blocks", lambda right: lambda q, *rest: right(torch.zeros_like(q), *rest), "indices"),
    ],
)
def test_what_is_wrong_in_the_whole_alone_is_found(step, change, tensor, monkeypatch):
    plant(monkeypatch, step, change)
    assert tensor in {tensor for _, _, tensor in wrong(check(make_work(CASE, single_steps=False)))}


def test_the_sample_holds_the_edges():
    positions = sample_positions(dataclasses.replace(CASE, length=4096)).tolist()
    assert positions == sorted(set(positions))
    assert len(positions) == 64
    assert {0, 3, 4, 7, 8, 23, 24, 2047, 2048, 4088, 4094, 4095} <= set(positions)
    chunked = sample_positions(dataclasses.replace(CASE, length=4096), chunk=1500).tolist()
    assert {1499, 1500, 2999, 3000} <= set(chunked)


def test_a_window_of_one_token_more_is_found(monkeypatch):
    plant(
        monkeypatch,
        "window_attention",
        lambda right: (
            lambda q, k, v, cfg, info: right(q, k, v, dataclasses.replace(cfg, window_size=cfg.window_size + 1), info)
        ),
    )
    found = wrong(check(make_work(CASE)))
    assert {("window", "forward", "o"), ("window", "backward", "dk"), ("whole", "forward", "o")} <= found
    assert {step for step, _, _ in found} == {"window", "whole"}


def test_a_selection_that_misses_the_best_is_found(monkeypatch):
    plant(monkeypatch, "select_blocks", lambda right: lambda q, *rest: right(torch.zeros_like(q), *rest))
    findings = check(make_work(CASE))
    assert wrong(findings) == {("selection", "forward", "indices")}
    assert "less importance" in next(f.wrong for f in findings if f.wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.flip(-1), "must rise"),
        (lambda i: torch.where(i == 0, -1, i).sort(-1).values.roll(-1, -1), "as many blocks"),
        (lambda i: torch.cat([i[:, :96] + (i[:, :96] == i[:, :96].amax(-1, keepdim=True)), i[:, 96:]], 1), "future"),
    ],
    ids=["falling", "one short", "the future"],
)
def test_a_malformed_selection_is_found(change, words, monkeypatch):
    plant(monkeypatch, "select_blocks", lambda right: lambda *args: change(right(*args)))
    findings = check(make_work(CASE), backward=False)
    assert words in next(f.wrong for f in findings if f.step == "selection")


class _Spilling(torch.autograd.Function):
    """The identity, whose gradient has one row too many."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        empty = (grad[0].flatten(1) == 0).all(-1).nonzero()[0]
        grad[0, empty] = 1
        return grad


def test_a_gradient_of_a_query_outside_the_sample_is_found(monkeypatch):
    plant(monkeypatch, "window_attention", lambda right: lambda q, *rest: right(_Spilling.apply(q), *rest))
    found = wrong(check(make_work(CASE)))
    assert found == {("window", "backward", "dq"), ("whole", "backward", "dq")}


class _LastRowDoubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[:, -1] *= 2
        return grad


def test_one_wrong_row_of_dk_is_found(monkeypatch):
    plant(monkeypatch, "selected_attention", lambda right: lambda q, k, *rest: right(q, _LastRowDoubled.apply(k), *rest))
    assert ("selected", "backward", "dk") in wrong(check(make_work(CASE)))


def test_nan_outside_the_sample_is_found(monkeypatch):
    def spoiled(right):
        def combine(*args):
            o = right(*args).clone()
            o[:, 101] = float("nan")
            return o

        return combine

    assert 101 not in sample_positions(CASE, 32).tolist()
    plant(monkeypatch, "combine", spoiled)
    monkeypatch.setattr("nsa.bench.check.sample_positions", lambda case: sample_positions(case, 32))
    assert {("combine", "forward", "o"), ("whole", "forward", "o")} <= wrong(check(make_work(CASE)))


def test_nothing_is_timed_after_a_failed_check(monkeypatch):
    plant(monkeypatch, "combine", lambda right: lambda *args: right(*args) * 1.1)
    monkeypatch.setattr("nsa.bench.run.time_forward", lambda *_: pytest.fail("timed a wrong tensor"))
    monkeypatch.setattr("nsa.bench.run.time_backward", lambda *_: pytest.fail("timed a wrong tensor"))
    with pytest.raises(CheckFailed, match="192 random: combine forward o") as failed:
        run(Plan([CASE]), on_checked=lambda _: pytest.fail("passed"), on_skipped=lambda _: None)
    assert wrong(failed.value.findings)
