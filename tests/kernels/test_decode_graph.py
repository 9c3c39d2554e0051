"""A captured step, replayed while sequences grow, gives what steps without a graph give. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa
from nsa import decode_tuning
from nsa.models import LanguageModel, LMConfig

CFG = nsa.NSAConfig(
    head_dim=64, num_heads=8, num_kv_heads=2, block_length=16, block_stride=8, selection_block_size=32, num_selected_blocks=5,
    window_size=40,
)  # fmt: skip
NAMES = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")


@pytest.fixture(autouse=True)
def _gpu_only(device: str) -> None:
    if device == "cpu":
        pytest.skip("the interpreter has no graphs")


class Step:
    """One layer's step on tensors that stay where they are."""

    def __init__(self, batch: int, count: int, kind: str, device: str) -> None:
        make = lambda heads: torch.zeros(batch, count, heads, 64, dtype=torch.float16, device=device)
        self.new = {name: make(CFG.num_kv_heads) for name in NAMES}
        self.q, self.gates = make(CFG.num_heads), make(CFG.num_heads)[..., :3].contiguous()
        torch.manual_seed(3)
        self.compress = [nsa.BlockCompressor(64, CFG, kind, dtype=torch.float16, device=device) for _ in range(2)]

    def draw(self, rng: torch.Generator) -> None:
        for x in (*self.new.values(), self.q, self.gates):
            x.copy_(torch.randn(x.shape, generator=rng))

    def __call__(self, cache: nsa.NSACache) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            cache.append(*self.new.values(), *self.compress)
        return nsa.cached_attention(self.q, self.gates, cache, return_block_indices=True)


@pytest.mark.parametrize("kind", ["mean", "mlp"])
@pytest.mark.parametrize("page_size", [None, 32, 96])
@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("slices", [1, 2])
def test_replays_give_what_steps_give(
    device: str, slices: int, count: int, page_size: int | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_tuning, "slices", lambda *about: slices)
    make = lambda: nsa.NSACache(CFG, 3, 500, dtype=torch.float16, device=device, page_size=page_size, max_crop=20)
    captured, plain, step = make(), make(), Step(3, count, kind, device)
    graph = nsa.DecodeGraph(lambda: step(captured), [captured], count)
    assert captured.lengths == (0, 0, 0)
    rng = torch.Generator().manual_seed(count)
    for turn in range(300 // count):
        step.draw(rng)
        got, blocks = graph.replay()
        want, wanted_blocks = step(plain)
        if kind == "mean":
            assert torch.equal(got, want)
            assert torch.equal(blocks, wanted_blocks)
        else:  # a graph compresses blocks that don't complete too: matrix products of another size
            torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3)
        if turn % 20 == 7:
            for cache in (captured, plain):
                cache.crop([n - i for i, n in enumerate(cache.lengths)])
                cache.reorder([1, 2, 0])
                cache.fork(0, 2)
    assert captured.lengths == plain.lengths


def test_a_replay_without_room_is_refused_before_it_writes(device: str) -> None:
    cache, step = nsa.NSACache(CFG, 1, 20, dtype=torch.float16, device=device), Step(1, 8, "mean", device)
    graph = nsa.DecodeGraph(lambda: step(cache), [cache], 8)
    graph.replay()
    graph.replay()
    with pytest.raises(ValueError, match=r"the cache has room for max_seq_len=20 tokens, got 16 \+ 8"):
        graph.replay()
    assert cache.lengths == (16,)


def test_a_raw_replay_without_room_raises_the_flag(device: str) -> None:
    cache, step = nsa.NSACache(CFG, 1, 20, dtype=torch.float16, device=device), Step(1, 8, "mean", device)
    graph = nsa.DecodeGraph(lambda: step(cache), [cache], 8)
    for _ in range(2):
        graph.replay()
    before = {name: x.clone() for name, x in cache.state_dict().items()}
    graph._graph.replay()
    with pytest.raises(RuntimeError, match="a replayed graph had no room or no page and wrote nothing"):
        cache.crop(16)
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())


def test_a_model_in_one_graph(device: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(CFG, hidden_size=64, num_layers=2)).to(device).eval()
    prompt = torch.randint(256, (2, 70), device=device)
    with torch.no_grad():
        captured, plain = model.make_caches(2, 200), model.make_caches(2, 200)
        tokens = torch.zeros(2, 1, dtype=torch.long, device=device)
        graph = nsa.DecodeGraph(lambda: model(tokens, captured), captured)
        for caches in (captured, plain):
            newest = model(prompt, caches)[:, -1:].argmax(-1)
        for _ in range(60):
            tokens.copy_(newest)
            want = model(newest, plain)
            got = graph.replay()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            newest = want[:, -1:].argmax(-1)
