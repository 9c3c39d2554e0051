"""The public steps of Native Sparse Attention, and the whole.

Symbols: B batch, T tokens, TQ queries, HQ/HK query and key/value heads, D/DV their channels, N compressed blocks, n selected
blocks, l, d, s, w the sizes in ``NSAConfig``. Arguments that every step shares:

* ``cu_seqlens`` int32 ``[num_seqs + 1]`` or None: row offsets of packed sequences; the batch size is then 1, and each sequence
  is computed as if alone.
* ``cu_seqlens_k`` int32 ``[num_seqs + 1]`` or None: the same for the keys where they are more than the queries; default
  ``cu_seqlens``. Compressed tensors hold the ``N`` blocks of each sequence in order, from row 0.
* ``seqlen_k`` int, int32 ``[B]`` on the tensors' device, or None: how many key tokens count; default the key tensor's length,
  or TQ for a step that has only compressed keys. The queries are the last TQ of these positions. Rows past them are ignored.
* ``backend`` ``"reference"``, ``"triton"`` or None to pick by device: the kernels on a GPU, else the reference. A named backend
  never falls back.

Under ``torch.autocast`` fp32 arguments are cast to its dtype first.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from nsa import _dispatch, _validate
from nsa._autocast import autocast
from nsa.config import NSAConfig

Lengths = int | Tensor | None


@overload
def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    seqlen_k: Lengths = ...,
    block_indices: Tensor | None = ...,
    return_block_indices: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    seqlen_k: Lengths = ...,
    block_indices: Tensor | None = ...,
    return_block_indices: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@autocast
def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlen_k: Lengths = None,
    block_indices: Tensor | None = None,
    return_block_indices: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention: compressed, selected and window attention, mixed by gates.

    Args:
        q: ``[B, TQ, HQ, D]`` fp16, bf16, fp32 (fp64 with the reference).
        k_cmp, v_cmp: compressed keys and values ``[B, N, HK, D]``, ``[B, N, HK, DV]``, from a ``BlockCompressor``.
        k_slc, v_slc, k_win, v_win: keys ``[B, T, HK, D]`` and values ``[B, T, HK, DV]`` of the selected and the window
            branch; the same tensors may be passed to both.
        gates: ``[B, TQ, HQ, 3]`` for compressed, selected, window, already through the sigmoid; q's dtype or fp32.
        cfg: the block sizes and counts.
        block_indices: int32 ``[B, TQ, HK, width]`` or None: the set of blocks each query reads instead of the
            selection; any order, duplicates count once, negatives and blocks in a query's future are ignored.
        return_block_indices: also return the block indices that were read.
        cu_seqlens, cu_seqlens_k, seqlen_k, backend: see the module's text.

    Returns:
        ``[B, TQ, HQ, DV]`` in q's dtype; with ``return_block_indices`` also int32 ``[B, TQ, HK, n]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    Source: arXiv 2502.11089, equations 5-12.
    """
    _validate.config(cfg)
    q = _validate.queries(q, cfg)
    _validate.keys_values("_cmp", k_cmp, v_cmp, q, cfg)
    _validate.keys_values("_slc", k_slc, v_slc, q, cfg)
    _validate.keys_values("_win", k_win, v_win, q, cfg)
    _validate.tensor("gates", gates, (q.shape[0], q.shape[1], cfg.num_heads, 3))
    _validate.gates(gates, q)
    if block_indices is not None:
        _validate.indices("block_indices", block_indices, q, cfg)
    rows = {"k_slc": k_slc.shape[1], "k_win": k_win.shape[1]}
    info = _validate.layout(q, cfg, cu_seqlens, cu_seqlens_k, seqlen_k, rows, k_cmp.shape[1])
    impl = _dispatch.choose(backend, q.device, q.dtype, cfg)

    o, block_indices = impl.attention(q, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), gates, block_indices, cfg, info)
    return (o, block_indices) if return_block_indices else o


