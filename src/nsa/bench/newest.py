"""Check what was computed for the newest tokens of a cache, whatever its length, against the reference in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.cache import NSACache
from nsa.functional import combine, compressed_attention, selected_attention, window_attention
from nsa.reference.chunks import Chunk
from nsa.reference.select import block_importance

RELATIVE_NORM = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
SCORE_ROUNDING = 2e-5
CHECKED = 2  # sequences of a batch


class WrongStep(Exception):
    """A step that was to be timed is wrong."""


@torch.no_grad()
def check_newest(what: str, cache: NSACache, q: Tensor, gates: Tensor, o: Tensor, indices: Tensor) -> float:
    """The relative error of the newest TQ tokens of the first sequences, which are all of one length.

    q ``[B, TQ, HQ, D]``, gates ``[B, TQ, HQ, 3]``, o ``[B, TQ, HQ, DV]``, indices int32 ``[B, TQ, HK, n]``.

    Raises:
        WrongStep: it is past the bound, not finite, or blocks of less importance were selected before others.
    """
    want, importance = _exact(cache, q, gates, indices)
    error = float((o[:CHECKED].double() - want).norm() / want.norm())
    if not (torch.isfinite(o).all() and error < RELATIVE_NORM[o.dtype]):
        raise WrongStep(f"{what}: relative error {error:.1e}")
    for t in range(q.shape[1]):
        if _passed_over(cache, importance[:, :, t], indices[:CHECKED, t].long(), cache.lengths[0] - q.shape[1] + t):
            raise WrongStep(f"{what}: a block of less importance was selected before one of more")
    return error


def _passed_over(cache: NSACache, importance: Tensor, chosen: Tensor, position: int) -> bool:
    """Whether a block of more ``importance [b, HK, M]`` than a ``chosen [b, HK, n]`` one was left out."""
    cfg, own = cache.cfg, position // cache.cfg.selection_block_size
    block = torch.arange(own + 1, device=chosen.device)
    forced = (block < cfg.num_initial_blocks) | (block > own - cfg.num_local_blocks)
    score = importance[..., : own + 1].masked_fill(forced, torch.inf)
    taken = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen.clamp_min(0), True)
    low, high = score.masked_fill(~taken, torch.inf).amin(-1), score.masked_fill(taken, -1).amax(-1)
    return bool((low < high * (1 - SCORE_ROUNDING)).any())


def _exact(cache: NSACache, q: Tensor, gates: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The output on these blocks and the importance of all blocks ``[b, HK, TQ, M]``, in fp64."""
    cfg, view, tokens, count = cache.cfg, cache.view(), cache.lengths[0], q.shape[1]

    def some(x: Tensor) -> Tensor:
        return x[:CHECKED].double()

    q, gates, indices = some(q), some(gates), indices[:CHECKED]
    k, v = map(some, view.compressed())
    o_cmp, lse = compressed_attention(q, k, v, cfg, seqlen_k=tokens, backend="reference")
    importance = block_importance(q, k, lse, Chunk(slice(0, count), tokens - count, tokens), cfg)
    k, v = map(some, view.selected())
    o_slc = selected_attention(q, k, v, indices, cfg, seqlen_k=tokens, backend="reference")
    k, v, lengths = view.window(count)
    o_win = window_attention(q, some(k), some(v), cfg, seqlen_k=lengths, backend="reference")
    return combine(o_cmp, o_slc, o_win, gates, backend="reference"), importance
