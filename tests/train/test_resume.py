"""A run that was stopped and resumed is the run that was not, bit for bit."""

from dataclasses import replace

import pytest
import torch

from nsa.train import load_checkpoint, resume_run, start_run, train
from nsa.train.loop import make_optimizer
from nsa.train.metrics import TIMING, read_metrics


def state(folder):
    return load_checkpoint(folder).tensors


def without_timing(folder):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
@pytest.mark.parametrize("stop_after", [1, 5])
def test_stopped_and_resumed_equals_unbroken(attention, stop_after, corpus, micro, tmp_path):
    model = replace(micro.model, attention=attention)
    unbroken = start_run(tmp_path / "unbroken", model, micro.train, corpus)
    assert train(unbroken)

    broken = start_run(tmp_path / "broken", model, micro.train, corpus)
    assert not train(broken, stop=lambda: broken.step == stop_after)
    torch.manual_seed(12345)  # a new process starts with another generator
    torch.rand(7)
    resumed = resume_run(tmp_path / "broken", corpus)
    assert resumed.step == stop_after
    assert train(resumed)

    expected, got = state(tmp_path / "unbroken"), state(tmp_path / "broken")
    assert set(expected) == set(got)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert without_timing(tmp_path / "broken") == without_timing(tmp_path / "unbroken")


def test_metrics_past_the_checkpoint_are_dropped(corpus, micro, tmp_path):
    def crash(line):
        if line["step"] == 7:
            raise RuntimeError("power cut")

    unbroken = start_run(tmp_path / "unbroken", micro.model, micro.train, corpus)
    train(unbroken)
    run = start_run(tmp_path / "run", micro.model, micro.train, corpus)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, on_step=crash)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 7
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tok')  # the line that the crash cut short
    resumed = resume_run(tmp_path / "run", corpus)
    assert resumed.step == 4  # micro saves every 4 steps
    train(resumed)
    assert without_timing(tmp_path / "run") == without_timing(tmp_path / "unbroken")


def test_the_loss_falls_and_every_line_is_whole(corpus, micro, tmp_path):
    config = replace(micro.train, steps=30, learning_rate=1e-2, eval_every=10, checkpoint_every=100)
    run = start_run(tmp_path / "run", micro.model, config, corpus)
    train(run)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [10, 20, 30]
    assert lines[-1]["validation_bits_per_byte"] < 5 < 7 < lines[0]["train_bits_per_byte"]
    assert lines[-1]["tokens"] == 30 * 2 * 64


def test_only_matrices_decay(micro, corpus, tmp_path):
    run = start_run(tmp_path / "run", micro.model, micro.train, corpus)
    decayed = {id(p): g["weight_decay"] for g in make_optimizer(run.model, micro.train).param_groups for p in g["params"]}
    for name, p in run.model.named_parameters():
        assert decayed[id(p)] == (0.0 if "norm" in name else 0.1), name


def test_a_run_is_not_written_over(corpus, micro, tmp_path):
    train(start_run(tmp_path / "run", micro.model, replace(micro.train, steps=1), corpus))
    with pytest.raises(ValueError, match="out must be a folder without a run"):
        start_run(tmp_path / "run", micro.model, micro.train, corpus)


def test_bad_input_leaves_nothing_behind(corpus, micro, tmp_path):
    with pytest.raises(ValueError, match="corpus is too short"):
        start_run(tmp_path / "run", micro.model, replace(micro.train, context=100_000), corpus)
    with pytest.raises(ValueError, match="vocab_size must be at least 256 to train on bytes, got 100"):
        start_run(tmp_path / "run", replace(micro.model, vocab_size=100), micro.train, corpus)
    assert not (tmp_path / "run").exists()


def test_another_corpus_is_refused(corpus, text_folder, micro, tmp_path):
    from nsa.train import read_corpus

    train(start_run(tmp_path / "run", micro.model, replace(micro.train, steps=1), corpus))
    (text_folder / "part00.txt").write_text("something else")
    with pytest.raises(ValueError, match="data must be what the run began with"):
        resume_run(tmp_path / "run", read_corpus([text_folder]))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(corpus, micro, tmp_path):
    run = start_run(tmp_path / "run", micro.model, micro.train, corpus)

    def poison(line):
        if line["step"] == 5:
            run.model.embedding.weight.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="loss of step 6 is nan"):
        train(run, on_step=poison)
    assert load_checkpoint(tmp_path / "run").step == 4


def test_global_settings_are_as_before(corpus, micro, tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    train(
        start_run(tmp_path / "run", micro.model, replace(micro.train, steps=1), corpus),
        on_step=lambda line: setattr(test_global_settings_are_as_before, "seen", torch.are_deterministic_algorithms_enabled()),
    )
    assert test_global_settings_are_as_before.seen
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be a whole number, got 1.5"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive and finite, got -1.0"),
        ({"final_learning_rate": 2.0}, ValueError, "final_learning_rate must be between 0 and 1"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_a_training_configuration_that_cannot_be_is_an_error(changes, error, message, micro):
    with pytest.raises(error, match=message):
        replace(micro.train, **changes)
