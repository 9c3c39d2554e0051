"""Which queries selected a block, chunk by chunk; and on a GPU the gradients that Hopper makes of it beside its twin's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import nsa
from nsa import ops, tuning
from nsa.kernels import hopper
from nsa.kernels.hopper import selected_dkv as kernels
from nsa.kernels.triton.chunked_lists import chunked_lists
from nsa.kernels.triton.inverse import NOTHING, selectors
from nsa.kernels.triton.sequence import spans
from nsa.layout import SeqInfo
from nsa.ops.steps import selected_backward_op
from tests.cases import Case
from tests.kernels.draws import guarded_inputs

LAYOUTS = {
    "plain": ((1, 300), None, 300),
    "batch": ((3, 70), None, 70),
    "a chunk": ((2, 70), None, 205),
    "packed": ((1, 300), [0, 64, 64, 207, 300], 300),
}


@pytest.mark.parametrize(("chunk", "split"), [(64, 9), (100, 1000), (1024, 7)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_pair_once_and_in_its_turn(device: str, name: str, chunk: int, split: int) -> None:
    (batch, rows), ends, keys = LAYOUTS[name]
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)
    info = SeqInfo(batch, rows, keys) if ends is None else SeqInfo(1, 0, 0, offsets, offsets)
    where = spans(rows, keys, info, 1, 1)
    draws = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, keys // 16, (batch, rows, 2, 3), generator=draws, dtype=torch.int32).to(device)
    want = selectors(indices, where, 16)
    got = chunked_lists(indices, where, 16, chunk, split)
    pairs = want.group != NOTHING.value
    seen, upto, turns = torch.zeros_like(want.group), {}, []
    for group, start, stop in zip(got.group.tolist(), got.start.tolist(), got.stop.tolist()):
        if group == got.groups:
            continue
        assert 0 < stop - start <= split
        assert (want.group[start:stop] == group).all()
        assert upto.get(group, got.edges[group * got.chunks].item()) == start  # its turn comes after the one before it
        assert got.edges[group * got.chunks] <= start < stop <= got.edges[(group + 1) * got.chunks]
        upto[group] = stop
        seen[start:stop] += 1
        number = (got.rows[start:stop] // chunk).unique().tolist()
        assert len(number) == 1
        turns.append((group // got.num_blocks, number[0], group % got.num_blocks))
    assert torch.equal(seen == 1, pairs)
    assert turns == sorted(turns)


def config(group: int, dim: int, value_dim: int) -> nsa.NSAConfig:
    return nsa.NSAConfig(head_dim=dim, value_dim=value_dim, num_heads=2 * group, num_kv_heads=2)


CASES = {
    "plain": (("plain", (403,), (403,)), {}),
    "a batch": (("plain", (161, 161), (161, 161)), {"extra_cmp": 2}),
    "a chunk": (("offset", (37, 37), (300, 300)), {}),
    "rows past a tensor": (("rows past a tensor", (40, 40), (77, 230)), {"extra_k": 9}),
    "packed": (("packed", (1, 0, 64, 17, 400), (1, 0, 64, 17, 400)), {"extra_q": 3, "extra_k": 20}),
    "packed chunks": (("packed offset", (0, 5, 33, 64), (17, 100, 200, 65)), {"extra_q": 1, "extra_k": 5}),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "dim", "value_dim", "dtype"),
    [
        (16, 128, 128, torch.bfloat16),
        (8, 64, 128, torch.float16),
        (32, 128, 64, torch.float16),
        (64, 64, 64, torch.bfloat16),
        (16, 192, 128, torch.bfloat16),
        (8, 192, 128, torch.float16),
        (64, 192, 128, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_beside_its_twin_in_many_chunks(name: str, group: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """Chunks and items so short that blocks have many of both."""
    (kind, lens_q, lens_k), extra = CASES[name]
    case = Case(1, kind, config(group, dim, value_dim), lens_q, lens_k, **extra)
    x = guarded_inputs(case, dtype, "cuda")
    rng = torch.Generator().manual_seed(0)
    shape = (*case.shape(lens_q, case.extra_q), 2, 9)
    indices = torch.randint(-2, max(lens_k) // 64 + 3, shape, generator=rng, dtype=torch.int32).cuda()
    o = nsa.selected_attention(x.q, x.k_slc, x.v_slc, indices, case.cfg, **case.lengths("cuda"), backend="triton")
    grad = torch.randn(o.shape, generator=rng).cuda().to(dtype)
    backward = lambda: torch.autograd.grad(o, (x.k_slc, x.v_slc), grad, retain_graph=True)
    calls: list[Any] = []
    counted = lambda *args: calls.append(args) or dkv(*args)
    dkv = kernels.selected_dkv
    tune = replace(tuning.hopper_selected_dkv(1, dim), chunk=48, split=10)
    with (
        mock.patch.object(tuning, "hopper_selected_dkv", return_value=tune),
        mock.patch.object(kernels, "selected_dkv", counted),
    ):
        got, again = backward(), backward()
    assert len(calls) == 2
    with mock.patch.object(hopper, "gathers", return_value=False):
        want = backward()
    for mine, same, other in zip(got, again, want):
        assert torch.equal(mine, same)
        assert close(mine, other)


def close(x: Tensor, y: Tensor) -> bool:
    """As the same sums in another order are, rounded once."""
    x, y = x.double(), y.double()
    return bool((x - y).norm() <= 4e-3 * y.norm()) and bool((x - y).abs().max() <= 2e-2 * y.abs().max())


@pytest.mark.gpu
def test_long_chains_in_a_graph() -> None:
    """A block that all queries selected, over 16 chunks, each of several items; replayed over other inputs."""
    tokens = 20000
    draws = torch.Generator("cuda").manual_seed(0)
    make = lambda heads: torch.randn(1, tokens, heads, 128, generator=draws, device="cuda", dtype=torch.bfloat16)
    q, k, v, grad = make(32), make(2), make(2), make(32)
    own = torch.arange(tokens, device="cuda")[None, :, None, None] // 64
    indices = (torch.rand(1, tokens, 2, 16, generator=draws, device="cuda") * (own + 1)).int()
    indices[..., 0] = 0
    saved = ops.selected_op(q, k, v, indices, None, None, None, tokens, 64, 128**-0.5)
    # Not through autograd, which would launch on the stream of the forward.
    backward = lambda: selected_backward_op(
        q, k, v, indices, *saved, grad, None, None, None, tokens, 64, 128**-0.5, False, True
    )[1:]  # fmt: skip
    backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = backward()
    for _ in range(5):
        grad.copy_(make(32))
        graph.replay()
        for mine, other in zip(found, backward()):
            assert torch.equal(mine, other)
    with mock.patch.object(hopper, "gathers", return_value=False):
        assert all(close(mine, other) for mine, other in zip(found, backward()))
