"""The layers: what they compute end to end, how they start, packed rows, options."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import nsa
from tests import oracle

CFG = nsa.NSAConfig(
    head_dim=4, num_heads=6, num_kv_heads=2, value_dim=3, block_length=4, block_stride=2, selection_block_size=4,
    num_selected_blocks=4, num_local_blocks=1, window_size=5,
)  # fmt: skip
C, T = 10, 37
OPTIONS = [
    {},
    {"shared_kv": True},
    {"gate_input": "query"},
    {"rope_theta": None},
    {"rope_theta": 500.0, "compressor": "linear"},
    {"compressor": "mean", "shared_kv": True, "gate_input": "query"},
]


def make_layer(options: dict[str, object], dtype: torch.dtype = torch.float64) -> nsa.NativeSparseAttention:
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(C, CFG, dtype=dtype, **options)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


def by_hand(layer: nsa.NativeSparseAttention, x: np.ndarray) -> np.ndarray:
    """The layer over one sequence ``[T, C]`` by the oracle: projections, rotation, gates and branches spelt out."""
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    hq, hk, dim, value_dim = CFG.num_heads, CFG.num_kv_heads, CFG.head_dim, CFG.value_dim
    q = (x @ w["q_proj.weight"].T).reshape(len(x), hq, dim)
    k = (x @ w["k_proj.weight"].T).reshape(len(x), -1, hk, dim)
    v = (x @ w["v_proj.weight"].T).reshape(len(x), -1, hk, value_dim)
    if layer.rope_theta is not None:
        q, k = turn(q, layer.rope_theta), turn(k, layer.rope_theta)
    cmp, slc, win = (0, 0, 0) if layer.shared_kv else (0, 1, 2)
    raw_gates = q @ w["gate_proj.weight"].T if layer.gate_input == "query" else (x @ w["gate_proj.weight"].T).reshape(-1, hq, 3)
    k_cmp, v_cmp = (
        oracle.compress(y[:, cmp], CFG, layer.compress_k.kind, w.get(f"compress_{name}.embedding"), weights_of(w, name))
        for name, y in (("k", k), ("v", v))
    )
    o_cmp, lse = oracle.compressed(q, k_cmp, v_cmp, len(x), CFG)
    scores = oracle.importance(q, k_cmp, lse, len(x), CFG)
    indices = np.array([[oracle.select(row, t, CFG)[0] for row in scores[t]] for t in range(len(x))])
    o_slc = oracle.selected(q, k[:, slc], v[:, slc], indices, CFG)
    o_win = oracle.window(q, k[:, win], v[:, win], CFG)
    o = oracle.combine(o_cmp, o_slc, o_win, 1 / (1 + np.exp(-raw_gates)))
    return o.reshape(len(x), -1) @ w["o_proj.weight"].T


def weights_of(w: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    return [y for key, y in sorted(w.items()) if key.startswith(f"compress_{name}.weights.")]


def turn(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding: channel c and channel c + D/2 form a plane that turns by t * theta^(-2c/D)."""
    out, half = np.empty_like(x), x.shape[-1] // 2
    for t in range(len(x)):
        for c in range(half):
            angle = t * theta ** (-c / half)
            a, b = x[t, ..., c], x[t, ..., c + half]
            out[t, ..., c] = a * math.cos(angle) - b * math.sin(angle)
            out[t, ..., c + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_end_to_end(options: dict[str, object]) -> None:
    layer = make_layer(options)
    x = torch.randn(2, T, C, dtype=torch.float64)
    with torch.no_grad():
        got = layer(x)
    for b in range(2):
        # Angles are fp32: what the rotation leaves, nothing else here rounds above 1e-12.
        allowed = 1e-12 if layer.rope_theta is None else 3e-5
        np.testing.assert_allclose(got[b].numpy(), by_hand(layer, x[b].numpy()), rtol=0, atol=allowed)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_equals_separate(options: dict[str, object]) -> None:
    layer = make_layer(options)
    lens = [9, 0, 1, 3, 24]
    x = torch.randn(1, sum(lens), C, dtype=torch.float64)
    offsets = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)
    got, indices = layer(x, cu_seqlens=offsets, return_block_indices=True)
    assert indices.shape == (1, sum(lens), 2, 4)
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:]):
        want = layer(x[:, start:end])
        torch.testing.assert_close(got[:, start:end], want, rtol=0, atol=1e-12)


