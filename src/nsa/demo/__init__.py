"""Native Sparse Attention beside full attention and its window alone: the same bytes, three models, two pictures."""

from nsa.demo.compare import Twin, train_twins
from nsa.demo.decode import DecodeCheck, check_decode
from nsa.demo.plots import draw_blocks, draw_losses
from nsa.demo.reads import share_of_tokens_read

__all__ = ["DecodeCheck", "Twin", "check_decode", "draw_blocks", "draw_losses", "share_of_tokens_read", "train_twins"]
