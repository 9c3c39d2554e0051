"""Histories that hit what a cache can get wrong: the ring's end, the tail of a block, the end of a page, a shared page.

Each test first asserts that it hits what it says.
"""

from __future__ import annotations

import pytest
import torch

import nsa
from nsa.cache_store import STEP
from tests.streams import CFG, LAYOUTS, Stream, Tokens

EXACT = {"rtol": 0, "atol": 1e-12}
MAX_CROP = 6
RING = CFG.window_size + MAX_CROP + STEP - 1
TAIL = CFG.block_length - 1 + MAX_CROP + STEP
T = 64


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def stream(request: pytest.FixtureRequest) -> Stream:
    return Stream(**request.param)


def assert_next_is_right(stream: Stream, cache: nsa.NSACache, held: list[Tokens], size: int, seed: int) -> list[Tokens]:
    """Append ``size`` tokens, compare with each sequence's full forward, and return what the sequences hold then."""
    new = Tokens.draw(len(held), size, seed)
    got = stream.feed(cache, new)
    held = [s.then(new[b : b + 1]) for b, s in enumerate(held)]
    for b, s in enumerate(held):
        torch.testing.assert_close(got[b], stream.full(s)[0, len(s) - size :], **EXACT)
    return held


def test_the_rings_are_as_small_as_they_say(stream: Stream) -> None:
    cache = stream.cache(1, T, max_crop=MAX_CROP)
    state = cache.state_dict()
    assert state["k_win"].shape[1] == state["v_win"].shape[1] == RING
    assert state["k_tail"].shape[1] == state["v_tail"].shape[1] == TAIL


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_steps_pass_the_ends_of_rings_blocks_and_pages(stream: Stream, size: int) -> None:
    assert T > 2 * RING
    assert T > 2 * TAIL
    tokens, cache = Tokens.draw(1, T), stream.cache(1, T, max_crop=MAX_CROP)
    want, seen = stream.full(tokens), set()
    for start in range(0, T, size):
        new = tokens[:, start : start + size]
        torch.testing.assert_close(stream.feed(cache, new), want[:, start : start + size], **EXACT)
        ends = range(start, start + len(new))
        seen |= {"block"} & {"block" for t in ends if CFG.num_compressed_blocks(t + 1) > CFG.num_compressed_blocks(t)}
        seen |= {"ring" for t in ends if t and t % RING == 0} | {"tail" for t in ends if t and t % TAIL == 0}
        seen |= {"page" for t in ends if t and cache.page_size and t % cache.page_size == 0}
    assert seen == ({"block", "ring", "tail", "page"} if cache.page_size else {"block", "ring", "tail"})


