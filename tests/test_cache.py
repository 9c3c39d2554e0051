"""Decoding through a cache gives, token by token, what the full forward gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import nsa
from tests.streams import CFG, KEYS_VALUES, LAYOUTS, Stream, Tokens

T = 43
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def stream(request: pytest.FixtureRequest) -> Stream:
    return Stream(**request.param)


@pytest.mark.parametrize(
    "chunks",
    [[1] * T, [T], [7] * 6 + [1], [20, 1, 1, 1, 13, 2, 5], [3, 1, 39]],
    ids=["decode", "prefill", "sevens", "mixed", "late"],
)
@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_and_chunked_prefill(kind: str, chunks: list[int], layout: str) -> None:
    stream = Stream(kind=kind, **LAYOUTS[layout])
    tokens = Tokens.draw(2, T)
    want, cache = stream.full(tokens), stream.cache(2, T)
    for start, size in zip([sum(chunks[:i]) for i in range(len(chunks))], chunks):
        new = tokens[:, start : start + size]
        torch.testing.assert_close(stream.feed(cache, new), want[:, start : start + size], **EXACT)
        assert cache.lengths == (start + size,) * 2


def test_the_newest_queries_may_be_fewer_than_were_appended(stream: Stream) -> None:
    tokens, cache = Tokens.draw(2, T), stream.cache(2, T)
    stream.append(cache, tokens)
    last = tokens[:, -3:].tensors
    torch.testing.assert_close(nsa.cached_attention(last["q"], last["gates"], cache), stream.full(tokens)[:, -3:], **EXACT)


def test_block_indices_come_back(stream: Stream) -> None:
    tokens, cache = Tokens.draw(1, T), stream.cache(1, 2 * T)
    o = stream.feed(cache, tokens)
    x = tokens[:, -1:].tensors
    last, indices = nsa.cached_attention(x["q"], x["gates"], cache, return_block_indices=True)
    torch.testing.assert_close(last, o[:, -1:], **EXACT)
    assert indices.shape == (1, 1, CFG.num_kv_heads, CFG.num_selected_blocks)


def test_low_precision() -> None:
    stream = Stream(dtype=torch.float32)
    tokens = Tokens.draw(2, T, dtype=torch.float32)
    want, cache = stream.full(tokens), stream.cache(2, T)
    got = torch.cat([stream.feed(cache, tokens[:, t : t + 1]) for t in range(T)], 1)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("options", [{}, {"shared_kv": True, "gate_input": "query"}, {"rope_theta": None}], ids=str)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_a_layer_with_its_cache(options: dict[str, object], dtype: torch.dtype, allowed: float) -> None:
    torch.manual_seed(1)
    layer = nsa.NativeSparseAttention(12, CFG, dtype=dtype, **options)
    x = torch.randn(2, T, 12, dtype=dtype)
    cache = layer.make_cache(2, T)
    with torch.no_grad():
        want, want_indices = layer(x, return_block_indices=True)
        parts = [layer(x[:, a:b], cache=cache, return_block_indices=True) for a, b in [(0, 19), (19, 20), (20, 21), (21, T)]]
    got, indices = (torch.cat(p, 1) for p in zip(*parts))
    assert (got - want).abs().max() <= allowed * max(1, float(want.abs().max()))
    if dtype == torch.float64:
        assert torch.equal(indices, want_indices)


def test_a_cache_goes_with_no_packing() -> None:
    layer = nsa.NativeSparseAttention(12, CFG)
    with pytest.raises(ValueError, match="cu_seqlens must be None with a cache"):
        layer(torch.randn(1, 4, 12), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), cache=layer.make_cache(1, 8))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_tells_a_wrong_batch(batch: int) -> None:
    """Before anything is made of it: one sequence would be as many, once the cache's positions turn its heads."""
    layer = nsa.NativeSparseAttention(12, CFG)
    cache = layer.make_cache(2, 8)
    with pytest.raises(ValueError, match=rf"x must have shape \[2, T, 12\], got \[{batch}, 4, 12\]"), torch.no_grad():
        layer(torch.randn(batch, 4, 12), cache=cache)
    assert cache.lengths == (0, 0)


def test_crop_rolls_back_to_different_lengths(stream: Stream) -> None:
    first, cache = Tokens.draw(3, 30), stream.cache(3, 60, max_crop=12)
    stream.feed(cache, first)
    lengths = [30, 25, 18]
    cache.crop(lengths)
    assert cache.lengths == (30, 25, 18)
    held = [first[b : b + 1, :n] for b, n in enumerate(lengths)]
    for seed, size in [(1, 1), (2, 5), (3, 1)]:
        new = Tokens.draw(3, size, seed)
        got = stream.feed(cache, new)
        held = [s.then(new[b : b + 1]) for b, s in enumerate(held)]
        for b, s in enumerate(held):
            torch.testing.assert_close(got[b], stream.full(s)[0, -size:], **EXACT)


