"""In low precision the reference keeps the rule that kernels must keep: outputs and gradients, against itself in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa
from nsa.reference.chunks import Chunk
from nsa.reference.select import block_importance
from tests import naive
from tests.cases import KINDS, make_inputs, random_case
from tests.steps import gradients, steps
from tests.tolerance import assert_within_2x

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(4 * len(KINDS)))
def test_every_output_and_gradient(number: int, dtype: torch.dtype) -> None:
    case = random_case(number, head_dims=(16, 24, 32), value_dims=(16, 32), max_len=200)
    low = make_inputs(case, dtype).to(dtype)
    exact = low.to(torch.float64)
    plain = low.to(dtype)
    with torch.no_grad():
        indices = nsa.nsa_attention(*exact.tensors(), case.cfg, **case.lengths(), return_block_indices=True)[1]
    got, ref, base = steps(case, low, indices), steps(case, exact, indices), naive.nsa_steps(case, plain, indices)
    for name in ("o_cmp", "lse", "o_slc", "o_win", "o"):
        y = getattr(got, name)
        assert y.dtype == (torch.float32 if name == "lse" else dtype)
        assert_within_2x(f"{name} of {case}", y, getattr(ref, name), getattr(base, name), dtype)
    grad = torch.randn(ref.o.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(dtype)
    mine, want, other = gradients(low, got.o, grad), gradients(exact, ref.o, grad), gradients(plain, base.o, grad)
    for name, g in mine.items():
        assert g.dtype == dtype
        assert_within_2x(f"{name} of {case}", g, want[name], other[name], dtype)


@pytest.mark.parametrize("number", range(2 * len(KINDS)))
def test_the_naive_attention_is_right_in_fp64(number: int) -> None:
    """Else twice its error would be no bound."""
    case = random_case(number)
    x, y = make_inputs(case).to(torch.float64), make_inputs(case).to(torch.float64)
    with torch.no_grad():
        indices = nsa.nsa_attention(*x.tensors(), case.cfg, **case.lengths(), return_block_indices=True)[1]
    got, want = naive.nsa_steps(case, x, indices), steps(case, y, indices)
    torch.testing.assert_close(vars(got), vars(want), rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(want.o)
    torch.testing.assert_close(gradients(x, got.o, grad), gradients(y, want.o, grad), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_compression(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cfg = nsa.NSAConfig(head_dim=16, num_heads=2, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8)
    compressor = nsa.BlockCompressor(16, cfg, kind, dtype=torch.float64)
    for p in compressor.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 50, 2, 16)
    grad = torch.randn(2, 11, 2, 16).to(dtype)
    names = ["dx", "dembedding", "dfirst", "dsecond"]

    def run(step: str, precision: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype).to(precision).requires_grad_() for t in (x, *compressor.parameters())]
        embedding, weights = (leaves[1] if len(leaves) > 1 else None), leaves[2:]
        if step == "naive":
            y = naive.compress(leaves[0], cfg.block_length, cfg.block_stride, embedding, weights)
        else:
            y = nsa.compress_blocks(leaves[0], cfg, embedding, tuple(weights))
        return {"y": y, **dict(zip(names, torch.autograd.grad(y, leaves, grad.to(precision))))}

    got, ref, base = run("nsa", dtype), run("nsa", torch.float64), run("naive", dtype)
    for name, y in got.items():
        assert y.dtype == dtype
        assert_within_2x(f"{name} of {kind}", y, ref[name], base[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_is_accumulated_wide(dtype: torch.dtype) -> None:
    """P within 1e-5 relative, whatever the inputs' dtype: rounding scores before the top-n would pick other blocks."""
    torch.manual_seed(0)
    cfg = nsa.NSAConfig(head_dim=32, num_heads=4, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=16)
    tokens = 512
    q = torch.randn(1, tokens, 4, 32).to(dtype)
    k, v = (torch.randn(1, cfg.num_compressed_blocks(tokens), 2, 32).to(dtype) for _ in "kv")
    chunk = Chunk(slice(0, tokens), 0, tokens)

    def scores(acc: torch.dtype) -> Tensor:
        _, lse = nsa.compressed_attention(*(x.to(acc if acc == torch.float64 else dtype) for x in (q, k, v)), cfg)
        return block_importance(q.to(acc), k.to(acc), lse, chunk, cfg).double()

    got, want = scores(torch.float32), scores(torch.float64)
    assert (want > 0).sum() > 10_000
    assert ((got - want).abs() <= 1e-5 * want).all()
