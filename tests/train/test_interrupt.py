"""Signals stop a run after its step, and it can go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nsa
from nsa.train import load_checkpoint, resume_run, train
from nsa.train.interrupt import stop_on_signals
from nsa.train.metrics import read_metrics


def start(text_folder, out):
    environment = os.environ | {"PYTHONPATH": str(Path(nsa.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "nsa", "train", "--preset", "micro", "--attention", "full", "--device", "cpu",
        "--steps", "100000", "--checkpoint-every", "90000", "--data", text_folder, "--out", out,
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(process, metrics):
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > 500):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, text_folder, corpus, tmp_path):
    out = tmp_path / "my run"
    process = start(text_folder, out)
    try:
        wait_for_steps(process, out / "metrics.jsonl")
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, output
    assert f"python -m nsa train --resume '{out}' --device cpu" in output
    assert "Traceback" not in output
    steps = load_checkpoint(out).step
    assert len(read_metrics(out / "metrics.jsonl")) == steps
    run = resume_run(out, corpus)
    train(run, stop=lambda: run.step == steps + 2)
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, steps + 3))


@pytest.fixture
def _interruptible():
    """A job in the background starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_the_second_signal_does_what_it_would_do_without_us():
    def two_signals():
        with stop_on_signals() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop()
            assert stop.signal == signal.SIGINT
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        two_signals()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
