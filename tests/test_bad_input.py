"""Bad arguments are refused at the entrance: the message names the argument, what it got and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nsa

CFG = nsa.NSAConfig(
    head_dim=4, num_heads=4, num_kv_heads=2, value_dim=6, block_length=4, block_stride=2, selection_block_size=4,
    num_selected_blocks=3, num_local_blocks=1, window_size=5,
)  # fmt: skip
T, N = 10, 4


def arguments() -> dict[str, Any]:
    """A valid call of ``nsa_attention``."""
    k, v = torch.randn(2, T, 2, 4), torch.randn(2, T, 2, 6)
    return {
        "q": torch.randn(2, T, 4, 4), "k_cmp": k[:, :N], "v_cmp": v[:, :N], "k_slc": k, "v_slc": v, "k_win": k, "v_win": v,
        "gates": torch.rand(2, T, 4, 3), "cfg": CFG,
    }  # fmt: skip


def packed_arguments() -> dict[str, Any]:
    tensors = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in arguments().items()}
    return {**tensors, "cu_seqlens": int32(0, 4, T)}


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_valid_calls_are_valid() -> None:
    assert nsa.nsa_attention(**arguments()).shape == (2, T, 4, 6)
    assert nsa.nsa_attention(**packed_arguments()).shape == (1, T, 4, 6)


TENSORS = [name for name in arguments() if name != "cfg"]


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_rank(name: str) -> None:
    x = arguments()
    x[name] = x[name][0]
    with pytest.raises(ValueError, match=rf"{name} must have shape \[.*\], got \[{', '.join(map(str, x[name].shape))}\]"):
        nsa.nsa_attention(**x)


@pytest.mark.parametrize("dim", [0, 2, 3])
@pytest.mark.parametrize("name", TENSORS)
def test_wrong_length_of_a_dimension(name: str, dim: int) -> None:
    x = arguments()
    x[name] = torch.cat([x[name], x[name]], dim)
    culprit = "k_cmp" if (name, dim) == ("q", 0) else name  # q says what the batch is
    with pytest.raises(ValueError, match=rf"{culprit} must have shape \[.*\], got \["):
        nsa.nsa_attention(**x)


@pytest.mark.parametrize("value", [None, 3, [[1.0]]], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_not_a_tensor(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got {type(value).__name__}"):
        nsa.nsa_attention(**{**arguments(), name: value})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_not_floating(name: str, dtype: torch.dtype) -> None:
    x = arguments()
    with pytest.raises(TypeError, match=rf"{name} must be fp16, bf16, fp32 or fp64, got {dtype}"):
        nsa.nsa_attention(**{**x, name: x[name].to(dtype)})


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "q"])
def test_mixed_dtypes(name: str) -> None:
    x = arguments()
    with pytest.raises(TypeError, match=rf"{name} must .*q's dtype torch\.float32, got torch\.float64"):
        nsa.nsa_attention(**{**x, name: x[name].double()})


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "q"])
def test_mixed_devices(name: str) -> None:
    x = arguments()
    with pytest.raises(ValueError, match=rf"{name} must be on q's device cpu, got meta"):
        nsa.nsa_attention(**{**x, name: x[name].to("meta")})


def test_mismatched_lengths() -> None:
    x = arguments()
    with pytest.raises(ValueError, match=r"v_slc must have shape \[2, 10, 2, 6\], got \[2, 9, 2, 6\]"):
        nsa.nsa_attention(**{**x, "v_slc": x["v_slc"][:, :-1]})
    with pytest.raises(ValueError, match=r"seqlen_k must be at least the 10 queries of q, got 9"):
        nsa.nsa_attention(**{**x, "k_win": x["k_win"][:, :-1], "v_win": x["v_win"][:, :-1]})
    with pytest.raises(ValueError, match=r"k_cmp must have at least the 4 compressed blocks of 10 tokens, got 3"):
        nsa.nsa_attention(**{**x, "k_cmp": x["k_cmp"][:, :-1], "v_cmp": x["v_cmp"][:, :-1]})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (11, ValueError, "k_slc must have at least seqlen_k=11 rows, got 10"),
        (9, ValueError, "seqlen_k must be at least the 10 queries of q, got 9"),
        (10.0, TypeError, r"seqlen_k must be an int or an int32 tensor \[B\], got float"),
        (True, TypeError, r"seqlen_k must be an int or an int32 tensor \[B\], got bool"),
        (torch.tensor([10, 10]), TypeError, r"seqlen_k must be int32, got torch\.int64"),
        (int32(10), ValueError, r"seqlen_k must have shape \[2\], got \[1\]"),
        (int32(10, 9), ValueError, "seqlen_k must be at least the 10 queries of q, got 9"),
        (int32(10, 12), ValueError, "k_slc must have at least seqlen_k=12 rows, got 10"),
        (int32(10, 10).to("meta"), ValueError, "seqlen_k must be on q's device cpu, got meta"),
    ],
    ids=str,
)
def test_seqlen_k(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nsa.nsa_attention(**arguments(), seqlen_k=value)


BAD_OFFSETS = [
    (int32(0, 6, 4), ValueError, "{name} must never fall, got 6 then 4 at index 2"),
    (int32(1, 4, 10), ValueError, "{name} must start at 0, got 1"),
    (int32(0, 4, 11), ValueError, "{name} must end within the 10 rows of .*, got 11"),
    (int32(0, 4, 10).long(), TypeError, r"{name} must be int32, got torch\.int64"),
    (int32(0, 4, 10).float(), TypeError, r"{name} must be int32, got torch\.float32"),
    (int32(0, 4, 10)[None], ValueError, r"{name} must have .*shape \[.*\], got \[1, 3\]"),
    (int32(), ValueError, "{name} must .*"),
    ([0, 4, 10], TypeError, r"{name} must be a torch\.Tensor, got list"),
    (int32(0, 4, 10).to("meta"), ValueError, "{name} must be on q's device cpu, got meta"),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD_OFFSETS, ids=[m for *_, m in BAD_OFFSETS])
@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seqlens_k"])
def test_offsets(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.format(name=name)):
        nsa.nsa_attention(**{**packed_arguments(), name: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cu_seqlens": None, "cu_seqlens_k": int32(0, 4, T)}, "cu_seqlens_k needs cu_seqlens, which is None"),
        ({"seqlen_k": T}, "seqlen_k must be None with cu_seqlens"),
        ({"cu_seqlens_k": int32(0, T)}, r"cu_seqlens_k must have cu_seqlens' shape \[3\], got \[2\]"),
        ({"cu_seqlens_k": int32(0, 3, 9)}, "cu_seqlens_k must give sequence 0 at least its 4 queries, got 3 keys"),
    ],
    ids=str,
)
def test_packing(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nsa.nsa_attention(**{**packed_arguments(), **changed})


def test_packing_needs_batch_size_one_and_enough_blocks() -> None:
    with pytest.raises(ValueError, match="q must have batch size 1 with cu_seqlens, got 2"):
        nsa.nsa_attention(**arguments(), cu_seqlens=int32(0, 4, T))
    x = packed_arguments()
    with pytest.raises(ValueError, match="k_cmp must have at least the 3 compressed blocks of these sequences, got 2"):
        nsa.nsa_attention(**{**x, "k_cmp": x["k_cmp"][:, :2], "v_cmp": x["v_cmp"][:, :2]})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(2, T, 2, 3), TypeError, r"block_indices must be int32, got torch\.float32"),
        (torch.zeros(2, T, 2, 3, dtype=torch.int64), TypeError, r"block_indices must be int32, got torch\.int64"),
        (int32(0), ValueError, r"block_indices must have shape \[2, 10, 2, width\], got \[1\]"),
        (int32(0).expand(2, T, 4, 3), ValueError, r"block_indices must have shape \[2, 10, 2, width\], got \[2, 10, 4, 3\]"),
        ([0], TypeError, r"block_indices must be a torch\.Tensor, got list"),
        (int32(0).expand(2, T, 2, 3).to("meta"), ValueError, "block_indices must be on q's device cpu, got meta"),
    ],
    ids=range(6),
)
def test_block_indices(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nsa.nsa_attention(**arguments(), block_indices=value)


def steps() -> dict[str, Callable[..., object]]:
    x = arguments()
    q, o = x["q"], torch.randn(2, T, 4, 6)
    lse = nsa.compressed_attention(q, x["k_cmp"], x["v_cmp"], CFG)[1]
    indices = nsa.select_blocks(q, x["k_cmp"], lse, CFG)
    return {
        "nsa_attention": lambda **kw: nsa.nsa_attention(**x, **kw),
        "compressed_attention": lambda **kw: nsa.compressed_attention(q, x["k_cmp"], x["v_cmp"], CFG, **kw),
        "select_blocks": lambda **kw: nsa.select_blocks(q, x["k_cmp"], lse, CFG, **kw),
        "selected_attention": lambda **kw: nsa.selected_attention(q, x["k_slc"], x["v_slc"], indices, CFG, **kw),
        "window_attention": lambda **kw: nsa.window_attention(q, x["k_win"], x["v_win"], CFG, **kw),
        "combine": lambda **kw: nsa.combine(o, o, o, x["gates"], **kw),
        "compress_blocks": lambda **kw: nsa.compress_blocks(x["k_slc"], CFG, **kw),
    }


@pytest.mark.parametrize("step", steps())
def test_unknown_backend(step: str) -> None:
    with pytest.raises(ValueError, match=r"backend 'cudnn' can't run .*: there is no such backend; the backends are reference"):
        steps()[step](backend="cudnn")


@pytest.mark.parametrize("step", steps())
def test_the_reference_can_be_named(step: str) -> None:
    call = steps()[step]
    torch.testing.assert_close(call(backend="reference"), call(), rtol=0, atol=0)


def test_steps_name_their_own_arguments() -> None:
    x = arguments()
    q, k, v = x["q"], x["k_slc"], x["v_slc"]
    lse = nsa.compressed_attention(q, x["k_cmp"], x["v_cmp"], CFG)[1]
    with pytest.raises(ValueError, match=r"q must have shape \[B, TQ, 4, 4\], got \[2, 10, 2, 4\]"):
        nsa.window_attention(k, k, v, CFG)
    with pytest.raises(ValueError, match=r"v must have shape \[2, 10, 2, 6\], got \[2, 10, 2, 4\]"):
        nsa.window_attention(q, k, k, CFG)
    with pytest.raises(ValueError, match=r"seqlen_k must be at least the 10 queries of q, got 8"):
        nsa.window_attention(q, k[:, :8], v[:, :8], CFG)
    with pytest.raises(TypeError, match="indices must be int32"):
        nsa.selected_attention(q, k, v, torch.zeros(2, T, 2, 1), CFG)
    with pytest.raises(ValueError, match=r"lse must have shape \[2, 10, 4\], got \[2, 10, 3\]"):
        nsa.select_blocks(q, x["k_cmp"], lse[..., :3], CFG)
    with pytest.raises(TypeError, match=r"lse must be torch\.float32 for q of torch\.float16, got torch\.float16"):
        nsa.select_blocks(q.half(), x["k_cmp"].half(), lse.half(), CFG)
    with pytest.raises(TypeError, match=r"cfg must be an nsa\.NSAConfig, got dict"):
        nsa.window_attention(q, k, v, {})
    o = torch.randn(2, T, 4, 6)
    with pytest.raises(ValueError, match=r"o_slc must have shape \[2, 10, 4, 6\], got \[2, 9, 4, 6\]"):
        nsa.combine(o, o[:, 1:], o, x["gates"])
    with pytest.raises(ValueError, match=r"gates must have shape \[2, 10, 4, 3\], got \[2, 10, 4, 2\]"):
        nsa.combine(o, o, o, x["gates"][..., :2])
    with pytest.raises(TypeError, match=r"gates must be fp32 or have o_cmp's dtype torch\.float16, got torch\.float64"):
        nsa.combine(o.half(), o.half(), o.half(), x["gates"].double())


X, EMBEDDING, FIRST, SECOND = torch.randn(1, 9, 2, 4), torch.randn(4, 4), torch.randn(8, 16), torch.randn(4, 8)


@pytest.mark.parametrize(
    ("embedding", "weights", "error", "message"),
    [
        (None, (FIRST, SECOND), TypeError, r"embedding must be a torch\.Tensor, got NoneType"),
        (EMBEDDING[:3], (FIRST, SECOND), ValueError, r"embedding must have shape \[4, 4\], got \[3, 4\]"),
        (EMBEDDING, (), ValueError, r"embedding must be None without weights, got a tensor of shape \[4, 4\]"),
        (EMBEDDING, (FIRST[:, :8],), ValueError, r"weights\[0\] must have shape \[4, 16\], got \[8, 8\]"),
        (EMBEDDING, (FIRST,), ValueError, r"weights\[0\] must have shape \[4, 16\], got \[8, 16\]"),
        (EMBEDDING, (FIRST, SECOND[:, :7]), ValueError, r"weights\[1\] must have shape \[4, 8\], got \[4, 7\]"),
        (EMBEDDING, (FIRST, FIRST), ValueError, r"weights\[1\] must have shape \[4, 8\], got \[8, 16\]"),
        (EMBEDDING, (FIRST, SECOND, SECOND), ValueError, r"weights must be \(\), \(w,\) or \(w1, w2\), got 3 tensors"),
        (EMBEDDING, (FIRST.double(), SECOND), TypeError, r"weights\[0\] must have x's dtype .*32, got torch\.float64"),
        (EMBEDDING, (FIRST, SECOND.half()), TypeError, r"weights\[1\] must have x's dtype torch\.float32, got torch\.float16"),
        (EMBEDDING.long(), (FIRST, SECOND), TypeError, r"embedding must be fp16, bf16, fp32 or fp64, got torch\.int64"),
        (EMBEDDING.to("meta"), (FIRST, SECOND), ValueError, "embedding must be on x's device cpu, got meta"),
    ],
    ids=range(12),
)
def test_compress_blocks(embedding: object, weights: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nsa.compress_blocks(X, CFG, embedding, weights)


def test_compress_blocks_packed() -> None:
    with pytest.raises(ValueError, match="x must have batch size 1 with cu_seqlens, got 2"):
        nsa.compress_blocks(torch.cat([X, X]), CFG, cu_seqlens=int32(0, 9))
    with pytest.raises(ValueError, match="cu_seqlens must end within the 9 rows of x, got 10"):
        nsa.compress_blocks(X, CFG, cu_seqlens=int32(0, 10))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nsa.BlockCompressor(4, CFG, "max"), ValueError, "kind must be 'mlp', 'linear' or 'mean', got 'max'"),
        (lambda: nsa.BlockCompressor(0, CFG), ValueError, "dim and hidden must be positive, got 0"),
        (lambda: nsa.BlockCompressor(4, None), TypeError, r"cfg must be an nsa\.NSAConfig, got NoneType"),
        (lambda: nsa.NativeSparseAttention(0, CFG), ValueError, "hidden_size must be positive, got 0"),
        (lambda: nsa.NativeSparseAttention(8, CFG, gate_input="key"), ValueError, "gate_input must be 'hidden' or 'query'"),
        (lambda: nsa.NativeSparseAttention(8, nsa.NSAConfig(3, 2)), ValueError, "head_dim must be even for RoPE, got 3"),
        (lambda: nsa.NativeSparseAttention(8, CFG, compressor="max"), ValueError, "kind must be"),
        (lambda: nsa.NativeSparseAttention(8, CFG)(torch.randn(2, 3, 7)), ValueError, r"x must have shape \[B, T, 8\], got"),
        (
            lambda: nsa.NativeSparseAttention(8, CFG)(torch.randn(2, 3, 8), cu_seqlens=int32(0, 3)),
            ValueError,
            "x must have batch size 1 with cu_seqlens, got 2",
        ),
        (lambda: nsa.NativeSparseAttention(8, CFG)(torch.randn(2, 3, 8), cache={}), TypeError, "cache must be an nsa.NSACache"),
    ],
    ids=range(10),
)
def test_layers(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
