"""Appending as a replayed graph does, its rows computed on the device, while the host learns nothing."""

from __future__ import annotations

import pytest
import torch

import nsa
from tests.streams import LAYOUTS, Stream, Tokens

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def stream(request: pytest.FixtureRequest) -> Stream:
    return Stream(**request.param)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_replays_write_where_appends_do(stream: Stream, size: int) -> None:
    cache, tokens = stream.cache(2, 70), Tokens.draw(2, 70)
    for start in range(0, 70 // size * size, size):
        new = tokens[:, start : start + size]
        cache.reserve(size)
        stream.replay(cache, new)
        assert cache.lengths == (start,) * 2
        cache.advance(size)
        x = new.tensors
        want = stream.full(tokens[:, : start + size])[:, start:]
        torch.testing.assert_close(nsa.cached_attention(x["q"], x["gates"], cache), want, **EXACT)


def test_a_replay_without_room_writes_nothing_and_the_next_call_tells(stream: Stream) -> None:
    cache, tokens = stream.cache(2, 20), Tokens.draw(2, 20)
    stream.append(cache, tokens[:, :19])
    before = cache.state_dict()
    stream.replay(cache, Tokens.draw(2, 2, seed=1))
    with pytest.raises(RuntimeError, match=r"a replayed graph had no room or no page and wrote nothing; .*\[19, 19\]"):
        cache.crop(0)
    assert cache.lengths == (19, 19)
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())
    torch.testing.assert_close(stream.feed(cache, tokens[:, 19:]), stream.full(tokens)[:, 19:], **EXACT)


@pytest.mark.parametrize("page_size", [4, 12])
def test_a_replay_without_a_page_leaves_the_other_sequences_alone(page_size: int) -> None:
    stream = Stream(page_size=page_size)
    cache, tokens = stream.cache(2, 48), Tokens.draw(2, 12)
    stream.append(cache, tokens)
    cache.crop([12, 0])
    before = cache.state_dict()
    stream.replay(cache, Tokens.draw(2, 1, seed=1))  # neither has a page for its next token
    with pytest.raises(RuntimeError, match=r"wrote nothing; the lengths are \[12, 0\]"):
        cache.state_dict()
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())


def test_replays_that_nobody_told_of_are_noticed(stream: Stream) -> None:
    cache, tokens = stream.cache(1, 20), Tokens.draw(1, 9)
    cache.reserve(9)
    stream.replay(cache, tokens)
    with pytest.raises(RuntimeError, match=r"appended tokens that advance\(\) was not told of: \[9\] after \[0\]"):
        stream.append(cache, tokens)
    assert cache.lengths == (9,)  # known from then on
    new = Tokens.draw(1, 1, seed=1)
    torch.testing.assert_close(stream.feed(cache, new), stream.full(tokens.then(new))[:, -1:], **EXACT)


def test_a_dry_run_writes_nothing(stream: Stream) -> None:
    cache, tokens = stream.cache(2, 20), Tokens.draw(2, 20)
    stream.append(cache, tokens[:, :17])
    before = cache.state_dict()
    with cache.dry_run():
        stream.append(cache, Tokens.draw(2, 3, seed=1))
        assert cache.lengths == (17, 17)
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())
    torch.testing.assert_close(stream.feed(cache, tokens[:, 17:]), stream.full(tokens)[:, 17:], **EXACT)


def test_only_caches_on_a_gpu_can_be_captured(stream: Stream) -> None:
    with pytest.raises(ValueError, match="caches must be on a GPU, and such that the kernels take them, got cpu"):
        nsa.DecodeGraph(lambda: None, [stream.cache(1, 8)])
    with pytest.raises(ValueError, match="caches must be at least one"):
        nsa.DecodeGraph(lambda: None, [])


def test_a_graph_takes_a_step(stream: Stream) -> None:
    with pytest.raises(ValueError, match="T_new must be at most 16 inside a graph, got 17"):
        stream.replay(stream.cache(1, 40), Tokens.draw(1, 17))


def test_reserve_checks_the_room(stream: Stream) -> None:
    cache = stream.cache(1, 20)
    with pytest.raises(ValueError, match=r"the cache has room for max_seq_len=20 tokens, got 0 \+ 21"):
        cache.reserve(21)
