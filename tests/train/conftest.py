"""A corpus and a model small enough to train in a blink."""

import random

import pytest
import torch

from nsa.train import read_corpus
from nsa.train.presets import PRESETS


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text_folder(tmp_path):
    """Twelve files of made-up words."""
    folder, draw = tmp_path / "text", random.Random(0)
    folder.mkdir()
    words = ["sparse", "attention", "block", "query", "window", "gate", "\n"]
    for i in range(12):
        (folder / f"part{i:02}.txt").write_text(" ".join(draw.choice(words) for _ in range(300)), encoding="utf-8")
    return folder


@pytest.fixture
def corpus(text_folder):
    return read_corpus([text_folder])


@pytest.fixture
def micro():
    return PRESETS["micro"]
