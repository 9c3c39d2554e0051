"""The scores behind the selection, block by block: what a top-n lets through could hide a wrong weight."""

from __future__ import annotations

import pytest
import torch

import nsa
from nsa.layout import SeqInfo
from nsa.reference import select
from nsa.reference.chunks import Chunk

BLOCKS = [(8, 4, 8), (12, 4, 24), (3, 1, 12), (16, 16, 16), (16, 16, 48), (32, 16, 64), (8, 4, 64)]
TOKENS, QUERIES = 200, 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "stride", "size", "dim"), [*((*x, 16) for x in BLOCKS), (32, 16, 64, 136), (8, 4, 64, 192)])
def test_within_1e_5_of_equation_9(device: str, dtype: torch.dtype, length: int, stride: int, size: int, dim: int) -> None:
    from nsa.kernels.triton.importance import block_importance
    from nsa.kernels.triton.sequence import spans
    from nsa.tuning import arch, importance

    torch.manual_seed(0)
    cfg = nsa.NSAConfig(
        head_dim=dim, num_heads=6, num_kv_heads=2, block_length=length, block_stride=stride, selection_block_size=size
    )
    rows = cfg.num_compressed_blocks(TOKENS)
    q = torch.randn(1, QUERIES, 6, dim, device=device).to(dtype)
    k = torch.randn(1, rows, 2, dim, device=device).to(dtype)
    lse = nsa.compressed_attention(q.double(), k.double(), k.double(), cfg, seqlen_k=TOKENS, backend="reference")[1]
    chunk = Chunk(slice(0, QUERIES), TOKENS - QUERIES, TOKENS)
    want = select.block_importance(q.double(), k.double(), lse, chunk, cfg)  # [1, HK, TQ, M]

    where = spans(QUERIES, rows, SeqInfo(1, QUERIES, TOKENS), length, stride)
    tile = importance(dim, dtype, arch(q.device)).block_m
    tiles = where.query_tiles(tile)
    got = torch.full((tiles.count * tile, 2, want.shape[-1]), float("nan"), device=device)
    told = (where, tiles, 0, tiles.count, want.shape[-1], length, stride, size, cfg.softmax_scale)
    block_importance(q, k, lse.float(), got, *told)
    got = got[:QUERIES].permute(1, 0, 2)[None].double()
    own = torch.arange(TOKENS - QUERIES, TOKENS, device=device) // size
    counts = torch.arange(want.shape[-1], device=device) <= own[:, None]  # what lies past a query's own block is never read
    assert (want > 0).sum() >= 2 * QUERIES
    assert ((got - want).abs() <= 1e-5 * want)[:, :, counts].all()
