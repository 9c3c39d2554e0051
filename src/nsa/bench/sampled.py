"""The formulas of NSA for a sample of queries, in any precision: what the benchmark checks its tensors against.

Only the sampled queries are computed, each over the keys that it reads, so this fits beside the timed tensors at any length,
and autograd through it gives the exact gradient of every key where the output's gradient is 0 outside the sample. It shares
no code with the backends. Symbols: S sampled queries; the tensors have no batch axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.config import NSAConfig


@dataclass(frozen=True)
class Sample:
    """``positions`` int64 ``[S]``, rising, and the blocks that these queries selected, int64 ``[S, HK, n]``, -1 padded."""

    cfg: NSAConfig
    positions: Tensor
    indices: Tensor


def compress(x: Tensor, cfg: NSAConfig) -> Tensor:
    """The mean of every block: ``[T, HK, D]`` to ``[N, HK, D]``. Equation 7 with phi the mean."""
    n, covers = cfg.num_compressed_blocks(x.shape[0]), cfg.block_length // cfg.block_stride
    strides = x[: (n + covers - 1) * cfg.block_stride].reshape(-1, cfg.block_stride, *x.shape[1:]).mean(1)
    return torch.stack([strides[r : r + n] for r in range(covers)]).mean(0)


def compressed_weights(q: Tensor, k_cmp: Tensor, sample: Sample) -> Tensor:
    """Softmax over the blocks that each query sees, 0 for the others: ``[S, HK, G, N]``."""
    cfg = sample.cfg
    last = torch.arange(k_cmp.shape[0], device=q.device) * cfg.block_stride + cfg.block_length - 1
    visible = last <= sample.positions[:, None]  # [S, N]
    scores = torch.einsum("shgd,nhd->shgn", _by_group(q, cfg), k_cmp) * cfg.softmax_scale
    return _softmax(scores, visible[:, None, None])


def compressed(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, sample: Sample) -> Tensor:
    """q ``[S, HQ, D]``, k_cmp ``[N, HK, D]``, v_cmp ``[N, HK, DV]``: ``[S, HQ, DV]``."""
    return torch.einsum("shgn,nhd->shgd", compressed_weights(q, k_cmp, sample), v_cmp).flatten(1, 2)


def selected(q: Tensor, k: Tensor, v: Tensor, sample: Sample) -> Tensor:
    """Equation 11: over the tokens at or before each query in the blocks that it selected. k, v ``[T, HK, ...]``."""
    within = torch.arange(sample.cfg.selection_block_size, device=q.device)
    tokens = (sample.indices[..., None] * sample.cfg.selection_block_size + within).flatten(-2)  # [S, HK, n * s]
    visible = (tokens >= 0) & (tokens <= sample.positions[:, None, None])
    return _over_tokens(q, k, v, tokens, visible, sample.cfg)


def window(q: Tensor, k: Tensor, v: Tensor, sample: Sample) -> Tensor:
    """Over the last w tokens, each query's own included."""
    cfg = sample.cfg
    tokens = sample.positions[:, None] - torch.arange(cfg.window_size, device=q.device)  # [S, w]
    tokens = tokens[:, None].expand(-1, cfg.num_kv_heads, -1)
    return _over_tokens(q, k, v, tokens, tokens >= 0, cfg)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Equation 5. gates ``[S, HQ, 3]``."""
    return gates[..., :1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:] * o_win


def whole(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, sample: Sample) -> Tensor:
    """All steps on one set of keys and values, with the sample's selections."""
    o_cmp = compressed(q, compress(k, sample.cfg), compress(v, sample.cfg), sample)
    return combine(o_cmp, selected(q, k, v, sample), window(q, k, v, sample), gates)


def importance(q: Tensor, k_cmp: Tensor, seq_len: int, sample: Sample) -> Tensor:
    """Equations 8-10: how much each selection block matters, ``[S, HK, M]`` for the M blocks of ``seq_len`` tokens."""
    cfg = sample.cfg
    p = compressed_weights(q, k_cmp, sample).sum(2)  # [S, HK, N]
    per_block, covers = cfg.selection_block_size // cfg.block_stride, cfg.block_length // cfg.block_stride
    first = torch.arange(cfg.num_selection_blocks(seq_len), device=q.device) * per_block
    total = p.new_zeros(*p.shape[:2], len(first))
    for m in range(per_block):
        for r in range(covers):
            i = first + m - r
            inside = (i >= 0) & (i < p.shape[-1])
            total += torch.where(inside, p[..., i.clamp(0, p.shape[-1] - 1)], 0)
    return total


FORMULAS: dict[str, Callable[[dict[str, Tensor], Sample], tuple[Tensor, ...]]] = {
    "compress": lambda x, at: (compress(x["k"], at.cfg), compress(x["v"], at.cfg)),
    "compressed": lambda x, at: (compressed(**x, sample=at),),
    "selected": lambda x, at: (selected(**x, sample=at),),
    "window": lambda x, at: (window(**x, sample=at),),
    "combine": lambda x, at: (combine(**x),),
    "whole": lambda x, at: (whole(**x, sample=at),),
}


def _over_tokens(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, visible: Tensor, cfg: NSAConfig) -> Tensor:
    """Attention of each query over tokens of its own, ``[S, HK, W]`` for each key/value head."""
    head = torch.arange(cfg.num_kv_heads, device=q.device)[None, :, None]
    tokens = tokens.clamp(0, k.shape[0] - 1)
    scores = torch.einsum("shgd,shwd->shgw", _by_group(q, cfg), k[tokens, head]) * cfg.softmax_scale
    return torch.einsum("shgw,shwd->shgd", _softmax(scores, visible[:, :, None]), v[tokens, head]).flatten(1, 2)


def _by_group(q: Tensor, cfg: NSAConfig) -> Tensor:
    return q.reshape(-1, cfg.num_kv_heads, cfg.group_size, q.shape[-1])


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Over the last axis; all 0, with gradient 0, where nothing is visible."""
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible.any(-1, keepdim=True)