def test_crop_is_bounded_by_max_crop(stream: Stream) -> None:
    cache = stream.cache(2, 30, max_crop=3)
    stream.feed(cache, Tokens.draw(2, 20))
    with pytest.raises(ValueError, match="crop from 20 tokens to 16 needs max_crop >= 4, got 3"):
        cache.crop(16)
    cache.crop(18)
    with pytest.raises(ValueError, match="crop from 20 tokens to 16 needs max_crop >= 4, got 3"):
        cache.crop([17, 16])
    assert cache.lengths == (18, 18)
    with pytest.raises(ValueError, match="lengths must be between 0 and sequence 1's 18 tokens, got 19"):
        cache.crop([17, 19])
    with pytest.raises(ValueError, match="lengths must be between 0 and sequence 0's 18 tokens, got -1"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="lengths must be one number or 2, got 3"):
        cache.crop([1, 2, 3])
    cache.crop(0)  # a fresh start is always possible
    tokens = Tokens.draw(2, 9, seed=5)
    torch.testing.assert_close(stream.feed(cache, tokens), stream.full(tokens), **EXACT)


def test_reorder_and_fork(stream: Stream) -> None:
    first, new = Tokens.draw(3, 21), Tokens.draw(3, 4, seed=1)
    cache = stream.cache(3, 40, max_crop=9)
    stream.feed(cache, first)
    cache.crop([21, 15, 12])
    held = [first[b : b + 1, :n] for b, n in enumerate([21, 15, 12])]
    cache.reorder(torch.tensor([2, 0, 0]))
    cache.fork(0, 2)
    held = [held[2], held[0], held[2]]
    assert cache.lengths == (12, 21, 12)
    got = stream.feed(cache, new)
    for b in range(3):
        torch.testing.assert_close(got[b], stream.full(held[b].then(new[b : b + 1]))[0, -4:], **EXACT)


def test_the_bound_of_crop_moves_with_the_sequence(stream: Stream) -> None:
    cache = stream.cache(2, 40, max_crop=4)
    stream.append(cache, Tokens.draw(2, 20))
    cache.crop([20, 0])
    stream.append(cache, Tokens.draw(2, 6))  # 26 and 6 tokens
    cache.fork(1, 0)
    cache.crop([2, 6])
    with pytest.raises(ValueError, match="crop from 6 tokens to 1 needs max_crop >= 5, got 4"):
        cache.crop([1, 6])
    cache.reorder([1, 0])
    assert cache.lengths == (6, 2)
    cache.crop([2, 2])


@pytest.mark.parametrize("index", [[0, 1], [0, 1, 3], [0, 1, -1], []], ids=str)
def test_reorder_checks_its_index(stream: Stream, index: list[int]) -> None:
    with pytest.raises(ValueError, match="index must hold 3 sequence numbers below 3, got"):
        stream.cache(3, 8).reorder(index)


