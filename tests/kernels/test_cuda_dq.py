"""The gradient of the selected branch's queries in CUDA C++: when it is chosen; and on a GPU its results beside the reference's
and its twin's. How it is compiled and kept, ``test_cuda_selected.py`` tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import nsa
from nsa import ops
from nsa.kernels import launch
from nsa.kernels.cuda import selected_dq as kernels
from nsa.kernels.triton import selected_backward as portable
from nsa.kernels.triton.sequence import spans
from nsa.layout import SeqInfo
from nsa.ops.steps import selected_backward_op
from tests import naive
from tests.kernels.draws import guarded_inputs
from tests.kernels.test_cuda_selected import (
    CASES,
    CFG,
    DTYPES,
    GROUPS,
    LARGE,
    OTHERS,
    PLACES,
    Dims,
    big,
    counted,
    odd_sets,
    of_shape,
    on_hopper,
    twin,
)
from tests.steps import gradients, steps
from tests.tolerance import assert_within_2x

SCALE = CFG.softmax_scale


@PLACES
def test_which_twin_runs(place: str, group: int, loads: bool, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = on_hopper(kernels, place, group, loads, monkeypatch)
    monkeypatch.setattr(launch.hopper, "gathers", lambda *_: False)
    monkeypatch.setattr(kernels, "selected_dq", lambda *_: "cuda")
    monkeypatch.setattr(portable, "selected_dq", lambda *_: "triton")
    monkeypatch.setattr(portable, "selected_dkv", lambda *_: ("dk", "dv"))
    runs = "cuda" if taken else "triton"
    indices = torch.zeros(1, 99, 2, 16, dtype=torch.int32)
    call = lambda *need: launch.selected_backward(
        fake(2 * group), fake(2), fake(2), fake(2 * group), None, None, indices, None, 64, 0.1, need, "what is there"
    )
    assert call(True, True) == (runs, "dk", "dv")
    assert call(True, False) == (runs, None, None)
    assert call(False, True) == ("what is there", "dk", "dv")


# On a GPU.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    yield from counted(monkeypatch, kernels, "selected_dq")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 5, 0], ids=["16 blocks", "5 blocks", "none"])
@pytest.mark.parametrize("name", CASES)
def test_beside_reference_and_twin(name: str, width: int, dtype: torch.dtype, calls: list[None]) -> None:
    """Alone, and added to the other branches' under gates of any sign, over inputs that lie strided among NaN."""
    case = CASES[name]
    low = guarded_inputs(case, dtype, "cuda")
    rng = torch.Generator("cuda").manual_seed(case.seed)
    with torch.no_grad():
        low.gates.mul_(2).sub_(1)
        low.gates.masked_fill_(torch.rand(low.gates.shape, generator=rng, device="cuda") < 0.1, 0)
    exact, plain = low.to(torch.float64), low.to(dtype)
    indices = odd_sets(case, width or 16, not width)
    got, ref, base = steps(case, low, indices, "triton"), steps(case, exact, indices), naive.nsa_steps(case, plain, indices)
    grad = torch.randn(ref.o.shape, generator=rng, dtype=torch.float64, device="cuda").to(dtype)
    backward = lambda x, y: gradients(x, y, grad)["dq"] if y.requires_grad else torch.zeros_like(x.q)
    for which in ("o_slc", "o"):
        mine, want, other = (backward(x, getattr(y, which)) for x, y in ((low, got), (exact, ref), (plain, base)))
        if max(case.lens_k) == 1:  # a softmax over one key is 1 whatever the score
            assert mine.abs().max() <= 1e-4
            continue
        assert_within_2x(f"dq of {which} of {case}", mine, want, other, dtype)
        theirs = twin(lambda: backward(low, getattr(got, which)))  # noqa: B023
        assert (mine.double() - theirs.double()).norm() <= 1e-2 * theirs.double().norm()
        assert torch.equal(mine, backward(low, getattr(got, which)))
    assert len(calls) == (2 if max(case.lens_k) == 1 else 4)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dims", "name"), OTHERS)
def test_other_groups_and_head_dims(group: int, dims: Dims, name: str, calls: list[None]) -> None:
    case, dtype = of_shape(name, group, dims)
    low = guarded_inputs(case, dtype, "cuda")
    indices, told = odd_sets(case, 16), case.lengths("cuda")
    rng = torch.Generator("cuda").manual_seed(case.seed)
    grad = torch.randn(*low.q.shape[:3], dims[1], generator=rng, dtype=torch.float64, device="cuda").to(dtype)
    exact, plain = low.to(torch.float64), low.to(dtype)
    outputs = (
        nsa.selected_attention(low.q, low.k_slc.detach(), low.v_slc.detach(), indices, case.cfg, **told, backend="triton"),
        nsa.selected_attention(exact.q, exact.k_slc, exact.v_slc, indices, case.cfg, **told, backend="reference"),
        naive.nsa_steps(case, plain, indices).o_slc,
    )
    mine, want, other = (
        torch.autograd.grad(o, x.q, grad.to(o.dtype), retain_graph=True)[0] for x, o in zip((low, exact, plain), outputs)
    )
    assert len(calls) == 1
    assert_within_2x(f"dq of o_slc of {case}", mine, want, other, dtype)
    theirs = twin(lambda: torch.autograd.grad(outputs[0], low.q, grad, retain_graph=True)[0])
    assert (mine.double() - theirs.double()).norm() <= 1e-2 * theirs.double().norm()


