"""A decode step over what a cache holds: four launches or more, none of which depends on a length on the host.

While blocks are chosen the memory idles. So a large batch is cut into slices, each with launches and streams of its own: blocks
of one are chosen while keys of the next are read. Others wait for the choice, so it goes first where both could; the tokens,
which fill what is left, go last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

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
    slices = decode_tuning.slices(batch, kv_heads * -(-queries * group // tile.block_m), arch)
    size = -(-batch // slices)
    splits = decode_tuning.compressed_splits(size * kv_heads * -(-queries * group // tile.block_m), cells.tiles)
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

    def compressed(b: slice) -> None:
        k, v = (x if paged else x[b] for x in pools[2:])
        decode_compressed(
            q[b], k, v, table[b], lengths[b], part_o[b], part_lse[b], tuple(x[b] for x in kept), splits, tile, cells, paged,
            *sizes, cfg.softmax_scale,
        )  # fmt: skip

    def select(b: slice) -> None:
        decode_select(
            tuple(x[b] for x in kept), part_lse[b], lengths[b], importance[b], indices[b], splits, cells, *sizes,
            cfg.num_initial_blocks, cfg.num_local_blocks, slices == 1,
        )  # fmt: skip

    def tokens(b: slice) -> None:
        k, v = (x if paged else x[b] for x in pools[:2])
        decode_tokens(
            q[b], k, v, rings[0][b], rings[1][b], indices[b], table[b], lengths[b], part_o[b], part_lse[b], splits,
            token_splits, token_tile, paged, cfg.selection_block_size, cfg.window_size, cfg.softmax_scale,
        )  # fmt: skip

    run_slices([compressed, select, tokens], [slice(b, min(b + size, batch)) for b in range(0, batch, size)], q.device)
    decode_merge(part_o, part_lse, gates, o, splits, first_win)
    return o, indices


def run_slices(stages: Sequence[Callable[[slice], None]], slices: Sequence[slice], device: torch.device) -> None:
    """All stages of each slice in their order; on a GPU several slices at once, and what follows waits for them all."""
    if len(slices) == 1 or device.type != "cuda":
        for part in slices:
            for stage in stages:
                stage(part)
        return
    current = torch.cuda.current_stream(device)
    ends = []
    for number, part in enumerate(slices):
        before = current
        for stage, priority in zip(stages, decode_tuning.PRIORITIES, strict=True):
            stream = side_stream(device, number, priority)
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                stage(part)
            before = stream
        ends.append(before)
    for stream in ends:
        current.wait_stream(stream)


@cache
def side_stream(device: torch.device, number: int, priority: int) -> torch.cuda.Stream:
    """Made once: a captured step and those that run without a graph share it."""
    return torch.cuda.Stream(device, priority=priority)
