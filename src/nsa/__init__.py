"""Native Sparse Attention (arXiv 2502.11089): exact, fast, trainable, with a cache to serve it.

Every public name is imported when it is first used, so that ``import nsa`` costs no more than torch's own import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa.cache import NSACache
    from nsa.config import NSAConfig, create_default_config
    from nsa.context import NSAContext
    from nsa.decode import cached_attention
    from nsa.decode_graph import DecodeGraph
    from nsa.functional import (
        combine,
        compress_blocks,
        compressed_attention,
        nsa_attention,
        select_blocks,
        selected_attention,
        window_attention,
    )
    from nsa.module import BlockCompressor, NativeSparseAttention
    from nsa.paging import PageAllocator

__version__ = "0.1.0"

_HOME = {
    "NSACache": "cache",
    "cached_attention": "decode",
    "DecodeGraph": "decode_graph",
    "PageAllocator": "paging",
    "NSAConfig": "config",
    "create_default_config": "config",
    "NSAContext": "context",
    "combine": "functional",
    "compress_blocks": "functional",
    "compressed_attention": "functional",
    "nsa_attention": "functional",
    "select_blocks": "functional",
    "selected_attention": "functional",
    "window_attention": "functional",
    "BlockCompressor": "module",
    "NativeSparseAttention": "module",
}

__all__ = [
    "BlockCompressor",
    "DecodeGraph",
    "NSACache",
    "NSAConfig",
    "NSAContext",
    "NativeSparseAttention",
    "PageAllocator",
    "cached_attention",
    "combine",
    "compress_blocks",
    "compressed_attention",
    "create_default_config",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(importlib.import_module(f"nsa.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
