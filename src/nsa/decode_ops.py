"""The kernels of a decode step as PyTorch operators: one that changes a cache, one that attends to it. No gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from nsa.cache_view import CacheView
from nsa.config import NSAConfig
from nsa.ops.arguments import on_device_of


@custom_op(
    "nsa::decode_append",
    mutates_args=("pools", "rings", "lengths", "overflow"),
    schema="(Tensor[] new, Tensor[]? made, Tensor(a!)[] pools, Tensor(b!)[] rings, Tensor table, Tensor(c!) lengths, "
    "Tensor limit, Tensor(d!) overflow, bool paged, int length, int stride) -> ()",
)
def decode_append(
    new: list[Tensor], made: list[Tensor] | None, pools: list[Tensor], rings: list[Tensor], table: Tensor, lengths: Tensor,
    limit: Tensor, overflow: Tensor, paged: bool, length: int, stride: int,
) -> None:  # fmt: skip
    """A step's tokens into the cache, and the blocks that they complete: what was ``made`` of them, or else their means."""
    from nsa.kernels.triton.decode_append import decode_append as launch

    with on_device_of(table):
        made = None if made is None else [x.contiguous() for x in made]
        launch([x.contiguous() for x in new], made, pools, rings, table, lengths, limit, overflow, paged, length, stride)


@decode_append.register_fake
def _(*args: Any) -> None:
    return None


@custom_op(
    "nsa::decode_blocks",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor k_tail, Tensor v_tail, Tensor lengths, int count, int length, int stride) "
    "-> (Tensor, Tensor)",
)
def decode_blocks(
    k: Tensor, v: Tensor, k_tail: Tensor, v_tail: Tensor, lengths: Tensor, count: int, length: int, stride: int
) -> tuple[Tensor, Tensor]:
    """The tokens of the next ``count`` blocks, for a compressor: ``[B, count, l, HK, D]`` and ``[B, count, l, HK, DV]``."""
    from nsa.kernels.triton.decode_append import decode_blocks as launch

    with on_device_of(k):
        return launch((k.contiguous(), v.contiguous()), (k_tail, v_tail), lengths, count, length, stride)


@decode_blocks.register_fake
def _(k: Tensor, v: Tensor, k_tail: Tensor, v_tail: Tensor, lengths: Tensor, count: int, length: int, stride: int) -> Any:
    a, b = (x.new_empty(x.shape[0], count, length, *x.shape[2:]) for x in (k, v))
    return a, b


@custom_op(
    "nsa::decode",
    mutates_args=(),
    schema="(Tensor q, Tensor gates, Tensor[] pools, Tensor[] rings, Tensor table, Tensor lengths, int max_seq_len, "
    "bool paged, int length, int stride, int size, int n, int num_initial, int num_local, int window, float scale) "
    "-> (Tensor, Tensor)",
)
def decode_op(
    q: Tensor, gates: Tensor, pools: list[Tensor], rings: list[Tensor], table: Tensor, lengths: Tensor, max_seq_len: int,
    paged: bool, length: int, stride: int, size: int, n: int, num_initial: int, num_local: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output ``[B, TQ, HQ, DV]`` and selected blocks int32 ``[B, TQ, HK, n]`` of the newest tokens."""
    from nsa.kernels.launch import decode as launch

    kv_heads, value_dim = pools[1].shape[2:]
    cfg = NSAConfig(q.shape[3], q.shape[2], kv_heads, value_dim, length, stride, size, n, num_initial, num_local, window, scale)
    with on_device_of(q):
        return launch(q.contiguous(), gates.contiguous(), pools, rings, table, lengths, max_seq_len, paged, cfg)


@decode_op.register_fake
def _(
    q: Tensor, gates: Tensor, pools: list[Tensor], rings: list[Tensor], table: Tensor, lengths: Tensor, max_seq_len: int,
    paged: bool, length: int, stride: int, size: int, n: int, *args: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, queries, heads = q.shape[:3]
    kv_heads, value_dim = pools[1].shape[2:]
    indices = torch.empty((batch, queries, kv_heads, n), dtype=torch.int32, device=q.device)
    return q.new_empty(batch, queries, heads, value_dim), indices


def decode(q: Tensor, gates: Tensor, view: CacheView) -> tuple[Tensor, Tensor]:
    """Attention of up to 16 newest tokens over a cache in place: o ``[B, TQ, HQ, DV]``, blocks int32 ``[B, TQ, HK, n]``."""
    cfg = view.cfg
    pools, rings = [view.k_slc, view.v_slc, view.k_cmp, view.v_cmp], [view.k_win, view.v_win]
    return decode_op(
        q, gates, pools, rings, view.table, view.lengths, view.max_seq_len, not view.contiguous,
        cfg.block_length, cfg.block_stride, cfg.selection_block_size, cfg.num_selected_blocks, cfg.num_initial_blocks,
        cfg.num_local_blocks, cfg.window_size, cfg.softmax_scale,
    )  # fmt: skip
