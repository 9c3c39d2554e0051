"""Every gradient of the reference against finite differences, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import nsa
from tests.cases import Case, make_inputs, random_case

CFG = nsa.NSAConfig(
    head_dim=2, num_heads=4, num_kv_heads=2, value_dim=3, block_length=4, block_stride=2, selection_block_size=4,
    num_selected_blocks=3, num_initial_blocks=1, num_local_blocks=1, window_size=3,
)  # fmt: skip
ONE_GROUP = replace(CFG, num_heads=3, num_kv_heads=1)

CASES = {
    "plain": Case(0, "plain", CFG, (17,), (17,)),
    "one group, offset": Case(1, "offset", ONE_GROUP, (3,), (19,)),
    "T < l": Case(2, "plain", CFG, (3,), (3,)),
    "T = 1": Case(3, "plain", CFG, (1, 1), (1, 1)),
    "lengths on the device, rows past them": Case(4, "rows past a tensor", CFG, (3, 3), (14, 5), extra_k=2, extra_cmp=2),
    "packed": Case(5, "packed", CFG, (13, 0, 2), (13, 0, 2), extra_q=1, extra_k=2, extra_cmp=1),
    "packed, offset": Case(6, "packed offset", CFG, (2, 0, 3), (11, 4, 6), extra_q=2, extra_k=1, extra_cmp=2),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def gradcheck(function: Callable[..., object], *leaves: Tensor) -> None:
    """With respect to every leaf. Rows that hold NaN are fixed: they have no finite difference; their gradient must be 0."""
    kept = [~x.detach().isnan() for x in leaves]

    def of_finite(*finite: Tensor) -> object:
        return function(*(x.detach().masked_scatter(keep, y) for x, keep, y in zip(leaves, kept, finite)))

    assert torch.autograd.gradcheck(of_finite, [x.detach()[keep].requires_grad_() for x, keep in zip(leaves, kept)])


def test_compressed_attention(case: Case) -> None:
    x = make_inputs(case)
    gradcheck(lambda q, k, v: nsa.compressed_attention(q, k, v, case.cfg, **case.lengths())[0], x.q, x.k_cmp, x.v_cmp)


def test_selected_attention(case: Case) -> None:
    x = make_inputs(case)
    indices = torch.randint(-2, 6, (*x.q.shape[:2], case.cfg.num_kv_heads, 4), dtype=torch.int32)
    gradcheck(lambda q, k, v: nsa.selected_attention(q, k, v, indices, case.cfg, **case.lengths()), x.q, x.k_slc, x.v_slc)


def test_window_attention(case: Case) -> None:
    x = make_inputs(case)
    gradcheck(lambda q, k, v: nsa.window_attention(q, k, v, case.cfg, **case.lengths()), x.q, x.k_win, x.v_win)


def test_combine() -> None:
    o = torch.randn(3, 2, 5, 4, 3, dtype=torch.float64)
    gradcheck(nsa.combine, *o, torch.rand(2, 5, 4, 3, dtype=torch.float64))


def test_the_whole(case: Case) -> None:
    gradcheck(lambda *x: nsa.nsa_attention(*x, case.cfg, **case.lengths()), *make_inputs(case).tensors())


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_compressor(kind: str, packed: bool) -> None:
    compressor = _noisy(nsa.BlockCompressor(2, CFG, kind, hidden=3, dtype=torch.float64))
    x = torch.randn(1 if packed else 2, 15, 2, 2, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 7, 7, 13], dtype=torch.int32) if packed else None
    names = [name for name, _ in compressor.named_parameters()]
    gradcheck(
        lambda x, *weights: functional_call(compressor, dict(zip(names, weights)), (x, cu_seqlens)), x, *compressor.parameters()
    )


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("options", [{}, {"compressor": "linear", "shared_kv": True}, {"gate_input": "query"}], ids=str)
def test_layer(options: dict[str, object], packed: bool) -> None:
    layer = _noisy(nsa.NativeSparseAttention(3, CFG, dtype=torch.float64, **options))
    x = torch.randn(1, 13, 3, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 9, 13], dtype=torch.int32) if packed else None
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, weights)), (x,), {"cu_seqlens": cu_seqlens})

    gradcheck(function, x, *layer.parameters())


@pytest.mark.parametrize("options", [{}, {"shared_kv": True}, {"compressor": "linear"}, {"gate_input": "query"}], ids=str)
def test_every_weight_of_a_layer_learns(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(8, CFG, **options)
    layer(torch.randn(2, 40, 8)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        # Without a nonlinearity the key embedding moves all keys alike, and softmax doesn't see it.
        unseen = name == "compress_k.embedding" and options.get("compressor") == "linear"
        assert unseen or p.grad.abs().max() > 1e-6, name


def test_lse_and_selection_carry_no_gradient() -> None:
    case = CASES["plain"]
    x = make_inputs(case).to(torch.float64)
    o, lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, case.cfg)
    assert o.requires_grad
    assert not lse.requires_grad
    assert not nsa.select_blocks(x.q, x.k_cmp, lse.requires_grad_(), case.cfg).requires_grad


def test_rows_that_are_not_read_get_gradient_zero() -> None:
    for number in range(60):
        case = random_case(number)
        x = make_inputs(case).to(torch.float64)
        nsa.nsa_attention(*x.tensors(), case.cfg, **case.lengths()).sum().backward()
        for name, y in x.items():
            lens = case.lens_q if name in ("q", "gates") else case.lens_cmp if name.endswith("cmp") else case.lens_k
            outside = torch.ones_like(y, dtype=torch.bool)
            for b, rows in case.slices(lens):
                outside[b, rows] = False
            assert y.grad is not None, f"gradient of {name}: {case}"
            assert (y.grad[outside] == 0).all(), f"gradient of {name} past its sequences: {case}"
            assert y.grad.isfinite().all(), f"gradient of {name}: {case}"


def test_without_queries_every_gradient_is_zero() -> None:
    case = CASES["plain"]
    x = make_inputs(case).to(torch.float64)
    q, gates = (y[:, :0].detach().requires_grad_() for y in (x.q, x.gates))
    keys = [y for name, y in x.items() if name not in ("q", "gates")]
    nsa.nsa_attention(q, *keys, gates, case.cfg).sum().backward()
    assert q.grad.shape == q.shape
    assert gates.grad.shape == gates.shape
    assert all((y.grad == 0).all() for y in keys)


def test_queries_that_see_no_block_get_gradient_zero() -> None:
    case = CASES["plain"]
    x = make_inputs(case).to(torch.float64)
    o, lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, case.cfg)
    o.sum().backward()
    assert (lse[:, :3] == -torch.inf).all()
    assert (o[:, :3] == 0).all()
    assert (x.q.grad[:, :3] == 0).all()
    assert x.q.grad[:, 5:].abs().amax((2, 3)).min() > 0  # from two visible blocks on, the query matters


@pytest.mark.parametrize("wanted", ["q", "k_cmp", "v_win", "gates"])
def test_one_gradient_alone(wanted: str) -> None:
    case = CASES["plain"]
    full, lone = make_inputs(case).to(torch.float64), make_inputs(case)
    nsa.nsa_attention(*full.tensors(), case.cfg).sum().backward()
    leaf = getattr(lone, wanted).requires_grad_()
    nsa.nsa_attention(*lone.tensors(), case.cfg).sum().backward()
    torch.testing.assert_close(leaf.grad, getattr(full, wanted).grad, rtol=0, atol=1e-13)


def test_the_same_tensors_may_serve_every_branch() -> None:
    case = CASES["plain"]
    x, y = make_inputs(case).to(torch.float64), make_inputs(case).to(torch.float64)
    nsa.nsa_attention(x.q, x.k_cmp, x.v_cmp, x.k_slc, x.v_slc, x.k_slc, x.v_slc, x.gates, case.cfg).sum().backward()
    k, v = y.k_slc.detach().clone().requires_grad_(), y.v_slc.detach().clone().requires_grad_()
    nsa.nsa_attention(y.q, y.k_cmp, y.v_cmp, y.k_slc, y.v_slc, k, v, y.gates, case.cfg).sum().backward()
    torch.testing.assert_close(x.k_slc.grad, y.k_slc.grad + k.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(x.v_slc.grad, y.v_slc.grad + v.grad, rtol=0, atol=1e-13)


def _noisy(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of ordinary size everywhere, so that no gradient is small by accident."""
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module
