"""Arguments of the operators: how lengths travel through a schema, and what kernels take."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nsa.layout import SeqInfo

LENGTHS = "Tensor? cu_q, Tensor? cu_k, Tensor? lens, SymInt seqlen_k"
Lengths = tuple[Tensor | None, Tensor | None, Tensor | None, int]


def lengths(info: SeqInfo) -> Lengths:
    lens = info.seqlen_k if isinstance(info.seqlen_k, Tensor) else None
    return info.cu_q, info.cu_k, lens, info.seqlen_k if isinstance(info.seqlen_k, int) else 0


def sequence_info(q: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lens: Tensor | None, seqlen_k: int) -> SeqInfo:
    if cu_q is not None:
        return SeqInfo(1, q.shape[1], None, cu_q, cu_k)
    return SeqInfo(q.shape[0], q.shape[1], seqlen_k if lens is None else lens)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's GPU, which need not be the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def kernel_rows(x: Tensor) -> Tensor:
    """Kernels take rows that are contiguous, apart from each other and aligned to 16 bytes; others are copied."""
    width = 16 // x.element_size()
    apart = all(stride > 0 and stride % width == 0 for size, stride in zip(x.shape[:-1], x.stride()) if size > 1)
    return x if x.stride(-1) == 1 and apart and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