@pytest.mark.parametrize(("src", "dst", "name"), [(3, 0, "src"), (-1, 0, "src"), (0, 3, "dst")])
def test_fork_checks_its_numbers(stream: Stream, src: int, dst: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a sequence number below 3, got"):
        stream.cache(3, 8).fork(src, dst)


def test_state_dict_round_trip(stream: Stream) -> None:
    first, new = Tokens.draw(2, 17), Tokens.draw(2, 3, seed=1)
    cache = stream.cache(2, 40, max_crop=5)
    stream.feed(cache, first)
    cache.crop([17, 14])
    state = cache.state_dict()
    want = stream.feed(cache, new)
    larger = stream.cache(2, 50, max_crop=5)
    stream.feed(larger, Tokens.draw(2, 44, seed=9))  # what it held before is gone
    larger.load_state_dict(state)
    assert larger.lengths == (17, 14)
    torch.testing.assert_close(stream.feed(larger, new), want, **EXACT)


def test_state_dict_is_a_copy(stream: Stream) -> None:
    cache = stream.cache(1, 20)
    stream.feed(cache, Tokens.draw(1, 9))
    state = cache.state_dict()
    before = {name: x.clone() for name, x in state.items()}
    cache.crop(0)
    stream.feed(cache, Tokens.draw(1, 9, seed=1))
    assert all(torch.equal(state[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("batch", "room", "cfg"),
    [(1, 40, CFG), (2, 16, CFG), (2, 40, nsa.NSAConfig(4, 6, 2)), (2, 40, nsa.NSAConfig(4, 6, 3, 3))],
    ids=["batch", "room", "value_dim", "heads"],
)
def test_a_state_of_another_shape_is_refused(stream: Stream, batch: int, room: int, cfg: nsa.NSAConfig) -> None:
    cache = stream.cache(2, 40)
    stream.feed(cache, Tokens.draw(2, 17))
    other = nsa.NSACache(cfg, batch, room, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state\['.*'\] must have shape \[.*\], got \[|at most max_seq_len=16 tokens, got 17"):
        other.load_state_dict(cache.state_dict())
    assert set(other.lengths) == {0}


def test_a_state_of_other_blocks_is_refused(stream: Stream) -> None:
    cache = stream.cache(2, 40)
    stream.feed(cache, Tokens.draw(2, 17))
    other = nsa.NSACache(replace(CFG, block_stride=1), 2, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state\['k_cmp'\] must have shape \[2, 14, 2, 4\], got \[2, 7, 2, 4\]"):
        other.load_state_dict(cache.state_dict())


def test_a_state_with_a_missing_part_is_refused(stream: Stream) -> None:
    state = stream.cache(2, 40).state_dict()
    del state["k_slc"], state["lengths"]
    with pytest.raises(ValueError, match="state must hold k_slc, lengths"):
        stream.cache(2, 40).load_state_dict(state)


def test_running_out_of_room_writes_nothing(stream: Stream) -> None:
    tokens, cache = Tokens.draw(2, 20), stream.cache(2, 20)
    stream.feed(cache, tokens[:, :18])
    before = cache.state_dict()
    with pytest.raises(ValueError, match=r"the cache has room for max_seq_len=20 tokens, got 18 \+ 3"):
        stream.feed(cache, Tokens.draw(2, 3, seed=2))
    assert cache.lengths == (18, 18)
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())
    torch.testing.assert_close(stream.feed(cache, tokens[:, 18:]), stream.full(tokens)[:, 18:], **EXACT)


@pytest.mark.parametrize("name", KEYS_VALUES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:1], ValueError, r"must have shape \[2, .*\], got \[1, 3, 2, .\]"),
        (lambda x: x[..., :1], ValueError, r"must have shape \[2, .*\], got \[2, 3, 2, 1\]"),
        (lambda x: x.float(), TypeError, r"must have the cache's dtype torch\.float64, got torch\.float32"),
        (lambda x: x.long(), TypeError, r"must be fp16, bf16, fp32 or fp64, got torch\.int64"),
        (lambda x: x.to("meta"), ValueError, "must be on the cache's device cpu, got meta"),
        (lambda x: None, TypeError, r"must be a torch\.Tensor, got NoneType"),
    ],
    ids=["batch", "dim", "dtype", "integer", "device", "type"],
)
def test_a_wrong_tensor_writes_nothing(
    stream: Stream, name: str, change: Callable[[torch.Tensor], object], error: type[Exception], message: str
) -> None:
    cache, new = stream.cache(2, 20), Tokens.draw(2, 3)
    new.tensors[name] = change(new.tensors[name])
    with pytest.raises(error, match=f"{name} {message}"):
        stream.append(cache, new)
    assert cache.lengths == (0, 0)


def test_queries_are_checked(stream: Stream) -> None:
    cache, new = stream.cache(2, 20), Tokens.draw(2, 3)
    stream.append(cache, new)
    q, gates = new.tensors["q"], new.tensors["gates"]
    with pytest.raises(ValueError, match="q must have the cache's batch size 2, got 1"):
        nsa.cached_attention(q[:1], gates[:1], cache)
    with pytest.raises(ValueError, match="q must be at most the 3 tokens that were appended, got 6"):
        nsa.cached_attention(torch.cat([q, q], 1), torch.cat([gates, gates], 1), cache)
    with pytest.raises(TypeError, match=r"cache must be an nsa\.NSACache, got NoneType"):
        nsa.cached_attention(q, gates, None)
    with pytest.raises(TypeError, match=r"k_cmp must have q's dtype torch\.float32, got torch\.float64"):
        nsa.cached_attention(q.float(), gates, cache)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((CFG, 0, 4), {}, ValueError, "batch_size and max_seq_len must be positive, got 0 and 4"),
        ((CFG, 1, 0), {}, ValueError, "batch_size and max_seq_len must be positive, got 1 and 0"),
        ((CFG, 1, 4), {"max_crop": -1}, ValueError, "max_crop must be at least 0, got -1"),
        ((CFG, 1, 4), {"page_size": 0}, ValueError, "page_size must be a multiple of selection_block_size=4, got 0"),
        ((CFG, 1, 4), {"page_size": 10}, ValueError, "page_size must be a multiple of selection_block_size=4, got 10"),
        ((CFG, 1, 4), {"allocator": nsa.PageAllocator(3)}, ValueError, "allocator must be None without page_size"),
        ((None, 1, 4), {}, TypeError, r"cfg must be an nsa\.NSAConfig, got NoneType"),
    ],
    ids=range(7),
)
def test_what_a_cache_cannot_be(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nsa.NSACache(*arguments, **options)
