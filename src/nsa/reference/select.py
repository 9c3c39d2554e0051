"""Which blocks a query reads: importance scores and top-n, equations 8-10 of arXiv 2502.11089."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.config import NSAConfig
from nsa.layout import Segment, SeqInfo
from nsa.reference.attend import accumulator, grouped_scores
from nsa.reference.chunks import Chunk, chunks, last_first, over_segments


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, lse: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor:
    """The ``n`` selection blocks of every query: int32 ``[B, TQ, HK, n]``, ascending, padded with -1."""
    acc = accumulator(q)

    def step(segment: Segment) -> list[Tensor]:
        n = cfg.num_compressed_blocks(segment.k_len)
        ks = k[segment.batch, segment.cmp_start : segment.cmp_start + n].to(acc)

        def one(chunk: Chunk) -> Tensor:
            seen = cfg.num_compressed_blocks(chunk.stop)
            qs = q[segment.batch, chunk.rows].to(acc)
            importance = block_importance(qs, ks[:, :seen], lse[segment.batch, chunk.rows], chunk, cfg)
            return top_blocks(importance, chunk.positions(q.device), cfg)

        return last_first(one, chunks(segment, max(n, 1), cfg.num_heads))

    width = (cfg.num_kv_heads, cfg.num_selected_blocks)
    return over_segments(info, cfg, (q,), step, -1, width).to(torch.int32)


def block_importance(q: Tensor, k: Tensor, lse: Tensor, chunk: Chunk, cfg: NSAConfig) -> Tensor:
    """Equations 9 and 10: P ``[B, HK, C, M]`` over the selection blocks that start before the chunk's end.

    q ``[B, C, HQ, D]``, k ``[B, N, HK, D]``, lse ``[B, C, HQ]``.
    """
    stride, length = cfg.block_stride, cfg.block_length
    batch, rows = q.shape[:2]
    seen = k.shape[1]
    last = torch.arange(seen, device=q.device) * stride + length - 1
    visible = last <= chunk.positions(q.device)[:, None]  # [C, N]
    lse = lse.reshape(batch, rows, cfg.num_kv_heads, -1).permute(0, 2, 3, 1)[..., None]  # [B, HK, G, C, 1]
    scores = grouped_scores(q, k, cfg.softmax_scale)
    # A row with lse = -inf sees nothing; comparing against +inf makes its exponentials 0 rather than NaN.
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), float("inf")))
    p = p.masked_fill(~visible, 0).sum(2)  # [B, HK, C, N]
    # strides[u] sums the compressed blocks that cover stride u of the sequence: block i covers u = i .. i + l/d - 1.
    blocks = cfg.num_selection_blocks(chunk.stop)
    per_block, covers = cfg.selection_block_size // stride, length // stride
    strides = p.new_zeros(*p.shape[:3], blocks * per_block)
    for r in range(covers):
        strides[..., r : r + seen] += p
    return strides.reshape(*strides.shape[:3], blocks, per_block).sum(-1)


def top_blocks(importance: Tensor, positions: Tensor, cfg: NSAConfig) -> Tensor:
    """Forced blocks, then the most important, ties to the lowest: int64 ``[B, C, HK, n]``, ascending, padded with -1.

    importance ``[B, HK, C, M]``, positions ``[C]``.
    """
    blocks, n = importance.shape[-1], cfg.num_selected_blocks
    block, own = torch.arange(blocks, device=importance.device), (positions // cfg.selection_block_size)[:, None]
    forced = (block < cfg.num_initial_blocks) | (block > own - cfg.num_local_blocks)
    ranked = importance.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
    value, index = torch.sort(ranked, dim=-1, descending=True, stable=True)
    chosen = torch.where(value > float("-inf"), index, blocks)[..., :n].sort(-1).values  # `blocks` stands for no block
    chosen = pad(chosen, (0, n - chosen.shape[-1]), value=blocks)
    return chosen.masked_fill(chosen == blocks, -1).transpose(1, 2)
