"""Native Sparse Attention by brute force: loops over tokens, heads and blocks, fp64, one sequence at a time.

Written from the specification alone. It shares no code with the package: of a configuration it reads the plain fields, never
the arithmetic. Arrays are numpy: q ``[TQ, HQ, D]``, keys ``[T, HK, D]``, values ``[T, HK, DV]``, compressed ones ``[N, ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def count_blocks(tokens: int, length: int, stride: int) -> int:
    """N, by laying block after block until one sticks out."""
    count = 0
    while count * stride + length <= tokens:
        count += 1
    return count


def compress(x: Array, cfg: Any, kind: str, embedding: Array | None = None, weights: Sequence[Array] = ()) -> Array:
    """Step 1: ``[T, HK, D]`` to ``[N, HK, D]``."""
    n = count_blocks(len(x), cfg.block_length, cfg.block_stride)
    out = np.zeros((n, *x.shape[1:]))
    for i in range(n):
        for head in range(x.shape[1]):
            block = x[i * cfg.block_stride : i * cfg.block_stride + cfg.block_length, head]
            if kind == "mean":
                out[i, head] = sum(block) / cfg.block_length
                continue
            flat = (block + embedding).reshape(-1)
            hidden = weights[0] @ flat
            out[i, head] = hidden if kind == "linear" else weights[1] @ (hidden / (1 + np.exp(-hidden)))
    return out


def attend(q: Array, keys: Array, values: Array, scale: float) -> tuple[Array, float]:
    """One query ``[D]`` over the keys ``[S, D]`` that it sees, which may be none."""
    if len(keys) == 0:
        return np.zeros(values.shape[-1]), -math.inf
    scores = scale * (keys @ q)
    e = np.exp(scores - scores.max())
    return (e @ values) / e.sum(), scores.max() + math.log(e.sum())


def compressed(q: Array, k_cmp: Array, v_cmp: Array, tokens: int, cfg: Any) -> tuple[Array, Array]:
    """Step 2: output ``[TQ, HQ, DV]`` and lse ``[TQ, HQ]``."""
    group = cfg.num_heads // cfg.num_kv_heads
    o, lse = np.zeros((*q.shape[:2], v_cmp.shape[-1])), np.zeros(q.shape[:2])
    for row in range(len(q)):
        seen = _visible_blocks(tokens - len(q) + row, len(k_cmp), cfg)
        for h in range(cfg.num_heads):
            o[row, h], lse[row, h] = attend(q[row, h], k_cmp[seen, h // group], v_cmp[seen, h // group], cfg.softmax_scale)
    return o, lse


def importance(q: Array, k_cmp: Array, lse: Array, tokens: int, cfg: Any) -> Array:
    """Step 3: P ``[TQ, HK, M]`` over all selection blocks of the sequence."""
    group = cfg.num_heads // cfg.num_kv_heads
    out = np.zeros((len(q), cfg.num_kv_heads, -(-tokens // cfg.selection_block_size)))
    for row in range(len(q)):
        seen = _visible_blocks(tokens - len(q) + row, len(k_cmp), cfg)
        for kv in range(cfg.num_kv_heads):
            p = [0.0] * len(k_cmp)
            for h in range(kv * group, (kv + 1) * group):
                for i in seen:
                    p[i] += math.exp(cfg.softmax_scale * float(q[row, h] @ k_cmp[i, kv]) - lse[row, h])
            out[row, kv] = spread(p, out.shape[-1], cfg)
    return out


def spread(p: Sequence[float], blocks: int, cfg: Any) -> list[float]:
    """Equation 9: what each selection block gets of the compressed blocks' ``p [N]``."""
    s, d, length = cfg.selection_block_size, cfg.block_stride, cfg.block_length
    out = [0.0] * blocks
    for j in range(blocks):
        for m in range(s // d):
            for r in range(length // d):
                i = (s // d) * j + m - r
                if 0 <= i < len(p):
                    out[j] += p[i]
    return out


def select(scores: Sequence[float], t: int, cfg: Any) -> tuple[list[int], float]:
    """Step 4 for one query and one key head: the padded blocks, and the gap that decided the last free place.

    The gap is relative to the larger score; it is infinite where nothing had to be decided, or where both scores are exactly 0
    and the lower block must win.
    """
    own = t // cfg.selection_block_size
    forced = [j for j in range(own + 1) if j < cfg.num_initial_blocks or j > own - cfg.num_local_blocks]
    free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[j], j))
    places = cfg.num_selected_blocks - len(forced)
    taken, left = free[:places], free[places:]
    gap = math.inf
    if taken and left and scores[taken[-1]] > 0:
        gap = (scores[taken[-1]] - scores[left[0]]) / scores[taken[-1]]
    chosen = sorted(forced + taken)
    return chosen + [-1] * (cfg.num_selected_blocks - len(chosen)), gap


def selected(q: Array, k: Array, v: Array, indices: Array, cfg: Any) -> Array:
    """Step 5, first half: ``[TQ, HQ, DV]`` for ``indices [TQ, HK, width]``, any integers."""
    group = cfg.num_heads // cfg.num_kv_heads
    o = np.zeros((*q.shape[:2], v.shape[-1]))
    for row in range(len(q)):
        t = len(k) - len(q) + row
        for kv in range(cfg.num_kv_heads):
            wanted = {int(j) for j in indices[row, kv]}
            seen = [u for u in range(len(k)) if u <= t and u // cfg.selection_block_size in wanted]
            for h in range(kv * group, (kv + 1) * group):
                o[row, h] = attend(q[row, h], k[seen, kv], v[seen, kv], cfg.softmax_scale)[0]
    return o


def window(q: Array, k: Array, v: Array, cfg: Any) -> Array:
    """Step 5, second half: ``[TQ, HQ, DV]``."""
    group = cfg.num_heads // cfg.num_kv_heads
    o = np.zeros((*q.shape[:2], v.shape[-1]))
    for row in range(len(q)):
        t = len(k) - len(q) + row
        seen = [u for u in range(len(k)) if t - cfg.window_size < u <= t]
        for h in range(cfg.num_heads):
            o[row, h] = attend(q[row, h], k[seen, h // group], v[seen, h // group], cfg.softmax_scale)[0]
    return o


def combine(o_cmp: Array, o_slc: Array, o_win: Array, gates: Array) -> Array:
    """Step 6: gates ``[TQ, HQ, 3]``."""
    return gates[..., 0:1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:3] * o_win


def _visible_blocks(t: int, blocks: int, cfg: Any) -> list[int]:
    return [i for i in range(blocks) if i * cfg.block_stride + cfg.block_length - 1 <= t]
