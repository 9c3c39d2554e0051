"""Batches depend on seed and step alone."""

import torch

from nsa.train import TrainConfig
from nsa.train.batches import train_batch, validation_sequences

TEXT = torch.arange(200, dtype=torch.uint8)


def test_a_batch_is_a_function_of_seed_and_step():
    first = train_batch(TEXT, 1, 5, 4, 16)
    torch.manual_seed(99)
    assert torch.equal(train_batch(TEXT, 1, 5, 4, 16), first)
    assert not torch.equal(train_batch(TEXT, 1, 6, 4, 16), first)
    assert not torch.equal(train_batch(TEXT, 2, 5, 4, 16), first)
    assert (first.shape, first.dtype) == ((4, 17), torch.int64)
    assert torch.equal(first[:, 1:], first[:, :-1] + 1)  # consecutive bytes of the text


def test_every_stretch_of_the_text_can_be_drawn():
    starts = {int(row[0]) for step in range(300) for row in train_batch(TEXT[:20], 0, step, 4, 16)}
    assert starts == {0, 1, 2, 3}


def test_validation_is_spread_over_the_text_and_shrinks_with_it():
    spread = validation_sequences(TEXT, 4, 16)
    assert spread[:, 0].tolist() == [0, 61, 122, 183]
    assert spread[-1, -1] == 199
    assert validation_sequences(TEXT[:40], 4, 16).shape == (2, 17)
    assert validation_sequences(TEXT[:17], 4, 16).shape == (1, 17)


def test_the_learning_rate_warms_up_and_falls_to_its_end():
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [config.learning_rate_at(step) for step in range(110)]
    assert rates[:10] == [(i + 1) / 10 for i in range(10)]
    assert rates[10] == 1.0
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert abs(rates[-1] - 0.1) < 1e-12
