"""The command line: what it prints, what it writes, and one clean line for what it refuses."""

import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import nsa
from nsa import _dispatch
from nsa.bench.data import selection_figures
from nsa.cli import app
from nsa.train import load_checkpoint, read_corpus
from nsa.train.metrics import read_metrics

TEXT = "def attend(query, keys, values):\n    return softmax(query @ keys) @ values\n\n"


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.py").write_text(TEXT * 20)
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    return folder


def nsa_command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(text, out, *more):
    return nsa_command("train", "--preset", "micro", "--device", "cpu", "--data", text, "--out", out, *more)


def refused(result, *words):
    """One line that holds ``words``, and exit status 1."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_info_names_every_backend_with_its_reason(monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKENDS", ("reference", "abacus"))
    monkeypatch.setattr(_dispatch, "supports", lambda name, *_: "beads are missing" if name == "abacus" else None)
    output = nsa_command("info", "--device", "cpu").output
    lines = dict(line.split("  ", 1) for line in output.splitlines())
    values = {name: value.strip() for name, value in lines.items()}
    assert values["nsa"] == nsa.__version__
    assert values["torch"] == torch.__version__
    assert values["backend reference"].startswith("runs by default")
    assert values["backend abacus"].startswith("can't run: beads are missing")


def test_train_writes_a_run_and_notes_what_it_skipped(text, tmp_path):
    result = train(text, tmp_path / "run", "--attention", "window", "--width", 16, "--heads", 2, "--layers", 1, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert f"skipped {text / 'picture.png'}: binary" in result.output
    saved = load_checkpoint(tmp_path / "run")
    assert (saved.step, saved.model.attention, saved.model.hidden_size, saved.model.num_layers) == (3, "window", 16, 1)
    assert (saved.model.nsa.num_heads, saved.model.nsa.head_dim) == (2, 8)
    assert saved.data == (str(text),)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def test_several_paths_may_follow_data(text, tmp_path):
    result = nsa_command(
        "train", "--preset", "micro", "--device", "cpu", "--steps", 1, "--out", tmp_path / "run", "--data", text / "0.py",
        text / "1.py", text / "2.py",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "run").data == tuple(str(text / f"{i}.py") for i in range(3))


def test_selections_of_a_trained_model(text, tmp_path):
    train(text, tmp_path / "run", "--steps", 2)
    result = nsa_command("bench", "selections", "--checkpoint", tmp_path / "run", "--device", "cpu", "--tokens", 100)
    assert result.exit_code == 0, result.output
    assert "2 steps, 100 tokens of validation text, 4 blocks of 8 tokens a query, queries from 50 on" in result.output
    saved, corpus = load_checkpoint(tmp_path / "run"), read_corpus([text])
    for layer, blocks in enumerate(saved.build_model().selected_blocks(corpus.validation[None, :100].long())):
        overlap, union = selection_figures(blocks, 50)
        assert re.search(rf"{layer} .* {overlap:.2f} .* {union:.1f} ", result.output), (overlap, union)


@pytest.mark.parametrize("tokens", [7, 10**9])
def test_selections_in_more_text_than_there_is_are_refused(text, tmp_path, tokens):
    train(text, tmp_path / "run", "--steps", 2)
    refused(nsa_command("bench", "selections", "--checkpoint", tmp_path / "run", "--tokens", tokens), "tokens must be 8 to")


def test_selections_need_a_sparse_model(text, tmp_path):
    train(text, tmp_path / "run", "--attention", "window", "--steps", 2)
    refused(nsa_command("bench", "selections", "--checkpoint", tmp_path / "run", "--tokens", 100), "attention must be 'nsa'")


def test_a_finished_run_resumes_to_nothing_new(text, tmp_path):
    train(text, tmp_path / "run", "--steps", 2)
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    result = nsa_command("train", "--resume", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "already finished" in result.output
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_resuming_with_another_setting_names_it(text, tmp_path):
    train(text, tmp_path / "run", "--steps", 2)
    resume = ("train", "--resume", tmp_path / "run", "--device", "cpu")
    refused(nsa_command(*resume, "--width", 64), "hidden_size is 32 in the checkpoint, got 64")
    refused(nsa_command(*resume, "--attention", "full"), "attention is 'nsa' in the checkpoint, got 'full'")
    refused(nsa_command(*resume, "--out", tmp_path / "x"), "out must not be given with resume")
    assert nsa_command(*resume, "--width", 32, "--steps", 2).exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "huge"], "preset must be one of micro, tiny, small, got 'huge'"),
        (["--attention", "linear"], "attention must be one of nsa, full, window, got 'linear'"),
        (["--width", "30"], "width must be a positive multiple of twice the heads, 4, got 30"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--lr", "-1"], "learning_rate must be positive and finite, got -1.0"),
        (["--device", "abacus"], "device must be one that torch can use here, got 'abacus'"),
        (["--data", "/nowhere"], "data must be files and folders that exist, got '/nowhere'"),
        (["--resume", "/nowhere"], "there is no /nowhere"),
    ],
)
def test_train_refuses_in_one_line_and_leaves_nothing(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [] if "--preset" in options else ["--preset", "micro"]
    refused(nsa_command("train", "--device", "cpu", *base, *options), words)
    assert list(tmp_path.iterdir()) == []


def test_a_short_corpus_and_a_taken_folder_are_refused(text, tmp_path):
    short = train(text, tmp_path / "run", "--context", 5000)
    assert short.exit_code == 1
    assert "needs at least 5,001" in short.stderr
    assert not (tmp_path / "run").exists()
    assert train(text, tmp_path / "run", "--steps", 1).exit_code == 0
    refused(train(text, tmp_path / "run"), "out must be a folder without a run")


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
def test_generate_continues_any_checkpoint_the_same_each_time(attention, text, tmp_path):
    train(text, tmp_path / "run", "--steps", 2, "--attention", attention)
    command = ("generate", "--checkpoint", tmp_path / "run", "--device", "cpu", "--prompt", "def ", "--max-new-tokens", 9)
    first, again = nsa_command(*command), nsa_command(*command)
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout
    assert first.stdout.startswith("def ")
    assert "tokens/s" in first.stderr
    drawn = [nsa_command(*command, "--temperature", 1, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_continues_several_prompts_as_if_each_were_alone(text, tmp_path):
    train(text, tmp_path / "run", "--steps", 2)
    command = ("generate", "--checkpoint", tmp_path / "run", "--device", "cpu", "--max-new-tokens", 9)
    prompts = ["def ", "import torch, ", "x"]
    alone = [nsa_command(*command, "--prompt", prompt).stdout.removesuffix("\n") for prompt in prompts]
    together = nsa_command(*command, *(word for prompt in prompts for word in ("--prompt", prompt)))
    assert together.exit_code == 0, together.output
    assert together.stdout == "\n\n".join(f"[{i}] {text}" for i, text in enumerate(alone, 1)) + "\n"
    assert "3 prompts of 1 to 14 tokens" in together.stderr


def test_generate_refuses_in_one_line(text, tmp_path):
    train(text, tmp_path / "run", "--steps", 1)
    command = ("generate", "--device", "cpu", "--checkpoint")
    refused(nsa_command(*command, tmp_path / "nowhere", "--prompt", "x"), "checkpoint must be a run's folder")
    refused(nsa_command(*command, tmp_path / "run", "--prompt", ""), "prompt must hold at least one byte")
    refused(nsa_command(*command, tmp_path / "run", "--prompt", "x", "--temperature", -1), "temperature must be at least 0")
    refused(
        nsa_command(*command, tmp_path / "run", "--prompt", "x", "--max-new-tokens", -1), "max_new_tokens must be at least 0"
    )


def test_importing_nsa_and_its_model_takes_none_of_the_command_line():
    code = (
        "import sys, nsa, nsa.models; nsa.nsa_attention; "
        "print([m for m in ('typer', 'rich', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": _source()}
    )
    assert found.stdout.strip() == "[]"


def _source():
    from pathlib import Path

    return str(Path(nsa.__file__).parents[1])
