"""The kernels as PyTorch operators: registration, compilation, autocast, checkpointing, graphs, partial gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import nsa
from nsa import ops

CFG = nsa.NSAConfig(
    head_dim=16, num_heads=6, num_kv_heads=2, value_dim=24, block_length=8, block_stride=4, selection_block_size=8,
    num_selected_blocks=4, window_size=9,
)  # fmt: skip
TOKENS = 40


def inputs(device: str, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> list[Tensor]:
    """The eight tensors of ``nsa_attention``."""
    rng = torch.Generator().manual_seed(0)
    make = lambda rows, heads, dim: torch.randn(1, rows, heads, dim, generator=rng).to(device, dtype).requires_grad_()
    blocks = CFG.num_compressed_blocks(tokens)
    keys = [make(rows, 2, dim) for rows in (blocks, tokens, tokens) for dim in (16, 24)]
    gates = torch.rand(1, tokens, 6, 3, generator=rng).to(device, dtype).requires_grad_()
    return [make(tokens, 6, 16), *keys, gates]


def described(layout: str, device: str) -> tuple[list[Tensor], Tensor, tuple[Any, ...]]:
    """Few tokens, since each check runs an operator many times; a caller's blocks; lengths as the operators take them."""
    tokens = 16
    offsets = torch.tensor([0, 5, 5, 16], dtype=torch.int32, device=device)
    indices = torch.randint(-1, 2, (1, tokens, 2, 3), dtype=torch.int32, device=device)
    lengths = (None, None, None, tokens) if layout == "plain" else (offsets, offsets, None, 0)
    return inputs(device, tokens=tokens), indices, lengths


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_opcheck_of_steps(device: str, layout: str) -> None:
    (q, k_cmp, v_cmp, k, v, *_), indices, lengths = described(layout, device)
    opcheck(ops.interval_op, (q, k, v, *lengths, 1, 1, 9, 0.2))
    opcheck(ops.interval_op, (q, k_cmp, v_cmp, *lengths, 8, 4, 0, 0.2))
    opcheck(ops.selected_op, (q, k, v, indices, *lengths, 8, 0.2))
    lse = ops.interval_op(q, k_cmp, v_cmp, *lengths, 8, 4, 0, 0.2)[1].detach().transpose(1, 2)
    opcheck(ops.select_op, (q.detach(), k_cmp.detach(), lse, *lengths, 8, 4, 8, 4, 1, 2, 0.2))
    for mean in (True, False):
        opcheck(ops.blocks_op, (k, lengths[0], 8, 4, mean))
    o = [torch.randn(1, 5, 6, 24, device=device, requires_grad=True) for _ in range(3)]
    opcheck(ops.combine_op, (*o, torch.rand(1, 5, 6, 3, device=device, requires_grad=True)))


@pytest.mark.parametrize(("given", "layout"), [(False, "plain"), (True, "packed")])
def test_opcheck_of_the_whole(device: str, given: bool, layout: str) -> None:
    """Each value once: which blocks are given and how lengths are told meet nowhere in an operator's description."""
    tensors, indices, lengths = described(layout, device)
    rest = (indices if given else None, *lengths, 8, 4, 8, 4, 1, 2, 9, 0.2)
    opcheck(ops.attention_op, (*tensors, *rest, True))
    opcheck(ops.attention_op, (*(x.detach() for x in tensors), *rest, False))


def test_compiles_whole(device: str) -> None:
    x = inputs(device)
    run = lambda *args: nsa.nsa_attention(*args, CFG, backend="triton")
    want = torch.autograd.grad(run(*x).sum(), x)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*x).sum(), x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.xdist_group("some gradients")  # one worker compiles for all
@pytest.mark.parametrize("needed", range(8))
def test_only_some_gradients(device: str, needed: int) -> None:
    x = inputs(device)
    want = torch.autograd.grad(nsa.nsa_attention(*x, CFG, backend="triton").sum(), x)
    some = [y.detach().requires_grad_(i == needed) for i, y in enumerate(x)]
    (got,) = torch.autograd.grad(nsa.nsa_attention(*some, CFG, backend="triton").sum(), some[needed])
    assert torch.equal(got, want[needed])