@autocast
def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlen_k: Lengths = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed blocks that end at or before each query.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k_cmp, v_cmp: ``[B, N, HK, D]``, ``[B, N, HK, DV]``.
        cu_seqlens, cu_seqlens_k, seqlen_k, backend: see the module's text.

    Returns:
        The output ``[B, TQ, HQ, DV]`` in q's dtype and ``lse [B, TQ, HQ]``, natural log, fp32 (fp64 for fp64), which
        carries no gradient. A query that sees no block gets 0 and ``-inf``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    Source: arXiv 2502.11089, equation 7.
    """
    _validate.config(cfg)
    q = _validate.queries(q, cfg)
    _validate.keys_values("_cmp", k_cmp, v_cmp, q, cfg)
    info = _validate.layout(q, cfg, cu_seqlens, cu_seqlens_k, seqlen_k, {}, k_cmp.shape[1])
    return _dispatch.choose(backend, q.device, q.dtype, cfg).compressed_attention(q, k_cmp, v_cmp, cfg, info)


@autocast
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlen_k: Lengths = None,
    backend: str | None = None,
) -> Tensor:
    """The blocks each query reads: the forced ones, then those of the highest importance, ties to the lowest.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k_cmp: ``[B, N, HK, D]``.
        lse: ``[B, TQ, HQ]`` from ``compressed_attention`` of the same tensors.
        cu_seqlens, cu_seqlens_k, seqlen_k, backend: see the module's text.

    Returns:
        int32 ``[B, TQ, HK, n]``, ascending, padded with -1; carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    Source: arXiv 2502.11089, equations 8-11.
    """
    _validate.config(cfg)
    q = _validate.queries(q, cfg)
    _validate.tensor("k_cmp", k_cmp, (q.shape[0], "N", cfg.num_kv_heads, cfg.head_dim), ("q", q))
    _validate.lse(lse, q)
    info = _validate.layout(q, cfg, cu_seqlens, cu_seqlens_k, seqlen_k, {}, k_cmp.shape[1])
    return _dispatch.choose(backend, q.device, q.dtype, cfg).select_blocks(q, k_cmp, lse, cfg, info)


@autocast
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlen_k: Lengths = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over the tokens, at or before each query, of the blocks it selected.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k, v: ``[B, T, HK, D]``, ``[B, T, HK, DV]``.
        indices: int32 ``[B, TQ, HK, width]``, a set per query: any order and width, duplicates count once, negatives
            and blocks in a query's future are ignored.
        cu_seqlens, cu_seqlens_k, seqlen_k, backend: see the module's text.

    Returns:
        ``[B, TQ, HQ, DV]`` in q's dtype; 0 where a query selected nothing.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    Source: arXiv 2502.11089, equations 11-12.
    """
    _validate.config(cfg)
    q = _validate.queries(q, cfg)
    _validate.keys_values("", k, v, q, cfg)
    _validate.indices("indices", indices, q, cfg)
    info = _validate.layout(q, cfg, cu_seqlens, cu_seqlens_k, seqlen_k, {"k": k.shape[1]}, None)
    return _dispatch.choose(backend, q.device, q.dtype, cfg).selected_attention(q, k, v, indices, cfg, info)


@autocast
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlen_k: Lengths = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over the last ``cfg.window_size`` tokens, each query's own included.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k, v: ``[B, T, HK, D]``, ``[B, T, HK, DV]``.
        cu_seqlens, cu_seqlens_k, seqlen_k, backend: see the module's text.

    Returns:
        ``[B, TQ, HQ, DV]`` in q's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    Source: arXiv 2502.11089, section 3.3.3.
    """
    _validate.config(cfg)
    q = _validate.queries(q, cfg)
    _validate.keys_values("", k, v, q, cfg)
    info = _validate.layout(q, cfg, cu_seqlens, cu_seqlens_k, seqlen_k, {"k": k.shape[1]}, None)
    return _dispatch.choose(backend, q.device, q.dtype, cfg).window_attention(q, k, v, cfg, info)


@autocast
def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, *, backend: str | None = None) -> Tensor:
    """``gates[..., 0] * o_cmp + gates[..., 1] * o_slc + gates[..., 2] * o_win``.

    Args:
        o_cmp, o_slc, o_win: ``[B, T, HQ, DV]``.
        gates: ``[B, T, HQ, 3]``, already through the sigmoid; the outputs' dtype or fp32.
        backend: see the module's text.

    Returns:
        ``[B, T, HQ, DV]`` in the dtype of ``o_cmp``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    Source: arXiv 2502.11089, equation 5.
    """
    o_cmp = _validate.tensor("o_cmp", o_cmp, ("B", "T", "HQ", "DV"))
    for name, o in (("o_slc", o_slc), ("o_win", o_win)):
        _validate.tensor(name, o, tuple(o_cmp.shape), ("o_cmp", o_cmp))
    _validate.gates(gates, o_cmp, "o_cmp")
    return _dispatch.choose(backend, o_cmp.device, o_cmp.dtype).combine(o_cmp, o_slc, o_win, gates)


@autocast
def compress_blocks(
    x: Tensor,
    cfg: NSAConfig,
    embedding: Tensor | None = None,
    weights: tuple[Tensor, ...] = (),
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every block of ``l`` tokens as one; what ``BlockCompressor`` calls with its weights.

    Args:
        x: keys or values ``[B, T, HK, D]``.
        embedding: ``[l, D]``, added to each block; None with the mean.
        weights: ``()`` for the mean, ``(w [D, l*D],)`` linear, ``(w1 [hidden, l*D], w2 [D, hidden])`` with SiLU between.
        cu_seqlens, backend: see the module's text.

    Returns:
        ``[B, N, HK, D]``; with ``cu_seqlens`` ``[1, T // d, HK, D]``, of which sequence ``b`` owns ``N(T_b)`` rows, in
        order from row 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    Source: arXiv 2502.11089, equation 7.
    """
    _validate.config(cfg)
    x = _validate.tensor("x", x, ("B", "T", "HK", "D"))
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"x must have batch size 1 with cu_seqlens, got {x.shape[0]}")
        _validate.cu_seqlens("cu_seqlens", cu_seqlens, x, x.shape[1], "x")
    _validate.compressor(x, cfg, embedding, weights)
    return _dispatch.choose(backend, x.device, x.dtype, cfg).compress_blocks(x, cfg, cu_seqlens, embedding, weights)
