"""The oracle: every step in plain PyTorch, on any device, differentiable by autograd, exact in fp64."""

from nsa.reference.attend import combine, compressed_attention, selected_attention, window_attention
from nsa.reference.compress import compress_blocks
from nsa.reference.select import select_blocks
from nsa.reference.whole import attention

__all__ = [
    "attention",
    "combine",
    "compress_blocks",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
