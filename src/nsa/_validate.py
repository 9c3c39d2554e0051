"""Checks of what callers pass: shapes, dtypes and devices everywhere, values only where reading them is free."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.layout import SeqInfo

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def config(cfg: object) -> None:
    if not isinstance(cfg, NSAConfig):
        raise TypeError(f"cfg must be an nsa.NSAConfig, got {type(cfg).__name__}")


def tensor(name: str, x: object, shape: tuple[int | str, ...], like: tuple[str, Tensor] | None = None) -> Tensor:
    """``x`` if it is a floating tensor of ``shape``, where a str stands for any length and names it.

    With ``like`` it must also share that tensor's dtype and device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {x.dtype}")
    _shape(name, x, shape)
    if like is not None:
        other, y = like
        if x.dtype != y.dtype:
            raise TypeError(f"{name} must have {other}'s dtype {y.dtype}, got {x.dtype}")
        _device(name, x, other, y)
    return x


def queries(q: object, cfg: NSAConfig) -> Tensor:
    return tensor("q", q, ("B", "TQ", cfg.num_heads, cfg.head_dim))


def keys_values(name: str, k: object, v: object, q: Tensor, cfg: NSAConfig) -> None:
    """``k [B, T, HK, D]`` and ``v [B, T, HK, DV]``; ``name`` is the arguments' suffix, as in ``k_slc``."""
    k = tensor(f"k{name}", k, (q.shape[0], "T", cfg.num_kv_heads, cfg.head_dim), ("q", q))
    tensor(f"v{name}", v, (q.shape[0], k.shape[1], cfg.num_kv_heads, cfg.value_dim), ("q", q))


def lse(x: object, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"lse must be a torch.Tensor, got {type(x).__name__}")
    needed = torch.float64 if q.dtype == torch.float64 else torch.float32
    if x.dtype != needed:
        raise TypeError(f"lse must be {needed} for q of {q.dtype}, got {x.dtype}")
    _shape("lse", x, tuple(q.shape[:3]))
    _device("lse", x, "q", q)


def gates(x: object, o: Tensor, name: str = "q") -> None:
    """``[B, T, HQ, 3]`` in the dtype of ``o`` or fp32."""
    if not isinstance(x, Tensor):
        raise TypeError(f"gates must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (o.dtype, torch.float32):
        raise TypeError(f"gates must be fp32 or have {name}'s dtype {o.dtype}, got {x.dtype}")
    _shape("gates", x, (*o.shape[:3], 3))
    _device("gates", x, name, o)


def indices(name: str, x: object, q: Tensor, cfg: NSAConfig) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}")
    _shape(name, x, (q.shape[0], q.shape[1], cfg.num_kv_heads, "width"))
    _device(name, x, "q", q)


def compressor(x: Tensor, cfg: NSAConfig, embedding: object, weights: tuple[object, ...]) -> None:
    """The embedding and weights of ``compress_blocks``."""
    dim, length = x.shape[3], cfg.block_length
    if len(weights) > 2:
        raise ValueError(f"weights must be (), (w,) or (w1, w2), got {len(weights)} tensors")
    if not weights:
        if embedding is not None:
            shape = list(embedding.shape) if isinstance(embedding, Tensor) else embedding
            raise ValueError(f"embedding must be None without weights, got a tensor of shape {shape}")
        return
    first = tensor("weights[0]", weights[0], ("hidden" if len(weights) == 2 else dim, length * dim))
    named: list[tuple[str, object, tuple[int | str, ...]]] = [
        ("embedding", embedding, (length, dim)),
        ("weights[0]", first, tuple(first.shape)),
        *(("weights[1]", w, (dim, first.shape[0])) for w in weights[1:]),
    ]
    for name, y, shape in named:
        tensor(name, y, shape, ("x", x))


def layout(
    q: Tensor,
    cfg: NSAConfig,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen_k: int | Tensor | None,
    key_rows: dict[str, int],
    cmp_rows: int | None,
) -> SeqInfo:
    """The call's ``SeqInfo``, after checking it against the rows that the key tensors have.

    ``key_rows`` maps the names of the uncompressed key tensors to their lengths, ``cmp_rows`` is that of the compressed ones.
    """
    if cu_seqlens is not None:
        return _packed(q, cfg, cu_seqlens, cu_seqlens_k, seqlen_k, key_rows, cmp_rows)
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, which is None")
    num_queries = q.shape[1]
    if seqlen_k is None:
        seqlen_k = min(key_rows.values()) if key_rows else num_queries
    if isinstance(seqlen_k, bool) or not isinstance(seqlen_k, (int, Tensor)):
        raise TypeError(f"seqlen_k must be an int or an int32 tensor [B], got {type(seqlen_k).__name__}")
    info = SeqInfo(q.shape[0], num_queries, seqlen_k)
    if isinstance(seqlen_k, int):
        _check_lengths(num_queries, [seqlen_k], cfg, key_rows, cmp_rows)
    else:
        int32("seqlen_k", seqlen_k, (q.shape[0],), q)
        if readable(seqlen_k):
            _check_lengths(num_queries, seqlen_k.tolist(), cfg, key_rows, cmp_rows)
    return info


