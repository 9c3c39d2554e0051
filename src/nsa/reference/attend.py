"""The three attentions and their gated sum: equations 5-8, 11 and 12 of arXiv 2502.11089, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.layout import Segment, SeqInfo
from nsa.reference.chunks import Chunk, bounded, chunks, last_first, over_segments


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of scores, softmax and sums: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``attend_with_lse`` for those who don't need the lse."""
    return attend_with_lse(q, k, v, visible, scale)[0]


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of a chunk of queries; a query that sees nothing gets output 0 and lse ``-inf``.

    q ``[B, C, HQ, D]``, k ``[B, S, HK, D]``, v ``[B, S, HK, DV]``, visible bool, broadcastable to ``[B, HK, C, S]``;
    returns ``[B, C, HQ, DV]`` and ``[B, C, HQ]``.
    """
    batch, rows, heads, _ = q.shape
    if k.shape[1] == 0:  # one key that nobody sees keeps the shapes and the graph whole
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        visible = visible.new_zeros(1, 1, rows, 1)
    visible = visible[:, :, None]  # [B, HK, G = 1, C, S]
    scores = grouped_scores(q, k, scale).masked_fill(~visible, torch.finfo(q.dtype).min)  # [B, HK, G, C, S]
    sees = visible.any(-1, keepdim=True)
    p = torch.softmax(scores, -1) * sees
    group = heads // k.shape[2]
    o = p.reshape(batch, k.shape[2], group * rows, -1) @ v.transpose(1, 2)  # [B, HK, G * C, DV]
    # p = exp(score - lse) at the highest score too: its logarithm costs one per row instead of one per key.
    lse = (scores.detach().amax(-1, keepdim=True) - p.detach().amax(-1, keepdim=True).log()).masked_fill(~sees, float("-inf"))
    return _by_query(o, rows), _by_query(lse.reshape(batch, k.shape[2], group * rows, 1), rows).squeeze(-1)


def grouped_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``scale * q @ k`` of each query head with its group's keys: ``[B, HK, G, C, S]``."""
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = (q * scale).reshape(batch, rows, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    return (q @ k.permute(0, 2, 3, 1)).reshape(batch, kv_heads, heads // kv_heads, rows, k.shape[1])


def _by_query(x: Tensor, rows: int) -> Tensor:
    """``[B, HK, G * C, E]`` to ``[B, C, HQ, E]``."""
    batch, kv_heads, _, width = x.shape
    return x.reshape(batch, kv_heads, -1, rows, width).permute(0, 3, 1, 2, 4).reshape(batch, rows, -1, width)


def compressed_attention(q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> tuple[Tensor, Tensor]:
    """Every query over the compressed blocks that end at or before it: ``[B, TQ, HQ, DV]`` and lse ``[B, TQ, HQ]``."""
    acc = accumulator(q)

    def step(segment: Segment) -> list[Tensor]:
        n = cfg.num_compressed_blocks(segment.k_len)
        rows = slice(segment.cmp_start, segment.cmp_start + n)
        ks, vs = k[segment.batch, rows].to(acc), v[segment.batch, rows].to(acc)
        last = torch.arange(n, device=q.device) * cfg.block_stride + cfg.block_length - 1

        def one(q: Tensor, ks: Tensor, vs: Tensor, chunk: Chunk) -> Tensor:
            seen = cfg.num_compressed_blocks(chunk.stop)
            visible = last[:seen] <= chunk.positions(q.device)[:, None]
            o, lse = attend_with_lse(q.to(acc), ks[:, :seen], vs[:, :seen], visible[None, None], cfg.softmax_scale)
            return torch.cat([o, lse[..., None]], -1)

        run = bounded(one, segment, n, cfg.num_heads)
        return last_first(lambda c: run(q[segment.batch, c.rows], ks, vs, c), chunks(segment, n, cfg.num_heads))

    joined = over_segments(info, cfg, (q, k, v), step, 0.0, (cfg.num_heads, cfg.value_dim + 1))
    o, lse = joined[..., :-1], joined[..., -1].detach()
    return o.to(q.dtype), _without_sequence(lse, info)


def _without_sequence(lse: Tensor, info: SeqInfo) -> Tensor:
    """Queries past the last packed sequence see nothing."""
    if info.cu_q is None:
        return lse.contiguous()
    inside = torch.arange(lse.shape[1], device=lse.device) < info.cu_q[-1]
    return lse.masked_fill(~inside[None, :, None], float("-inf"))


def selected_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor:
    """Every query over the tokens at or before it whose blocks it selected: ``[B, TQ, HQ, DV]``.

    A chunk of queries reads the blocks that any of them selected, and masks the others': one query alone (decode) reads
    just its own, a long chunk does plain matrix products.
    """
    acc = accumulator(q)
    size = cfg.selection_block_size

    def step(segment: Segment) -> list[Tensor]:
        rows = slice(segment.k_start, segment.k_start + segment.k_len)
        ks, vs = k[segment.batch, rows].to(acc), v[segment.batch, rows].to(acc)

        def one(q: Tensor, ks: Tensor, vs: Tensor, indices: Tensor, chunk: Chunk) -> Tensor:
            wanted = _as_mask(indices, cfg.num_selection_blocks(chunk.stop))  # [B, HK, C, M]
            used = wanted.flatten(0, 2).any(0).nonzero()[:, 0]
            tokens = (used[:, None] * size + torch.arange(size, device=q.device)).flatten()
            tokens = tokens[tokens < chunk.stop]
            if tokens.numel() == chunk.stop:
                ks, vs = ks[:, : chunk.stop], vs[:, : chunk.stop]
            else:
                ks, vs = ks[:, tokens], vs[:, tokens]
            visible = wanted[..., tokens // size] & (tokens <= chunk.positions(q.device)[:, None])
            return attend(q.to(acc), ks, vs, visible, cfg.softmax_scale)

        run = bounded(one, segment, segment.k_len, cfg.num_heads)
        return last_first(
            lambda c: run(q[segment.batch, c.rows], ks, vs, indices[segment.batch, c.rows], c),
            chunks(segment, segment.k_len, cfg.num_heads),
        )

    return over_segments(info, cfg, (q, k, v), step, 0.0, (cfg.num_heads, cfg.value_dim)).to(q.dtype)


def _as_mask(indices: Tensor, blocks: int) -> Tensor:
    """``[B, C, HK, width]`` block numbers as a bool set ``[B, HK, C, blocks]``; numbers out of range count for nothing."""
    indices = indices.transpose(1, 2).long()
    inside = (indices >= 0) & (indices < blocks)
    mask = torch.zeros(*indices.shape[:3], blocks + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(inside, indices, blocks), True)[..., :blocks]


def window_attention(q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor:
    """Every query over the last ``window_size`` tokens, its own included: ``[B, TQ, HQ, DV]``."""
    acc = accumulator(q)

    def step(segment: Segment) -> list[Tensor]:
        # A chunk as long as the window wastes half of its scores; longer ones waste less but hold more.
        seen = min(segment.k_len, 2 * cfg.window_size)

        def one(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
            first = max(0, chunk.start - cfg.window_size + 1)
            tokens, positions = torch.arange(first, chunk.stop, device=q.device), chunk.positions(q.device)[:, None]
            visible = (tokens <= positions) & (tokens > positions - cfg.window_size)
            rows = slice(segment.k_start + first, segment.k_start + chunk.stop)
            ks, vs = k[segment.batch, rows].to(acc), v[segment.batch, rows].to(acc)
            return attend(q.to(acc), ks, vs, visible[None, None], cfg.softmax_scale)

        run = bounded(one, segment, seen, cfg.num_heads)
        short = (piece for c in chunks(segment, seen, cfg.num_heads) for piece in _at_most(c, cfg.window_size))
        return [run(q[segment.batch, c.rows], k, v, c) for c in short]

    return over_segments(info, cfg, (q, k, v), step, 0.0, (cfg.num_heads, cfg.value_dim)).to(q.dtype)


def _at_most(chunk: Chunk, size: int) -> list[Chunk]:
    """``chunk`` in pieces of at most ``size`` queries."""
    size = max(size, 64)
    cuts = range(0, chunk.stop - chunk.start, size)
    first, start, stop = chunk.rows.start, chunk.start, chunk.stop
    return [
        Chunk(slice(first + i, min(first + i + size, chunk.rows.stop)), start + i, min(start + i + size, stop)) for i in cuts
    ]


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Equation 5: the branches' sum, weighed by the gates."""
    acc = accumulator(o_cmp)
    g = gates.to(acc)[..., None]  # [B, T, HQ, 3, 1]
    o = g[..., 0, :] * o_cmp.to(acc) + g[..., 1, :] * o_slc.to(acc) + g[..., 2, :] * o_win.to(acc)
    return o.to(o_cmp.dtype)
