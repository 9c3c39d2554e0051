"""The Triton kernels as PyTorch operators, and the backend made of them: what ``_dispatch.Backend`` asks for.

Operators, not autograd functions, so that ``torch.compile`` sees one node where it would otherwise trace launches. Kernels are
imported when the first operator runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.layout import SeqInfo
from nsa.ops.arguments import lengths
from nsa.ops.steps import blocks_op, combine_op, interval_op, select_op, selected_op
from nsa.ops.whole import attention, attention_op

__all__ = [
    "attention",
    "attention_op",
    "blocks_op",
    "combine",
    "combine_op",
    "compress_blocks",
    "compressed_attention",
    "interval_op",
    "select_blocks",
    "select_op",
    "selected_attention",
    "selected_op",
    "window_attention",
]


def compress_blocks(
    x: Tensor, cfg: NSAConfig, cu_seqlens: Tensor | None, embedding: Tensor | None, weights: tuple[Tensor, ...]
) -> Tensor:
    if not weights:
        return blocks_op(x, cu_seqlens, cfg.block_length, cfg.block_stride, True)
    assert embedding is not None
    blocks = blocks_op(x, cu_seqlens, cfg.block_length, cfg.block_stride, False)
    first = torch.nn.functional.linear(blocks.flatten(-2), weights[0])
    first = first + torch.nn.functional.linear(embedding.flatten().to(weights[0].dtype), weights[0]).to(first.dtype)
    return first if len(weights) == 1 else torch.nn.functional.linear(torch.nn.functional.silu(first), weights[1])


def compressed_attention(q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> tuple[Tensor, Tensor]:
    o, lse = interval_op(q, k, v, *lengths(info), cfg.block_length, cfg.block_stride, 0, cfg.softmax_scale)
    return o, lse.detach().transpose(1, 2)


def select_blocks(q: Tensor, k: Tensor, lse: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor:
    return select_op(
        q.detach(), k.detach(), lse.detach(), *lengths(info), cfg.block_length, cfg.block_stride, cfg.selection_block_size,
        cfg.num_selected_blocks, cfg.num_initial_blocks, cfg.num_local_blocks, cfg.softmax_scale,
    )  # fmt: skip


def selected_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor:
    o, _ = selected_op(q, k, v, indices, *lengths(info), cfg.selection_block_size, cfg.softmax_scale)
    return o


def window_attention(q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig, info: SeqInfo) -> Tensor:
    o, _ = interval_op(q, k, v, *lengths(info), 1, 1, cfg.window_size, cfg.softmax_scale)
    return o


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    return combine_op(o_cmp, o_slc, o_win, gates)