def test_the_selection_is_returned() -> None:
    layer = make_layer({})
    x = torch.randn(2, T, C, dtype=torch.float64)
    o, indices = layer(x, return_block_indices=True)
    assert torch.equal(o, layer(x))
    assert indices.shape == (2, T, CFG.num_kv_heads, CFG.num_selected_blocks)
    assert indices.dtype == torch.int32


def test_shared_kv_projects_once() -> None:
    own, shared = nsa.NativeSparseAttention(C, CFG), nsa.NativeSparseAttention(C, CFG, shared_kv=True)
    assert own.k_proj.weight.shape[0] == 3 * shared.k_proj.weight.shape[0]
    assert own.v_proj.weight.shape[0] == 3 * shared.v_proj.weight.shape[0]


def test_state_dict_round_trip() -> None:
    layer, other = make_layer({}), nsa.NativeSparseAttention(C, CFG, dtype=torch.float64)
    x = torch.randn(1, T, C, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_autocast_trains() -> None:
    layer = make_layer({}, torch.float32)
    x = torch.randn(1, T, C)
    with torch.autocast("cpu", torch.bfloat16):
        o = layer(x)
    o.float().square().sum().backward()
    assert o.dtype == torch.bfloat16
    with torch.no_grad():
        want = layer(x)
        assert (o - want).norm() < 0.2 * want.norm()  # rounding may pick another block for a query
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


KINDS = ["mlp", "linear", "mean"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressor_starts_near_the_mean(kind: str) -> None:
    torch.manual_seed(0)
    cfg = nsa.NSAConfig(head_dim=64, num_heads=4)
    x = torch.randn(2, 200, 1, 64)
    with torch.no_grad():
        want = nsa.BlockCompressor(64, cfg, "mean")(x)
        got = nsa.BlockCompressor(64, cfg, kind)(x)
    assert (got - want).norm() < 0.2 * want.norm()
    if kind == "mean":
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_without_the_noise_it_starts_as_the_mean(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.module.NOISE", 0.0)
    x = torch.randn(2, 40, 2, 8, dtype=torch.float64)
    cfg = replace(CFG, head_dim=8)
    got = nsa.BlockCompressor(8, cfg, kind, dtype=torch.float64)(x)
    torch.testing.assert_close(got, nsa.BlockCompressor(8, cfg, "mean")(x), rtol=0, atol=1e-12)
    wide = nsa.BlockCompressor(8, cfg, kind, hidden=23, dtype=torch.float64)(x)
    torch.testing.assert_close(wide, got, rtol=0, atol=1e-12)


def test_a_narrow_mlp_is_possible() -> None:
    x = torch.randn(1, 20, 2, 8)
    assert nsa.BlockCompressor(8, CFG, hidden=1)(x).shape == (1, 9, 2, 8)


def test_the_mean_has_no_parameters() -> None:
    assert list(nsa.BlockCompressor(8, CFG, "mean").parameters()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_packed_blocks_never_cross_sequences(kind: str) -> None:
    """Rows ``T // d``, each sequence's blocks in order from row 0; rows past the last sequence stay unread."""
    compressor = nsa.BlockCompressor(3, CFG, kind, dtype=torch.float64)
    lens = [3, 4, 0, 11, 5]
    x = torch.randn(1, sum(lens) + 6, 2, 3, dtype=torch.float64)
    x[:, sum(lens) :] = torch.nan
    offsets = np.cumsum([0, *lens])
    got = compressor(x, torch.tensor(offsets, dtype=torch.int32))
    assert got.shape == (1, (sum(lens) + 6) // CFG.block_stride, 2, 3)
    want = torch.cat([compressor(x[:, a:b]) for a, b in itertools.pairwise(offsets)], 1)
    torch.testing.assert_close(got[:, : want.shape[1]], want, rtol=0, atol=1e-13)
    assert got.isfinite().all()


def test_packing_reads_no_length_on_the_host() -> None:
    """On a GPU reading one would wait for the device. Fake tensors have shapes and no values: any such read raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        compressor = nsa.BlockCompressor(3, CFG)
        x: Tensor = torch.randn(1, 40, 2, 3, requires_grad=True)
        y = compressor(x, torch.zeros(4, dtype=torch.int32))
        assert y.shape == (1, 20, 2, 3)
        y.sum().backward()
        layer = nsa.NativeSparseAttention(C, CFG)
        q, _, _ = layer._project(torch.randn(1, 40, C), layer._positions(x, torch.zeros(4, dtype=torch.int32), None))
        assert q.shape == (1, 40, 6, 4)
