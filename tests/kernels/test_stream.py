"""The kernels that only the streaming API needs: length, gates and means, compression by weights, the circular window."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import nsa
from tests import naive
from tests.tolerance import assert_within_2x

DTYPES = [torch.float32, torch.float16]
SHAPES = [(2, 32, 48, 16, 8, 100), (1, 64, 64, 32, 16, 97), (3, 24, 16, 6, 2, 31), (1, 16, 16, 4, 4, 4)]


def config(kv_heads: int, dim: int, value_dim: int, length: int, stride: int) -> nsa.NSAConfig:
    return nsa.NSAConfig(
        head_dim=dim, num_heads=2 * kv_heads, num_kv_heads=kv_heads, value_dim=value_dim, block_length=length,
        block_stride=stride, selection_block_size=2 * length,
    )  # fmt: skip


def draw(seed: int, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check_blocks(name: str, got: Tensor, x: Tensor, cfg: nsa.NSAConfig, embedding: Tensor | None, *weights: Tensor) -> None:
    """``got [rows, HK, D]`` holds block ``i`` in row ``i + l/d - 1``, and NaN where there was none to write."""
    lead, count = cfg.block_length // cfg.block_stride - 1, cfg.num_compressed_blocks(len(x))
    exact = [w.double() for w in weights]
    embedded = None if embedding is None else embedding.double()
    ref = nsa.compress_blocks(x[None].double(), cfg, embedded, tuple(exact), backend="reference")
    low = naive.compress(x[None], cfg.block_length, cfg.block_stride, embedding, list(weights))
    assert_within_2x(name, got[lead : lead + count], ref[0], low[0], x.dtype)
    assert got[:lead].isnan().all()
    assert got[lead + count :].isnan().all()


def nowhere(rows: int, kv_heads: int, dim: int, like: Tensor, apart: bool) -> Tensor:
    """``[rows, HK, D]`` of NaN, and in memory so or, ``apart``, the rows of a head side by side."""
    shape = (kv_heads, rows, dim) if apart else (rows, kv_heads, dim)
    made = like.new_full(shape, float("nan"))
    return made.transpose(0, 1) if apart else made


def check_gates(gates: Tensor, lengths: Tensor, seq_len: int, q: Tensor, weights: Tensor | None) -> None:
    want = torch.full(gates.shape, 1 / 3, dtype=torch.float64)
    if weights is not None:
        want = (q.double() @ weights.double().T).sigmoid()
    torch.testing.assert_close(gates.double().cpu(), want.cpu(), rtol=1e-5, atol=1e-6)
    assert lengths.item() == seq_len


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_beginning_of_a_step(device: str, dtype: torch.dtype, shape: tuple[int, ...], gated: bool, apart: bool) -> None:
    """Means, gates and the length; with no block to add, those to add, and all at once."""
    from nsa.kernels.triton.stream_begin import stream_begin

    kv_heads, dim, value_dim, length, stride, tokens = shape
    cfg, rows = config(*shape[:5]), tokens // stride + 1
    k, v = (draw(i, tokens, kv_heads, width, dtype=dtype, device=device) for i, width in enumerate((dim, value_dim)))
    q, drawn = draw(2, 2 * kv_heads, dim, dtype=dtype, device=device), draw(3, 3, dim, dtype=dtype, device=device)
    weights = drawn if gated else None
    count = cfg.num_compressed_blocks(tokens)
    for edges in ((0, count), (0, 0, count // 2, count)):  # the second as an incremental stream does
        k_cmp, v_cmp = (nowhere(rows, *x.shape[1:], x, apart) for x in (k, v))
        for first, stop in pairwise(edges):
            gates = torch.full((len(q), 3), float("nan"), device=device)
            lengths = torch.zeros(1, dtype=torch.int32, device=device)
            stream_begin(q, weights, gates, lengths, stop + 7, k, v, k_cmp, v_cmp, first, stop, length, stride)
            check_gates(gates, lengths, stop + 7, q, weights)
        check_blocks("keys", k_cmp, k, cfg, None)
        check_blocks("values", v_cmp, v, cfg, None)


@pytest.mark.parametrize("group", [1, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_gates_of_groups(device: str, kv_heads: int, group: int) -> None:
    """Of more heads than a program computes the gates of, and of fewer; no head's gates are written over another's."""
    from nsa.kernels.triton.stream_begin import stream_begin

    shapes = (group * kv_heads, 24), (3, 24), (5, kv_heads, 24)
    q, weights, k = (draw(i, *shape, dtype=torch.float32, device=device) for i, shape in enumerate(shapes))
    gates = torch.full((len(q) + 1, 3), float("nan"), device=device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    stream_begin(q, weights, gates, lengths, 5, k, k, k, k, 0, 0, 16, 8)
    check_gates(gates[:-1], lengths, 5, q, weights)
    assert gates[-1].isnan().all()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("hidden", [0, 40, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights(device: str, dtype: torch.dtype, shape: tuple[int, ...], hidden: int, apart: bool) -> None:
    """Linear (``hidden`` 0) and the MLP."""
    from nsa.kernels.triton.stream_compress import stream_weighted

    kv_heads, dim, _, length, stride, tokens = shape
    cfg = config(*shape[:5])
    x = draw(0, tokens, kv_heads, dim, dtype=dtype, device=device)
    embedding = draw(1, length, dim, dtype=dtype, device=device)
    w1 = draw(2, hidden or dim, length * dim, dtype=dtype, device=device) / (length * dim) ** 0.5
    weights = (w1, draw(3, dim, hidden, dtype=dtype, device=device) / hidden**0.5) if hidden else (w1,)
    out = nowhere(tokens // stride + 1, kv_heads, dim, x, apart)
    count = cfg.num_compressed_blocks(tokens)
    for first, stop in ((0, 1), (1, count)):
        stream_weighted(x, out, embedding, weights, first, stop, length, stride)
    check_blocks("blocks", out, x, cfg, embedding, *weights)


def test_the_window_is_written_twice(device: str) -> None:
    from nsa.kernels.triton.stream_window import stream_window

    slots = 7
    k, v = draw(0, 30, 3, 16, dtype=torch.float32, device=device), draw(1, 30, 3, 200, dtype=torch.float32, device=device)
    k_win, v_win = (x.new_full((2 * slots, *x.shape[1:]), float("nan")) for x in (k, v))
    seen = 0
    for count in (1, 2, 7, 5, 6, 1):
        stream_window(k[seen : seen + count], v[seen : seen + count], k_win, v_win, seen % slots)
        seen += count
        for token in range(max(0, seen - slots), seen):
            for x, ring in ((k, k_win), (v, v_win)):
                assert torch.equal(ring[token % slots], x[token])
                assert torch.equal(ring[token % slots + slots], x[token])