def statistics(shape: tuple[int, ...], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A shift that carries gates of both signs, for some rows +inf, and a delta, as the backward would have them."""
    shift = torch.randn(shape, generator=rng, device="cuda") + 8
    shift.masked_fill_(torch.rand(shape, generator=rng, device="cuda") < 0.1, float("inf"))
    return shift, torch.randn(shape, generator=rng, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "group", "dim"),
    [*zip(DTYPES, (16, 16), (128, 128)), *zip(DTYPES, (4, 1), (128, 128)), *zip(DTYPES, (16, 2), (192, 192))],
)
def test_adds_to_what_is_there(dtype: torch.dtype, group: int, dim: int, calls: list[None]) -> None:
    """In fp32, rounded once; into rows that lie strided, and nowhere else."""
    batch, tokens, heads = 2, 203, 2 * group
    rng = torch.Generator("cuda").manual_seed(0)
    make = lambda count, dim: torch.randn(batch, tokens, count, dim, generator=rng, device="cuda").to(dtype)
    q, k, v, do = make(heads, dim), make(2, dim), make(2, 128), make(heads, 128)
    shift, delta = statistics((batch, heads, tokens), rng)
    indices = torch.randint(-1, 5, (batch, tokens, 2, 16), generator=rng, device="cuda", dtype=torch.int32)
    where = spans(tokens, tokens, SeqInfo(batch, tokens, tokens), 1, 1)
    around = torch.full((batch, tokens + 3, heads + 1, dim + 8), float("nan"), device="cuda", dtype=dtype)
    room = around[:, 2:-1, :heads, :dim]
    old = make(heads, dim)
    call = lambda dq: launch.selected_backward(
        q, k, v, do, shift, delta, indices, where, 64, SCALE, (True, False), dq
    )[0]  # fmt: skip
    alone = call(None)
    assert call(room.copy_(old)) is room
    want = old.double() + alone.double()
    assert ((room.double() - want).abs() <= 2**-8 * (want.abs() + alone.double().abs()) + 1e-6).all()
    room.fill_(float("nan"))
    assert around.isnan().all()
    assert len(calls) == 2
    twins = twin(lambda: call(old.clone()))
    assert (call(old.clone()).double() - twins.double()).norm() <= 1e-2 * twins.double().norm()


def backward_of(tokens: int, dtype: torch.dtype, group: int = 16, dims: Dims = (128, 128)) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the operator takes ahead of the lengths: the forward's inputs and outputs, and do."""
    q, k, v, indices = big(tokens, dtype, group, dims)
    o, lse = ops.selected_op(q, k, v, indices, None, None, None, tokens, 64, 128**-0.5)
    do = torch.randn(o.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(dtype)
    return (q, k, v, indices, o, lse), do


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dtype", "group", "dims"), LARGE)
def test_the_same_every_time(tokens: int, dtype: torch.dtype, group: int, dims: Dims, calls: list[None]) -> None:
    saved, do = backward_of(tokens, dtype, group, dims)
    call = lambda: selected_backward_op(*saved, do, None, None, None, tokens, 64, 128**-0.5, True, False)[0]
    dq, other = call(), twin(call)
    size = other.double().norm(dim=-1)
    worst = (dq.double() - other.double()).norm(dim=-1) / (size + 1e-2 * size.mean())
    assert worst.max() <= 3e-2, f"row {worst.argmax()} differs by {worst.max()}"
    for _ in range(10):
        assert torch.equal(call(), dq)
    assert len(calls) == 11


@pytest.mark.gpu
def test_captured_in_a_graph(calls: list[None]) -> None:
    saved, do = backward_of(1003, torch.bfloat16)
    call = lambda: selected_backward_op(*saved, do, None, None, None, 1003, 64, 128**-0.5, True, False)[0]
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dq = call()
    q, k, v, indices, *_ = saved
    for x in (k, v, do):
        x.copy_(torch.randn_like(x))
    q.mul_(0.1)
    indices.copy_(indices.roll(1, 2))
    graph.replay()
    assert torch.equal(dq, call())


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_wrong_lengths_stay_inside(group: int, calls: list[None]) -> None:
    saved, do = backward_of(300, torch.bfloat16, group)
    lengths: list[tuple[Tensor | None, Tensor | None]] = []
    number = lambda *ends: torch.tensor(ends, dtype=torch.int32, device="cuda")
    lengths += [(number(*ends), None) for ends in ([0, 5000, -7, 10**6], [300, 0], [0, 0])]
    lengths += [(None, number(length)) for length in (10**6, 3, 0, -5)]
    for ends, lens in lengths:
        selected_backward_op(*saved, do, ends, ends, lens, 0, 64, 0.1, True, False)
    torch.cuda.synchronize()
    assert len(calls) == 7


@pytest.mark.gpu
def test_no_queries_no_keys(calls: list[None]) -> None:
    q, k = (torch.randn(1, tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for tokens, heads in ((9, 32), (9, 2)))
    indices = torch.zeros(1, 9, 2, 16, dtype=torch.int32, device="cuda")
    none = torch.zeros(3, dtype=torch.int32, device="cuda")
    for rows, keys in ((9, 0), (0, 9), (0, 0)):
        x, y, at = q[:, :rows], k[:, :keys], indices[:, :rows]
        o, lse = ops.selected_op(x, y, y, at, none, none, None, 0, 64, SCALE)
        dq = selected_backward_op(x, y, y, at, o, lse, o, none, none, None, 0, 64, SCALE, True, False)[0]
        assert dq.shape == x.shape
        assert not dq.any()
    assert len(calls) == 3
