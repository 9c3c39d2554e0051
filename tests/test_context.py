"""The streaming API gives, step by step, what the full forward over the same tokens gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nsa

CFG = nsa.NSAConfig(
    head_dim=4, num_heads=4, num_kv_heads=2, value_dim=3, block_length=4, block_stride=2, selection_block_size=4,
    num_selected_blocks=4, num_local_blocks=1, window_size=6,
)  # fmt: skip
T = 30  # five rounds of the window
EXACT = {"rtol": 0, "atol": 1e-12}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = draw(T, 4, 4, seed=1), draw(T, 2, 4, seed=2), draw(T, 2, 3, seed=3)
GATE = draw(3, 4, seed=4)


def compression(kind: str) -> dict[str, object]:
    """Arguments of ``set_compression_weights``: a different compressor for keys and for values."""
    torch.manual_seed(5)
    out: dict[str, object] = {}
    for name, dim in (("k", 4), ("v", 3)):
        compressor = nsa.BlockCompressor(dim, CFG, kind, dtype=torch.float64).requires_grad_(False)
        for p in compressor.parameters():
            p.normal_(std=0.4)
        out |= {f"{name}_embedding": compressor.embedding, f"{name}_weights": tuple(compressor.weights)}
    return out


def full(gate: Tensor | None = None, weights: dict[str, object] | None = None) -> Tensor:
    """``[T, HQ, DV]`` from one call over all tokens."""
    w = weights or {}
    k_cmp = nsa.compress_blocks(K[None], CFG, w.get("k_embedding"), w.get("k_weights", ()))
    v_cmp = nsa.compress_blocks(V[None], CFG, w.get("v_embedding"), w.get("v_weights", ()))
    gates = torch.full((1, T, 4, 3), 1 / 3, dtype=torch.float64) if gate is None else (Q @ gate.T).sigmoid()[None]
    k, v = K[None], V[None]
    return nsa.nsa_attention(Q[None], k_cmp, v_cmp, k, v, k, v, gates, CFG)[0]


def step(ctx: nsa.NSAContext, t: int) -> Tensor:
    ctx.update_window(K[t : t + 1], V[t : t + 1])
    return ctx.compute_attention(Q[t], K[: t + 1], V[: t + 1])


@pytest.mark.parametrize("incremental", [False, True], ids=["whole", "incremental"])
@pytest.mark.parametrize("gate", [None, GATE], ids=["thirds", "gates"])
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_every_step_equals_the_full_forward(kind: str, gate: Tensor | None, incremental: bool) -> None:
    weights = compression(kind)
    want = full(gate, weights)
    with nsa.NSAContext(CFG, incremental=incremental) as ctx:
        ctx.set_gate_weights(gate)
        ctx.set_compression_weights(**weights)
        for t in range(T):
            torch.testing.assert_close(step(ctx, t), want[t], **EXACT)


def test_a_fresh_context_is_usable_as_it_stands() -> None:
    """The mean, gates of 1/3 each, and the tail of the keys for a window that was never filled."""
    want, ctx = full(), nsa.NSAContext(CFG)
    for t in (0, 3, 5, 6, 17, T - 1):
        torch.testing.assert_close(ctx.compute_attention(Q[t], K[: t + 1], V[: t + 1]), want[t], **EXACT)


def test_the_ring_is_read_once_it_is_filled() -> None:
    """Filled with other tokens than the tail of ``keys``, it shows; before that, the tail stands in."""
    ctx = nsa.NSAContext(CFG)
    want = full()
    for count in range(1, CFG.window_size + 1):
        ctx.update_window(draw(1, 2, 4, seed=90 + count), draw(1, 2, 3, seed=190 + count))
        got = ctx.compute_attention(Q[20], K[:21], V[:21])
        assert torch.allclose(got, want[20], **EXACT) == (count < CFG.window_size)
    # A short sequence needs no more than its own length in the ring.
    ctx.reset()
    ctx.update_window(10 * K[:2], 10 * V[:2])
    assert not torch.allclose(ctx.compute_attention(Q[1], K[:2], V[:2]), want[1], **EXACT)
    assert torch.allclose(ctx.compute_attention(Q[2], K[:3], V[:3]), want[2], **EXACT)


@pytest.mark.parametrize("sizes", [[T], [1, 2, 3, 4, 5, 6, 7, 2], [6] * 5, [11, 13, 6], [0, 30, 0]], ids=str)
def test_the_window_takes_any_number_of_tokens(sizes: list[int]) -> None:
    """More than it holds too, of which the newest count."""
    want, ctx, t = full(), nsa.NSAContext(CFG), 0
    for size in sizes:
        ctx.update_window(K[t : t + size], V[t : t + size])
        t += size
        if size:
            torch.testing.assert_close(ctx.compute_attention(Q[t - 1], K[:t], V[:t]), want[t - 1], **EXACT)


def test_incremental_jumps() -> None:
    want, ctx = full(), nsa.NSAContext(CFG, incremental=True)
    for t in (0, 2, 3, 4, 11, 12, 29):
        torch.testing.assert_close(ctx.compute_attention(Q[t], K[: t + 1], V[: t + 1]), want[t], **EXACT)


def test_incremental_compresses_only_what_is_new() -> None:
    """Old keys are not read again by the compressed branch: overwriting them changes the other branches alone."""
    whole, incremental = (nsa.NSAContext(CFG, incremental=on) for on in (False, True))
    for ctx in (whole, incremental):
        ctx.compute_attention(Q[19], K[:20], V[:20])
    changed = torch.cat([torch.zeros_like(K[:10]), K[10:]])
    a, b = (ctx.compute_attention(Q[20], changed[:21], V[:21]) for ctx in (whole, incremental))
    assert not torch.allclose(a, b)


def test_keys_of_an_incremental_context_only_grow() -> None:
    ctx = nsa.NSAContext(CFG, incremental=True)
    ctx.compute_attention(Q[9], K[:10], V[:10])
    with pytest.raises(ValueError, match=r"keys must not shrink, got 8 after 10; call reset\(\) first"):
        ctx.compute_attention(Q[7], K[:8], V[:8])
    ctx.reset()
    torch.testing.assert_close(ctx.compute_attention(Q[7], K[:8], V[:8]), full()[7], **EXACT)


def test_new_compression_weights_count_from_the_first_block() -> None:
    ctx, weights = nsa.NSAContext(CFG, incremental=True), compression("mlp")
    ctx.compute_attention(Q[20], K[:21], V[:21])
    ctx.set_compression_weights(**weights)
    torch.testing.assert_close(ctx.compute_attention(Q[21], K[:22], V[:22]), full(weights=weights)[21], **EXACT)


@pytest.mark.parametrize("incremental", [False, True], ids=["whole", "incremental"])
def test_reset_forgets_the_sequence_and_keeps_the_weights(incremental: bool) -> None:
    weights = compression("mlp")
    ctx = nsa.NSAContext(CFG, incremental=incremental)
    ctx.set_gate_weights(GATE)
    ctx.set_compression_weights(**weights)
    for t in range(17):
        ctx.update_window(V.new_ones(1, 2, 4), V.new_ones(1, 2, 3))
        ctx.compute_attention(Q[t], 5 * K[: t + 1], 5 * V[: t + 1])
    ctx.reset()
    want = full(GATE, weights)
    for t in range(T):
        torch.testing.assert_close(step(ctx, t), want[t], **EXACT)


def test_one_kv_head_may_go_without_its_dimension() -> None:
    cfg = nsa.NSAConfig(
        head_dim=4,
        num_heads=4,
        num_kv_heads=1,
        value_dim=3,
        block_length=4,
        block_stride=2,
        selection_block_size=4,
        window_size=6,
    )
    flat, deep = nsa.NSAContext(cfg), nsa.NSAContext(cfg)
    for t in range(T):
        flat.update_window(K[t : t + 1, 0], V[t : t + 1, 0])
        deep.update_window(K[t : t + 1, :1], V[t : t + 1, :1])
        a = flat.compute_attention(Q[t], K[: t + 1, 0], V[: t + 1, 0])
        assert torch.equal(a, deep.compute_attention(Q[t], K[: t + 1, :1], V[: t + 1, :1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    ctx, want = nsa.NSAContext(CFG), full()
    for t in range(T):
        ctx.update_window(K[t : t + 1].to(dtype), V[t : t + 1].to(dtype))
        o = ctx.compute_attention(Q[t].to(dtype), K[: t + 1].to(dtype), V[: t + 1].to(dtype))
        assert o.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(o, want[t].float(), rtol=0, atol=1e-5)


def test_a_context_does_not_keep_the_callers_tensors() -> None:
    ctx, k, v = nsa.NSAContext(CFG), K.clone(), V.clone()
    ctx.update_window(k[:T], v[:T])
    k[:], v[:] = 0, 0
    torch.testing.assert_close(ctx.compute_attention(Q[T - 1], K, V), full()[T - 1], **EXACT)


CALLS: list[Callable[[nsa.NSAContext], object]] = [
    lambda ctx: ctx.reset(),
    lambda ctx: ctx.update_window(K[:1], V[:1]),
    lambda ctx: ctx.compute_attention(Q[0], K[:1], V[:1]),
    lambda ctx: ctx.set_gate_weights(None),
    lambda ctx: ctx.set_compression_weights(),
    lambda ctx: ctx.__enter__(),
]


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_a_freed_context_refuses(call: Callable[[nsa.NSAContext], object]) -> None:
    ctx = nsa.NSAContext(CFG)
    call(ctx)
    ctx.free()
    ctx.free()
    with pytest.raises(RuntimeError, match="this NSAContext was freed"):
        call(ctx)


def test_leaving_the_block_frees() -> None:
    with nsa.NSAContext(CFG) as ctx:
        step(ctx, 0)
    with pytest.raises(RuntimeError, match="freed"):
        ctx.reset()


BAD: list[tuple[Callable[[nsa.NSAContext], object], type[Exception], str]] = [
    (lambda c: c.compute_attention(Q[0][:3], K[:1], V[:1]), ValueError, r"query must have shape \[4, 4\], got \[3, 4\]"),
    (lambda c: c.compute_attention(Q[0], K[:1, 0], V[:1]), ValueError, r"keys must have shape \[tokens, 2, 4\], got \[1, 4\]"),
    (lambda c: c.compute_attention(Q[0], K[:2], V[:1]), ValueError, r"values must have shape \[2, 2, 3\], got \[1, 2, 3\]"),
    (lambda c: c.compute_attention(Q[0], K[:0], V[:0]), ValueError, "keys must hold at least the query's own token, got none"),
    (lambda c: c.compute_attention(Q[0].float(), K[:1], V[:1]), TypeError, "keys must have query's dtype torch.float32, got"),
    (lambda c: c.compute_attention(Q[0].long(), K[:1], V[:1]), TypeError, "query must be fp16, bf16, fp32 or fp64, got"),
    (lambda c: c.compute_attention(None, K[:1], V[:1]), TypeError, r"query must be a torch\.Tensor, got NoneType"),
    (lambda c: c.compute_attention(Q[0], [], V[:1]), TypeError, r"keys must be a torch\.Tensor, got list"),
    (
        lambda c: c.compute_attention(Q[0], K[:1], V[:1].to("meta")),
        ValueError,
        "values must be on keys's? device cpu, got meta",
    ),
    (lambda c: c.update_window(K[:1], V[:2]), ValueError, r"new_values must have shape \[1, 2, 3\], got \[2, 2, 3\]"),
    (lambda c: c.update_window(K[:1], V[:1].float()), TypeError, "new_values must have new_keys'?s? dtype"),
    (lambda c: (step(c, 0), c.update_window(K[:1].float(), V[:1].float())), TypeError, "new_keys must have the window's dtype"),
    (lambda c: c.set_gate_weights(GATE[:2]), ValueError, r"weight must have shape \[3, 4\], got \[2, 4\]"),
    (lambda c: c.set_gate_weights([0.1]), TypeError, r"weight must be a torch\.Tensor, got list"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call: Callable[[nsa.NSAContext], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(nsa.NSAContext(CFG))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend 'cudnn' can't run"):
        nsa.NSAContext(CFG, backend="cudnn").compute_attention(Q[0], K[:1], V[:1])