def readable(x: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation and no graph break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def int32(name: str, x: object, shape: tuple[int | str, ...], q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}")
    _shape(name, x, shape)
    _device(name, x, "q", q)


def cu_seqlens(name: str, x: object, q: Tensor, rows: int, rows_name: str) -> None:
    """int32 ``[num_seqs + 1]``, from 0, never falling, within ``rows``."""
    int32(name, x, ("num_seqs + 1",), q)
    assert isinstance(x, Tensor)
    if x.numel() < 1:
        raise ValueError(f"{name} must hold num_seqs + 1 offsets, got an empty tensor")
    if not readable(x):
        return
    values = x.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if b < a:
            raise ValueError(f"{name} must never fall, got {a} then {b} at index {i + 1}")
    if values[-1] > rows:
        raise ValueError(f"{name} must end within the {rows} rows of {rows_name}, got {values[-1]}")


def _packed(
    q: Tensor,
    cfg: NSAConfig,
    cu_q: Tensor,
    cu_k: Tensor | None,
    seqlen_k: int | Tensor | None,
    key_rows: dict[str, int],
    cmp_rows: int | None,
) -> SeqInfo:
    if q.shape[0] != 1:
        raise ValueError(f"q must have batch size 1 with cu_seqlens, got {q.shape[0]}")
    if seqlen_k is not None:
        raise ValueError("seqlen_k must be None with cu_seqlens; cu_seqlens_k gives the key lengths")
    cu_seqlens("cu_seqlens", cu_q, q, q.shape[1], "q")
    if cu_k is None:
        cu_k = cu_q
    int32("cu_seqlens_k", cu_k, ("num_seqs + 1",), q)
    if cu_k.shape != cu_q.shape:
        raise ValueError(f"cu_seqlens_k must have cu_seqlens' shape {list(cu_q.shape)}, got {list(cu_k.shape)}")
    name, rows = min(key_rows.items(), key=lambda item: item[1]) if key_rows else ("the keys", 2**31 - 1)
    cu_seqlens("cu_seqlens_k", cu_k, q, rows, name)
    if readable(cu_q) and readable(cu_k):
        lens_q, lens_k = cu_q.diff().tolist(), cu_k.diff().tolist()
        for b, (a, k_len) in enumerate(zip(lens_q, lens_k)):
            if k_len < a:
                raise ValueError(f"cu_seqlens_k must give sequence {b} at least its {a} queries, got {k_len} keys")
        needed = sum(cfg.num_compressed_blocks(k_len) for k_len in lens_k)
        if cmp_rows is not None and cmp_rows < needed:
            raise ValueError(f"k_cmp must have at least the {needed} compressed blocks of these sequences, got {cmp_rows}")
    return SeqInfo(1, q.shape[1], None, cu_q, cu_k)


def _check_lengths(
    num_queries: int, lengths: list[int], cfg: NSAConfig, key_rows: dict[str, int], cmp_rows: int | None
) -> None:
    for length in lengths:
        if length < num_queries:
            raise ValueError(f"seqlen_k must be at least the {num_queries} queries of q, got {length}")
        for name, rows in key_rows.items():
            if rows < length:
                raise ValueError(f"{name} must have at least seqlen_k={length} rows, got {rows}")
        needed = cfg.num_compressed_blocks(length)
        if cmp_rows is not None and cmp_rows < needed:
            raise ValueError(f"k_cmp must have at least the {needed} compressed blocks of {length} tokens, got {cmp_rows}")


def _shape(name: str, x: Tensor, shape: tuple[int | str, ...]) -> None:
    fits = x.dim() == len(shape) and all(isinstance(n, str) or m == n for m, n in zip(x.shape, shape))
    if not fits:
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(x.shape)}")


def _device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} must be on {other}'s device {y.device}, got {x.device}")
