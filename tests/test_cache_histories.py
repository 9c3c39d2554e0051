"""Whatever happened to a cache before, the next tokens attend to exactly what each sequence still holds."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import nsa
from tests.streams import Stream, Tokens

BATCH, ROOM, MAX_CROP = 3, 64, 6
NUMBER = st.integers(0, BATCH - 1)


class CacheHistories(RuleBasedStateMachine):
    """``held`` is the model: plain lists of the tokens of each sequence."""

    @initialize()
    def start(self) -> None:
        self.stream = Stream()
        self.cache = self.stream.cache(BATCH, ROOM, max_crop=MAX_CROP)
        self.held = [Tokens.draw(1, 0) for _ in range(BATCH)]
        self.longest = [0] * BATCH
        self.drawn = 0

    @rule(size=st.integers(1, 9), queries=st.integers(1, 9))
    @precondition(lambda self: max(map(len, self.held)) < ROOM)
    def append(self, size: int, queries: int) -> None:
        size = min(size, ROOM - max(map(len, self.held)))
        queries = min(size, queries)
        self.drawn += 1
        new = Tokens.draw(BATCH, size, self.drawn)
        self.stream.append(self.cache, new)
        self.held = [held.then(new[b : b + 1]) for b, held in enumerate(self.held)]
        self.longest = [max(n, len(held)) for n, held in zip(self.longest, self.held)]
        self.attend(queries)

    @precondition(lambda self: min(map(len, self.held)) > 0)
    @rule(queries=st.integers(1, 3))
    def attend(self, queries: int) -> None:
        queries = min(queries, *map(len, self.held))
        newest = Tokens.stacked([held[:, len(held) - queries :] for held in self.held]).tensors
        got = nsa.cached_attention(newest["q"], newest["gates"], self.cache)
        for b, held in enumerate(self.held):
            torch.testing.assert_close(got[b], self.stream.full(held)[0, len(held) - queries :], rtol=0, atol=1e-12)

    @rule(back=st.lists(st.integers(0, MAX_CROP), min_size=BATCH, max_size=BATCH))
    def crop(self, back: list[int]) -> None:
        lengths = [max(len(held) - n, high - MAX_CROP, 0) for held, n, high in zip(self.held, back, self.longest)]
        self.cache.crop(lengths)
        self.held = [held[:, :n] for held, n in zip(self.held, lengths)]
        self.longest = [high if n else 0 for high, n in zip(self.longest, lengths)]

    @rule(number=NUMBER)
    def start_over(self, number: int) -> None:
        self.cache.crop([0 if b == number else len(held) for b, held in enumerate(self.held)])
        self.held[number], self.longest[number] = self.held[number][:, :0], 0

    @rule(index=st.lists(NUMBER, min_size=BATCH, max_size=BATCH))
    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(index)
        self.held, self.longest = [self.held[i] for i in index], [self.longest[i] for i in index]

    @rule(src=NUMBER, dst=NUMBER)
    def fork(self, src: int, dst: int) -> None:
        self.cache.fork(src, dst)
        self.held[dst], self.longest[dst] = self.held[src], self.longest[src]

    @rule()
    def move_to_another_cache(self) -> None:
        fresh = self.stream.cache(BATCH, ROOM, max_crop=MAX_CROP)
        fresh.load_state_dict(self.cache.state_dict())
        self.cache = fresh

    @invariant()
    def lengths_are_known(self) -> None:
        if hasattr(self, "held"):
            assert self.cache.lengths == tuple(map(len, self.held))


CacheHistories.TestCase.settings = settings(
    max_examples=120, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestCacheHistories = CacheHistories.TestCase
