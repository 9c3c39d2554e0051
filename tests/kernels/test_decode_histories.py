"""Whatever happened to a cache before, a step of the kernels over it gives what the full forward of its tokens does."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import nsa
from nsa import decode_tuning
from nsa.kernels.cuda import decode_step
from tests import naive
from tests.kernels.test_decode import MAX_CROP, NAMES, PAGES, Filled
from tests.kernels.test_steps import check_selection
from tests.steps import steps
from tests.tolerance import assert_within_2x

BATCH = 3
NUMBER = st.integers(0, BATCH - 1)
FEW = st.integers(1, 16)
LOAD = {
    "cuda": settings(max_examples=20, stateful_step_count=14),
    "cpu": settings(max_examples=3, stateful_step_count=4),  # the interpreter is slow
}
Given = tuple[nsa.NSAConfig, torch.dtype, int] | None
# A window that wraps soon, in blocks that the kernel for large batches takes.
AT_ONCE = nsa.NSAConfig(head_dim=64, num_heads=24, num_kv_heads=2, window_size=100, num_selected_blocks=5)


class DecodeHistories(RuleBasedStateMachine):
    """``filled.held`` is the model: plain tensors of the tokens of each sequence."""

    def __init__(self, number: int, device: str, given: Given) -> None:
        super().__init__()
        self.number, self.device, self.given = number, device, given

    @initialize()
    def start(self) -> None:
        self.filled = Filled(self.number, self.device, kernels=True, batch=BATCH, given=self.given)
        self.cache, self.longest = self.filled.cache, [0] * BATCH
        self.cache.crop(0)
        self.filled.held = [{name: x[:0] for name, x in held.items()} for held in self.filled.held]

    @property
    def room(self) -> int:
        return self.cache.max_seq_len - max(self.cache.lengths)

    def appended(self) -> None:
        self.longest = [max(before, now) for before, now in zip(self.longest, self.cache.lengths)]

    @precondition(lambda self: self.room)
    @rule(size=FEW | st.integers(17, 300), queries=FEW)
    def append(self, size: int, queries: int) -> None:
        self.filled.append(min(size, self.room))
        self.appended()
        self.attend(queries)

    @precondition(lambda self: self.room)
    @rule(size=FEW, queries=FEW)
    def replay(self, size: int, queries: int) -> None:
        self.filled.replay(min(size, self.room))
        self.appended()
        self.attend(queries)

    @precondition(lambda self: min(self.cache.lengths) > 0)
    @rule(queries=FEW)
    def attend(self, queries: int) -> None:
        filled = self.filled
        most = 1 if self.given else 16 if self.device == "cuda" else 2
        queries = min(queries, most, *self.cache.lengths)
        self.compressed_blocks_are_means()
        case, low = filled.case(queries), filled.inputs(queries)
        exact, plain = low.to(torch.float64), low.to(filled.dtype)
        got, indices = nsa.cached_attention(low.q, low.gates, self.cache, return_block_indices=True, backend="triton")
        check_selection(case, exact, indices)
        ref, base = steps(case, exact, indices), naive.nsa_steps(case, plain, indices)
        assert_within_2x(f"o of {case}", got, ref.o, base.o, filled.dtype)

    def compressed_blocks_are_means(self) -> None:
        cfg, rounding = self.filled.cfg, torch.finfo(self.filled.dtype).eps
        for name, rows in zip(NAMES[:2], self.cache.view().compressed()):
            for b, held in enumerate(self.filled.held):
                want = nsa.compress_blocks(held[name][None].double(), cfg, backend="reference")[0]
                torch.testing.assert_close(rows[b, : len(want)].double().cpu(), want, rtol=2 * rounding, atol=2 * rounding)

    @rule(back=st.lists(st.integers(0, MAX_CROP), min_size=BATCH, max_size=BATCH))
    def crop(self, back: list[int]) -> None:
        lengths = [max(now - n, high - MAX_CROP, 0) for now, n, high in zip(self.cache.lengths, back, self.longest)]
        self.cache.crop(lengths)
        self.filled.held = [{name: x[:n] for name, x in held.items()} for n, held in zip(lengths, self.filled.held)]
        self.longest = [high if n else 0 for high, n in zip(self.longest, lengths)]

    @rule(index=st.lists(NUMBER, min_size=BATCH, max_size=BATCH))
    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(index)
        self.filled.held, self.longest = [self.filled.held[i] for i in index], [self.longest[i] for i in index]

    @rule(src=NUMBER, dst=NUMBER)
    def fork(self, src: int, dst: int) -> None:
        self.cache.fork(src, dst)
        self.filled.held[dst], self.longest[dst] = self.filled.held[src], self.longest[src]


def run(number: int, device: str, given: Given) -> None:
    # What fails is told as it was found: to look for a shorter history takes too long.
    load = settings(
        LOAD[device], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    run_state_machine_as_test(lambda: DecodeHistories(number, device, given), settings=load)


@pytest.mark.parametrize("number", range(2 * len(PAGES)))
def test_any_history(device: str, number: int) -> None:
    if device == "cpu" and number >= len(PAGES):
        pytest.skip("the interpreter is slow: one history of each kind of pages")
    run(number, device, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_history_of_steps_in_one_kernel(device: str, dtype: torch.dtype) -> None:
    if device == "cpu":
        pytest.skip("only a GPU runs it")
    with (
        mock.patch.object(decode_tuning, "whole", return_value=True),
        mock.patch.object(decode_step, "decode_step", wraps=decode_step.decode_step) as called,
    ):
        run(0, device, (AT_ONCE, dtype, 1_500))
    assert called.called
