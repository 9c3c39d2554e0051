"""A decode step over what a cache holds: four launches or more, none of which depends on a length on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa import decode_tuning, tuning
from nsa.config import NSAConfig
from nsa.kernels.triton.decode_compressed import decode_compressed
from nsa.kernels.triton.decode_merge import decode_merge
from nsa.kernels.triton.decode_select import decode_select
from nsa.kernels.triton.decode_tokens import decode_tokens


def decode(
    q: Tensor, gates: Tensor, pools: Sequence[Tensor], rings: Sequence[Tensor], table: Tensor, lengths: Tensor,
    max_seq_len: int, paged: bool, cfg: NSAConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of the newest tokens: o ``[B, TQ, HQ, DV]`` and the selected blocks int32 ``[B, TQ, HK, n]``.

    q ``[B, TQ, HQ, D]`` and gates ``[B, TQ, HQ, 3]`` contiguous; pools: k_slc, v_slc, k_cmp, v_cmp; rings: k_win, v_win; table
    int32 ``[B, max_pages]``, lengths int32 ``[B]``. All that is allocated here has a size that ``max_seq_len`` gives: the kept
    weights are the largest, a number for each query head and selection block.
    """
    batch, queries, heads = q.shape[:3]
    kv_heads, group, arch = cfg.num_kv_heads, cfg.group_size, tuning.arch(q.device)
    selection = max(1, cfg.num_selection_blocks(max_seq_len))
    tile = decode_tuning.tile(cfg, queries * group, q.dtype, arch)
    cells = decode_tuning.cells(cfg, max_seq_len, tile.block_n)
    pairs = batch * kv_heads * -(-queries * group // tile.block_m)
    splits = decode_tuning.compressed_splits(pairs, cells.tiles)
    token_tile = decode_tuning.tile(cfg, group, q.dtype, arch)
    pairs = batch * queries * kv_heads * -(-group // token_tile.block_m)
    token_splits = decode_tuning.token_splits(cfg, pairs, token_tile.block_n)
    first_win = splits + token_splits.selected
    parts = first_win + token_splits.window

    make = lambda *shape: q.new_empty(batch, queries, *shape, dtype=torch.float32)
    part_o, part_lse = make(heads, parts, cfg.value_dim), make(heads, parts)
    kept = make(heads, cells.tiles * cells.per_tile), make(heads, cells.tiles), make(heads, cells.tiles)
    importance = make(kv_heads, selection)
    indices = q.new_empty(batch, queries, kv_heads, cfg.num_selected_blocks, dtype=torch.int32)
    o = q.new_empty(batch, queries, heads, cfg.value_dim)
    sizes = cfg.block_length, cfg.block_stride, cfg.selection_block_size
    decode_compressed(
        q, pools[2], pools[3], table, lengths, part_o, part_lse, kept, splits, tile, cells, paged, *sizes, cfg.softmax_scale
    )
    decode_select(
        kept, part_lse, lengths, importance, indices, splits, cells, *sizes, cfg.num_initial_blocks, cfg.num_local_blocks
    )
    decode_tokens(
        q, pools[0], pools[1], rings[0], rings[1], indices, table, lengths, part_o, part_lse, splits, token_splits,
        token_tile, paged, cfg.selection_block_size, cfg.window_size, cfg.softmax_scale,
    )  # fmt: skip
    decode_merge(part_o, part_lse, gates, o, splits, first_win)
    return o, indices
