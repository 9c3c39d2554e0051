"""Checkpoint files: whole or not at all, and refused where they don't fit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa.train import load_checkpoint, start_run, train
from nsa.train.atomic import replacing
from nsa.train.checkpoint import FILE_NAME, FORMAT


@pytest.fixture
def run(corpus, micro, tmp_path):
    run = start_run(tmp_path / "run", micro.model, replace(micro.train, steps=2), corpus, data=("a", "b"))
    train(run)
    return run


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_gives_back_what_was_saved(run):
    saved = load_checkpoint(run.folder)
    assert (saved.model, saved.train, saved.step, saved.data) == (run.model.cfg, run.config, 2, ("a", "b"))
    assert saved.fingerprint == run.corpus.fingerprint
    built = saved.build_model()
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), run.model.parameters()))
    assert load_checkpoint(run.folder / FILE_NAME).step == 2
    assert names(run.folder) == [FILE_NAME, "metrics.jsonl"]


@pytest.mark.parametrize("when", ["while writing", "before renaming"])
def test_a_save_that_fails_midway_keeps_the_old_checkpoint(when, run, monkeypatch):
    before = (run.folder / FILE_NAME).read_bytes()

    def fail(*args, **kwargs):
        if when == "while writing":
            args[1].write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(*(("safetensors.torch.save_file", fail) if when == "while writing" else ("os.replace", fail)))
    run.step = 3
    with pytest.raises(OSError, match="no space left"):
        run.save()
    assert (run.folder / FILE_NAME).read_bytes() == before
    assert names(run.folder) == [FILE_NAME, "metrics.jsonl"]


def test_replacing_survives_an_interrupt(tmp_path):
    def write():
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == []


def test_another_configuration_is_refused_by_the_names_of_its_fields(run):
    saved = load_checkpoint(run.folder)
    saved.require(run.model.cfg, run.config)
    with pytest.raises(ValueError, match="hidden_size is 32 in the checkpoint, got 64"):
        saved.require(replace(run.model.cfg, hidden_size=64), run.config)
    with pytest.raises(
        ValueError, match=r"nsa\.window_size is 8 in the checkpoint, got 16; steps is 2 in the checkpoint, got 9"
    ):
        saved.require(replace(run.model.cfg, nsa=replace(run.model.cfg.nsa, window_size=16)), replace(run.config, steps=9))


def resave(run, change, metadata=None):
    from safetensors import safe_open

    file = run.folder / FILE_NAME
    with safe_open(file, "pt") as opened:
        kept = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, kept if metadata is None else metadata)


def test_weights_of_another_shape_are_refused_by_name(run):
    resave(run, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ValueError, match=r"weight norm.weight must be \[32\] for its configuration, got \[31\]"):
        load_checkpoint(run.folder).build_model()


def test_missing_and_foreign_weights_are_refused_by_name(run):
    resave(run, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"norm.weight is missing"):
        load_checkpoint(run.folder).build_model()
    resave(run, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32), "model.extra": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"extra is not in the model"):
        load_checkpoint(run.folder).build_model()


def test_what_is_no_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no"):
        load_checkpoint(tmp_path)
    resave(run, lambda tensors: None, metadata={})
    with pytest.raises(ValueError, match=f"must be a checkpoint of format '{FORMAT}', got None"):
        load_checkpoint(run.folder)
    file = run.folder / FILE_NAME
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_checkpoint(run.folder)
