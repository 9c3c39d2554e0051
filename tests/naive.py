"""Attention as one would first write it: dense masks, whole score matrices, every intermediate in the inputs' own dtype.

In 16 bits its error is what the format costs when nobody takes care. ``tests/tolerance.py`` measures kernels against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa import NSAConfig
from tests.cases import Case, Inputs


@dataclass
class Steps:
    """What the steps but the selection return, in the shapes that the public functions return."""

    o_cmp: Tensor
    lse: Tensor
    o_slc: Tensor
    o_win: Tensor
    o: Tensor


def nsa_steps(case: Case, x: Inputs, indices: Tensor) -> Steps:
    """All steps over the given selection ``[B, TQ, HK, width]``; differentiable, also in fp64."""
    parts = []
    for (b, rows), (_, k_rows), (_, c_rows) in case.places():
        keys = {name: y[b, c_rows if name.endswith("cmp") else k_rows] for name, y in x.items() if name[0] in "kv"}
        parts.append(one_sequence(case.cfg, x.q[b, rows], indices=indices[b, rows], **keys))
    joined = [torch.cat(p) if case.packed else torch.stack(p) for p in zip(*parts)]
    if case.packed:
        joined = [_with_empty_rows(y[None], case.extra_q, fill) for y, fill in zip(joined, (0, -torch.inf, 0, 0))]
    o_cmp, lse, o_slc, o_win = joined
    g = x.gates[..., None]
    o = g[..., 0, :] * o_cmp + g[..., 1, :] * o_slc + g[..., 2, :] * o_win
    return Steps(o_cmp, lse, o_slc, o_win, o)


def one_sequence(
    cfg: NSAConfig,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = torch.arange(len(k_slc) - len(q), len(k_slc), device=q.device)[:, None]
    u = torch.arange(len(k_slc), device=q.device)
    ends = torch.arange(len(k_cmp), device=q.device) * cfg.block_stride + cfg.block_length - 1
    chosen = (indices[..., None] == u // cfg.selection_block_size).any(-2).transpose(0, 1)  # [HK, TQ, T]
    o_cmp, lse = attention(q, k_cmp, v_cmp, ends <= t, cfg.softmax_scale)
    o_slc, _ = attention(q, k_slc, v_slc, chosen & (u <= t), cfg.softmax_scale)
    o_win, _ = attention(q, k_win, v_win, (u <= t) & (u > t - cfg.window_size), cfg.softmax_scale)
    return o_cmp, lse, o_slc, o_win


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q ``[TQ, HQ, D]``, k ``[S, HK, D]``, v ``[S, HK, DV]``, visible ``[TQ, S]`` or ``[HK, TQ, S]``."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = visible.expand(k.shape[1] // group, *visible.shape[-2:]).repeat_interleave(group, 0)
    if k.shape[0] == 0 or q.shape[0] == 0:
        lse = q.new_full(q.shape[:2], -torch.inf)
        return q.new_zeros(*q.shape[:2], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum()), lse
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    sees = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, torch.finfo(q.dtype).min)
    o = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1) * sees, v)
    return o, torch.logsumexp(scores.detach(), -1).masked_fill(~sees[..., 0], -torch.inf).transpose(0, 1)


def compress(x: Tensor, length: int, stride: int, embedding: Tensor | None, weights: list[Tensor]) -> Tensor:
    """``[B, T, HK, D]`` to ``[B, N, HK, D]``."""
    blocks = x.unfold(1, length, stride).transpose(-1, -2)  # [B, N, HK, l, D]
    if embedding is None:
        return blocks.sum(-2) / length
    first = (blocks + embedding).flatten(-2) @ weights[0].T
    return first if len(weights) == 1 else (first * first.sigmoid()) @ weights[1].T


def _with_empty_rows(y: Tensor, rows: int, fill: float) -> Tensor:
    return torch.cat([y, y.new_full((1, rows, *y.shape[2:]), fill)], 1)