def test_blocks_that_begin_in_one_page_and_end_in_the_next(stream: Stream) -> None:
    if cache_page := stream.options.get("page_size"):
        ends = [i * CFG.block_stride + CFG.block_length - 1 for i in range(CFG.num_compressed_blocks(T))]
        assert any(end // cache_page > (end - CFG.block_length + 1) // cache_page for end in ends)
    tokens, cache = Tokens.draw(2, T), stream.cache(2, T)
    stream.append(cache, tokens)
    k_cmp, v_cmp = cache.view().compressed()
    torch.testing.assert_close(k_cmp, stream.compress_k(tokens.tensors["k_cmp"]), **EXACT)
    torch.testing.assert_close(v_cmp, stream.compress_v(tokens.tensors["v_cmp"]), **EXACT)


@pytest.mark.parametrize("back", range(1, MAX_CROP + 1))
@pytest.mark.parametrize("end", [RING + 3, TAIL + 2, 36, 49])
def test_a_crop_across_an_end_brings_the_old_tokens_back(stream: Stream, end: int, back: int) -> None:
    """Other tokens, written behind the cropped end, must not show: in the ring, in the tail of a block, in a page."""
    first, cache = Tokens.draw(2, end), stream.cache(2, T, max_crop=MAX_CROP)
    for start in range(0, end, 9):
        stream.append(cache, first[:, start : start + 9])
    cache.crop([end - back, end])
    held = [first[:1, : end - back], first[1:, :end]]
    for seed, size in enumerate([1, 3, 1], 1):
        held = assert_next_is_right(stream, cache, held, size, seed)


@pytest.mark.parametrize("before", [0, 3, 40], ids=["empty", "less than a window", "more"])
@pytest.mark.parametrize("size", [STEP + 1, RING - 1, RING, RING + 1, 2 * RING])
def test_chunks_longer_than_a_step(stream: Stream, before: int, size: int) -> None:
    cache = stream.cache(2, 2 * T + 40, max_crop=MAX_CROP)
    held = [Tokens.draw(1, 0)] * 2
    if before:
        held = assert_next_is_right(stream, cache, held, before, 1)
    cache.crop([max(0, before - 2), before])  # sequences of different lengths
    held = [held[0][:, : max(0, before - 2)], held[1]]
    held = assert_next_is_right(stream, cache, held, size, 2)
    for seed, steps in enumerate([1, 2, STEP + 1, 1], 3):
        held = assert_next_is_right(stream, cache, held, steps, seed)


def test_queries_whose_windows_are_gone_are_refused(stream: Stream) -> None:
    cache, tokens = stream.cache(1, T), Tokens.draw(1, 40)
    for t in range(40):
        stream.append(cache, tokens[:, t : t + 1])
    want, x = stream.full(tokens), tokens[:, -STEP:].tensors
    torch.testing.assert_close(nsa.cached_attention(x["q"], x["gates"], cache), want[:, -STEP:], **EXACT)
    x = tokens[:, -STEP - 3 :].tensors
    with pytest.raises(ValueError, match="q must be at most the 16 tokens whose windows the cache still holds, got 19"):
        nsa.cached_attention(x["q"], x["gates"], cache)


def test_what_a_chunk_held_is_gone_after_a_change(stream: Stream) -> None:
    tokens, cache = Tokens.draw(2, 40), stream.cache(2, T, max_crop=MAX_CROP)
    stream.append(cache, tokens)
    x = tokens[:, -30:].tensors
    torch.testing.assert_close(nsa.cached_attention(x["q"], x["gates"], cache), stream.full(tokens)[:, -30:], **EXACT)
    cache.reorder([1, 0])
    with pytest.raises(ValueError, match="q must be at most the 22 tokens whose windows the cache still holds, got 30"):
        nsa.cached_attention(x["q"], x["gates"], cache)


@pytest.mark.parametrize("shared", [8, 11, 12, 24, 25, 31])
def test_forks_go_their_own_ways(stream: Stream, shared: int) -> None:
    """From the middle of a page and from its end; the ring, the tail and the part-filled page are their own afterwards."""
    cache, first = stream.cache(3, T, max_crop=MAX_CROP), Tokens.draw(3, shared)
    stream.append(cache, first)
    cache.fork(0, 2)
    cache.fork(0, 1)
    held = [first[:1]] * 3
    for seed, size in enumerate([1, 5, 20], 1):
        held = assert_next_is_right(stream, cache, held, size, seed)
    cache.crop([len(held[0]) - 5, len(held[0]), len(held[0]) - 2])
    held = [held[0][:, :-5], held[1], held[2][:, :-2]]
    assert_next_is_right(stream, cache, held, 6, 9)


def test_a_wrong_compressor_is_told(stream: Stream) -> None:
    cache, new = stream.cache(1, T), Tokens.draw(1, 9)
    keys = [new.tensors[name] for name in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")]
    with pytest.raises(ValueError, match=r"compress_v's blocks must have shape \[1, 3, 2, 3\], got \[1, 3, 2, 2\]"):
        cache.append(*keys, stream.compress_k, lambda x: stream.compress_v(x)[..., :2])
    assert cache.lengths == (0,)
    torch.testing.assert_close(stream.feed(cache, new), stream.full(new), **EXACT)
