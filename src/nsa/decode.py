"""Attention of the newest tokens over what a cache holds."""

from __future__ import annotations

from torch import Tensor

from nsa import _dispatch, _validate
from nsa.cache import NSACache
from nsa.cache_store import STEP
from nsa.decode_ops import decode
from nsa.functional import combine, compressed_attention, select_blocks, selected_attention, window_attention


def cached_attention(
    q: Tensor, gates: Tensor, cache: NSACache, *, return_block_indices: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention of the newest tokens over all that the cache holds.

    The kernels take up to 16 tokens in place; more of them, and the reference, go through the steps of ``nsa_attention``.
    They wait for nothing and depend on no length on the host, so a CUDA graph can hold them. No gradient comes back.

    Args:
        q: ``[B, TQ, HQ, D]``, queries of the last TQ tokens, which were appended before.
        gates: ``[B, TQ, HQ, 3]``, already through the sigmoid.
        cache: the layer's cache.
        return_block_indices: also return int32 ``[B, TQ, HK, n]``.
        backend: as in ``nsa_attention``.

    Returns:
        ``[B, TQ, HQ, DV]``: what the full forward over the same tokens gives at these positions.

    Raises:
        TypeError, ValueError: wrong shape, dtype or device, more queries than a sequence has tokens, or more than 16 that were
            not appended at once and last.
    """
    if not isinstance(cache, NSACache):
        raise TypeError(f"cache must be an nsa.NSACache, got {type(cache).__name__}")
    cfg, view = cache.cfg, cache.view()
    q = _validate.queries(q, cfg)
    if q.shape[0] != cache.batch_size:
        raise ValueError(f"q must have the cache's batch size {cache.batch_size}, got {q.shape[0]}")
    if q.shape[1] > min(cache.lengths) and not cache.frozen:
        raise ValueError(f"q must be at most the {min(cache.lengths)} tokens that were appended, got {q.shape[1]}")
    _validate.tensor("gates", gates, (*q.shape[:3], 3))
    if (backend or _dispatch.default(q.device)) == "triton" and q.shape[1] <= STEP:
        _dispatch.choose(backend, q.device, q.dtype, cfg)
        _validate.tensor("q", q, tuple(q.shape), ("the cache", view.k_slc))
        _validate.gates(gates, q)
        o, indices = decode(q, gates, view)
        return (o, indices) if return_block_indices else o
    if cache.frozen:
        raise ValueError(f"a graph can hold at most {STEP} queries of the kernels, got {q.shape[1]} with backend={backend!r}")
    k_cmp, v_cmp = view.compressed()
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, cfg, seqlen_k=view.seqlen_k, backend=backend)
    indices = select_blocks(q, k_cmp, lse, cfg, seqlen_k=view.seqlen_k, backend=backend)
    o_slc = selected_attention(q, *view.selected(), indices, cfg, seqlen_k=view.seqlen_k, backend=backend)
    k_win, v_win, lens = view.window(q.shape[1])
    o_win = window_attention(q, k_win, v_win, cfg, seqlen_k=lens, backend=backend)
    o = combine(o_cmp, o_slc, o_win, gates, backend=backend)
    return (o, indices) if return_block_indices else o
