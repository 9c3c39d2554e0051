"""Whatever happened to a cache before, the next tokens attend to exactly what each sequence still holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import nsa
from tests.streams import LAYOUTS, Stream, Tokens

BATCH, ROOM, MAX_CROP = 3, 72, 6
NUMBER = st.integers(0, BATCH - 1)
CHUNK = st.integers(1, 9) | st.integers(15, 32)  # tokens; the second are more than a step, some more than the ring holds
LOAD = settings(
    max_examples=130, stateful_step_count=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class CacheHistories(RuleBasedStateMachine):
    """``held`` is the model: plain lists of the tokens of each sequence."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.stream = Stream(**LAYOUTS[layout])
        self.drawn = 0

    @initialize()
    def start(self) -> None:
        self.cache = self.stream.cache(BATCH, ROOM, max_crop=MAX_CROP)
        self.held = [Tokens.draw(1, 0) for _ in range(BATCH)]
        self.longest = [0] * BATCH

    def draw(self, size: int) -> Tokens:
        self.drawn += 1
        new = Tokens.draw(BATCH, size, self.drawn)
        self.held = [held.then(new[b : b + 1]) for b, held in enumerate(self.held)]
        self.longest = [max(n, len(held)) for n, held in zip(self.longest, self.held)]
        return new

    @property
    def room(self) -> int:
        return ROOM - max(map(len, self.held))

    @precondition(lambda self: self.room)
    @rule(size=CHUNK, queries=CHUNK)
    def append(self, size: int, queries: int) -> None:
        size = min(size, self.room)
        self.stream.append(self.cache, self.draw(size))
        self.attend(min(size, queries))

    @precondition(lambda self: self.room)
    @rule(size=st.integers(1, 16), times=st.integers(1, 3))
    def replay_a_graph(self, size: int, times: int) -> None:
        size = min(size, self.room)
        for _ in range(min(times, self.room // size)):
            self.cache.reserve(size)
            self.stream.replay(self.cache, self.draw(size))
            self.cache.advance(size)
        self.attend(size)

    @precondition(lambda self: min(map(len, self.held)) > 0)
    @rule(queries=st.integers(1, 16))
    def attend(self, queries: int) -> None:
        queries = min(queries, *map(len, self.held))
        newest = Tokens.stacked([held[:, len(held) - queries :] for held in self.held]).tensors
        got, blocks = nsa.cached_attention(newest["q"], newest["gates"], self.cache, return_block_indices=True)
        for b, held in enumerate(self.held):
            want, wanted_blocks = self.stream.full_with_blocks(held)
            torch.testing.assert_close(got[b], want[0, len(held) - queries :], rtol=0, atol=1e-12)
            assert torch.equal(blocks[b], wanted_blocks[0, len(held) - queries :])

    @rule(back=st.lists(st.integers(0, MAX_CROP), min_size=BATCH, max_size=BATCH))
    def crop(self, back: list[int]) -> None:
        lengths = [max(len(held) - n, high - MAX_CROP, 0) for held, n, high in zip(self.held, back, self.longest)]
        self.cache.crop(lengths)
        self.held = [held[:, :n] for held, n in zip(self.held, lengths)]
        self.longest = [high if n else 0 for high, n in zip(self.longest, lengths)]

    @rule(number=NUMBER)
    def start_over(self, number: int) -> None:
        self.cache.crop([0 if b == number else len(held) for b, held in enumerate(self.held)])
        self.held[number], self.longest[number] = Tokens.draw(1, 0), 0

    @rule(index=st.lists(NUMBER, min_size=BATCH, max_size=BATCH))
    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(index)
        self.held, self.longest = [self.held[i] for i in index], [self.longest[i] for i in index]

    @rule(src=NUMBER, dst=NUMBER)
    def fork(self, src: int, dst: int) -> None:
        self.cache.fork(src, dst)
        self.held[dst], self.longest[dst] = self.held[src], self.longest[src]

    @rule(layout=st.sampled_from(list(LAYOUTS)))
    def move_to_another_cache(self, layout: str) -> None:
        self.stream = Stream(**LAYOUTS[layout])
        fresh = self.stream.cache(BATCH, ROOM, max_crop=MAX_CROP)
        fresh.load_state_dict(self.cache.state_dict())
        self.cache = fresh

    @invariant()
    def lengths_are_known(self) -> None:
        if hasattr(self, "held"):
            assert self.cache.lengths == tuple(map(len, self.held)) == tuple(self.cache.view().lengths.tolist())

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "held"):
            return
        table, pages = self.cache.view().table, self.cache.allocator
        pointers = table[table >= 0].tolist()
        assert all(pages.references(page) == pointers.count(page) for page in range(pages.num_pages))
        assert pages.num_free == pages.num_pages - len(set(pointers))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_history(layout: str) -> None:
    run_state_machine_as_test(lambda: CacheHistories(layout), settings=LOAD)
