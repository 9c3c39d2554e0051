"""How much of the past a query reads."""

from __future__ import annotations

import torch

from nsa.models import LMConfig


def share_of_tokens_read(cfg: LMConfig, context: int) -> float:
    """Rows of keys that all queries of a sequence read, over those that full attention reads: 1.0 for full attention.

    A query of NSA reads the compressed blocks that ended, the tokens up to its own of the blocks it selects, and its window.
    The branches have keys of their own, so a token that two of them read counts twice.
    """
    past = torch.arange(1, context + 1)  # tokens up to each query's own
    if cfg.attention == "full":
        return 1.0
    window = past.clamp_max(cfg.nsa.window_size)
    if cfg.attention == "window":
        return window.sum().item() / past.sum().item()
    compressed = torch.where(
        past < cfg.nsa.block_length, 0, (past - cfg.nsa.block_length).div(cfg.nsa.block_stride, rounding_mode="floor") + 1
    )
    size = cfg.nsa.selection_block_size
    own = (past - 1) % size + 1  # the query's own block is always selected and is read up to the query
    others = ((past - 1) // size).clamp_max(cfg.nsa.num_selected_blocks - 1) * size
    return (compressed + own + others + window).sum().item() / past.sum().item()
