"""The scores behind the selection, block by block: what a top-n lets through could hide a wrong weight."""

from __future__ import annotations

import pytest
import torch

import nsa
from nsa.layout import SeqInfo
from nsa.reference import select
from nsa.reference.chunks import Chunk

BLOCKS = [(8, 4, 8), (12, 4, 24), (3, 1, 12), (16, 16, 16), (16, 16, 48), (32, 16, 64), (8, 4, 64)]
PLACES = [  # with and without the kernels that only one kind of GPU runs
    pytest.param("cpu", 16, 3, True, marks=pytest.mark.interpreter),
    pytest.param("cuda", 16, 3, True, marks=pytest.mark.gpu),
    pytest.param("cuda", 64, 4, True, marks=pytest.mark.gpu),
    pytest.param("cuda", 64, 4, False, marks=pytest.mark.gpu),
]
TOKENS, QUERIES = 200, 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "stride", "size"), BLOCKS)
@pytest.mark.parametrize(("place", "dim", "group", "portable"), PLACES)
def test_within_1e_5_of_equation_9(
    place: str, dim: int, group: int, portable: bool, dtype: torch.dtype, length: int, stride: int, size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from nsa.kernels import hopper
    from nsa.kernels.launch import importance
    from nsa.kernels.triton.sequence import spans

    if portable:
        monkeypatch.setattr(hopper, "supports", lambda *_: "switched off")
    torch.manual_seed(0)
    heads = 2 * group
    cfg = nsa.NSAConfig(
        head_dim=dim, num_heads=heads, num_kv_heads=2, block_length=length, block_stride=stride, selection_block_size=size
    )
    rows = cfg.num_compressed_blocks(TOKENS)
    q = torch.randn(1, QUERIES, heads, dim, device=place).to(dtype)
    k = torch.randn(1, rows, 2, dim, device=place).to(dtype)
    lse = nsa.compressed_attention(q.double(), k.double(), k.double(), cfg, seqlen_k=TOKENS, backend="reference")[1]
    chunk = Chunk(slice(0, QUERIES), TOKENS - QUERIES, TOKENS)
    want = select.block_importance(q.double(), k.double(), lse, chunk, cfg)  # [1, HK, TQ, M]

    where = spans(QUERIES, rows, SeqInfo(1, QUERIES, TOKENS), length, stride)
    how = importance(q, stride, size)
    tile, tiles = how.queries, where.query_tiles(how.queries)
    got = torch.full((tiles.count * tile, 2, want.shape[-1]), float("nan"), device=place)
    told = (where, tiles, 0, tiles.count, length, stride, size, cfg.softmax_scale)
    how.score(q, k, lse.float(), got, *told)
    got = got[:QUERIES].permute(1, 0, 2)[None].double()
    own = torch.arange(TOKENS - QUERIES, TOKENS, device=place) // size
    counts = torch.arange(want.shape[-1], device=place) <= own[:, None]  # what lies past a query's own block is never read
    assert (want > 0).sum() >= 2 * QUERIES
    assert ((got - want).abs() <= 1e-5 * want)[:, :, counts].all()