def test_activation_checkpointing(device: str) -> None:
    x = inputs(device)
    run = lambda *args: nsa.nsa_attention(*args, CFG, backend="triton").square().sum()
    want = torch.autograd.grad(run(*x), x)
    got = torch.autograd.grad(checkpoint(run, *x, use_reentrant=False), x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_autocast(device: str) -> None:
    x = inputs(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    want = nsa.nsa_attention(*(y.to(dtype) for y in x), CFG, backend="triton")
    with torch.autocast(device, dtype):
        got = nsa.nsa_attention(*x, CFG, backend="triton")
        assert got.dtype == dtype
        assert torch.equal(got, want)
        assert torch.equal(got, nsa.nsa_attention(x[0].to(dtype), *x[1:], CFG, backend="triton"))
    got.sum().backward()
    assert all(y.grad is not None and y.grad.dtype == torch.float32 for y in x)


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("packed", [False, True])
def test_layer_with_every_compressor(device: str, kind: Any, packed: bool) -> None:
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(20, CFG, compressor=kind, backend="triton").to(device)
    twin = nsa.NativeSparseAttention(20, CFG, compressor=kind, backend="reference").to(device).double()
    twin.load_state_dict(layer.state_dict())
    tokens = 70 if device == "cuda" else 50
    ends = [0, tokens - 40, tokens - 40, tokens - 37, tokens]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device) if packed else None
    x = torch.randn(1, tokens, 20, device=device, requires_grad=True)
    y = x.detach().double().requires_grad_()
    o, want = layer(x, cu_seqlens=offsets), twin(y, cu_seqlens=offsets)
    grad = torch.randn_like(o)
    got = torch.autograd.grad(o, [x, *layer.parameters()], grad)
    ref = torch.autograd.grad(want, [y, *twin.parameters()], grad.double())
    scale = max(float(z.detach().abs().max()) for z in ref[1:])
    for a, b in zip((o, *got), (want, *ref)):
        # A weight whose gradient almost vanishes is compared on the scale of the others.
        error, size = float((a.double() - b).detach().abs().max()), float(b.detach().abs().max())
        assert error <= 1e-4 * max(size, 0.05 * scale)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    x = inputs("cuda", torch.bfloat16)
    static = [y.detach().clone() for y in x]
    step = lambda: nsa.nsa_attention(*static, CFG)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    for y in static:
        y.copy_(torch.rand_like(y))
    graph.replay()
    assert torch.equal(o, step())


@pytest.mark.gpu
@pytest.mark.slow
def test_never_waits_for_the_device() -> None:
    x = inputs("cuda", torch.bfloat16)
    offsets = torch.tensor([0, 13, 13, 40], dtype=torch.int32, device="cuda")
    lens = torch.tensor([TOKENS], dtype=torch.int32, device="cuda")
    for told in ({}, {"cu_seqlens": offsets}, {"seqlen_k": lens}):
        nsa.nsa_attention(*x, CFG, **told).sum().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            nsa.nsa_attention(*x, CFG, **told).sum().backward()
            nsa.compress_blocks(x[3], CFG, cu_seqlens=told.get("cu_seqlens"))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_wrong_lengths_on_the_device_stay_inside() -> None:
    """Values on a GPU are not looked at; kernels clamp them."""
    x = inputs("cuda", torch.bfloat16)
    wild = torch.tensor([0, 5000, -7, 10**6], dtype=torch.int32, device="cuda")
    nsa.nsa_attention(*x, CFG, cu_seqlens=wild).sum().backward()
    nsa.nsa_attention(*x, CFG, seqlen_k=torch.tensor([10**6], dtype=torch.int32, device="cuda")).sum().backward()
    torch.cuda.synchronize()


def test_a_named_backend_never_falls_back() -> None:
    x = inputs("cpu", torch.float64)
    with pytest.raises(ValueError, match="backend 'triton' can't run on cpu tensors"):
        nsa.nsa_attention(*x, CFG, backend="triton")
