"""The steps, one after the other."""

from __future__ import annotations

from torch import Tensor

from nsa.config import NSAConfig
from nsa.layout import SeqInfo
from nsa.reference.attend import combine, compressed_attention, selected_attention, window_attention
from nsa.reference.select import select_blocks


def attention(
    q: Tensor, keys: tuple[Tensor, ...], gates: Tensor, indices: Tensor | None, cfg: NSAConfig, info: SeqInfo
) -> tuple[Tensor, Tensor]:
    """The gated sum of all branches, and the blocks that the selected one read; ``keys`` k and v of each branch.

    Source: arXiv 2502.11089, equation 5.
    """
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = keys
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, cfg, info)
    if indices is None:
        indices = select_blocks(q, k_cmp, lse, cfg, info)
    o_slc = selected_attention(q, k_slc, v_slc, indices, cfg, info)
    o_win = window_attention(q, k_win, v_win, cfg, info)
    return combine(o_cmp, o_slc, o_win, gates), indices
