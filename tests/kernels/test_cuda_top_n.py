"""The ranking of blocks in CUDA C++: how it is compiled and chosen; and on a GPU its choice beside its twin's, bit for bit."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import nsa
from nsa.kernels import cuda, launch
from nsa.kernels.cuda import nvrtc
from nsa.kernels.cuda import top_n as kernels
from nsa.kernels.triton import top_n as portable
from nsa.kernels.triton.sequence import Spans
from tests.kernels.test_cuda_selected import NVCC, counted

TILES = pytest.mark.parametrize("tile", [16, 64])
LAYOUT = """#include "{source}"
static_assert(sizeof(Call) == {size});
{fields}
static_assert(WARPS == {warps});
"""


@TILES
def test_compiles_by_nvcc(tile: int, tmp_path: Path) -> None:
    """In registers alone, within what four blocks of a multiprocessor have, or two; and what is said twice is said alike."""
    if NVCC is None:
        pytest.skip("there is no nvcc here")
    source = tmp_path / "layout.cu"
    fields = [
        f"static_assert(__builtin_offsetof(Call, {x[0]}) == {getattr(kernels.Call, x[0]).offset});"
        for x in kernels.Call._fields_
    ]
    source.write_text(LAYOUT.format(
        source=nvrtc.SOURCES / "top_n.cu", size=ctypes.sizeof(kernels.Call), fields="\n".join(fields), warps=kernels.WARPS
    ))  # fmt: skip
    options = ["--ptxas-options=-v", *kernels.options(tile)]
    command = [NVCC, "-cubin", "-o", str(tmp_path / "layout.cubin"), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    used = re.findall(r"function 'top_n_(\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", said, re.DOTALL)
    assert sorted(int(width) for width, _, _ in used) == [*kernels.WIDTHS]
    for width, spilled, registers in used:
        assert int(spilled) == 0
        assert int(registers) <= (64 if int(width) < cuda.RANKED else 128)


@TILES
def test_compiles_by_nvrtc(tile: int) -> None:
    try:
        nvrtc.library()
    except nvrtc.Unavailable as reason:
        pytest.skip(str(reason))
    assert nvrtc._compile("top_n.cu", nvrtc.sources(), kernels.options(tile)).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"arch": 100}, "compute capability"),
        ({"n": 32, "blocks": 2048}, None),
        ({"n": 33}, "32 blocks at most"),
        ({"blocks": 2049}, "2048 blocks"),
        ({"n": 1, "blocks": 0}, None),
    ],
)
def test_what_it_takes(changed: dict[str, int], reason: str | None) -> None:
    said = cuda.ranks(**{"blocks": 1024, "n": 16, "arch": 90, **changed})
    assert said is None if reason is None else reason in (said or "")


@pytest.mark.parametrize("fails", ["library", "version"])
def test_says_why_its_twin_runs(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, fails, mock.Mock(side_effect=nvrtc.Unavailable("the reason")))
    with pytest.warns(RuntimeWarning, match="top_n takes its slower kernel: the reason") as warned:
        assert kernels.program.__wrapped__(64, 0) is None
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("place", "blocks", "loads", "taken"),
    [("cuda", 2048, True, True), ("cuda", 2048, False, False), ("cuda", 2049, True, False), ("cpu", 2048, True, False)],
)
def test_which_twin_runs(place: str, blocks: int, loads: bool, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(launch.tuning, "arch", lambda _: 90)
    monkeypatch.setattr(kernels, "program", lambda *asked: object() if loads and asked == (64, 0) else None)
    monkeypatch.setattr(kernels, "top_n", lambda _, *arguments: ran.append(("cuda", *arguments)))
    monkeypatch.setattr(portable, "top_n", lambda *arguments: ran.append(("triton", *arguments)))
    arguments = SimpleNamespace(device=torch.device(place, 0)), "out", "spans", "tiles", 64, 3, 2, blocks, 64, 16, 1, 2, True
    launch._top_n(*arguments)
    assert ran == [("cuda" if taken else "triton", *arguments)]


def calls_of(spans: Spans, blocks: int, n: int, forced: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the kernel, launched on a machine without a GPU."""
    launched: list[Any] = []

    def launch_kernel(width: int) -> Any:
        return SimpleNamespace(
            launch=lambda grid, shared, found: launched.extend((width, grid, kernels.Call.from_address(found[0]).seen))
        )

    monkeypatch.setattr(kernels.driver, "enter", lambda _: None)
    tiles = spans.query_tiles(64)
    importance = torch.empty(tiles.count * 64, 3, -(-blocks // 16) * 16)
    out = torch.empty(1, spans.rows_q, 3, n, dtype=torch.int32)
    program: Any = {width: launch_kernel(width) for width in kernels.WIDTHS}
    kernels.top_n(program, importance, out, spans, tiles, 64, 0, tiles.count, blocks, 64, n, *forced, False)
    return launched


@pytest.mark.parametrize(("blocks", "width"), [(0, 512), (512, 512), (513, 1024), (1024, 1024), (1025, 2048), (2048, 2048)])
def test_the_narrowest_kernel_runs(blocks: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp for each row of every tile."""
    assert calls_of(plain(100, blocks), blocks, 16, (1, 2), monkeypatch) == [width, (2 * 64 // kernels.WARPS, 3), blocks]


def plain(queries: int, blocks: int, batch: int = 1) -> Spans:
    """Of sequences whose last query has so many blocks of 64 tokens, the last of them whole."""
    return Spans(batch, False, queries, 0, None, queries, 0, blocks * 64 - queries)


# On a GPU.


def packed(blocks: int) -> Spans:
    """Sequences of several lengths up to so many blocks, some of them empty, and rows that belong to none."""
    lens = (0, 1, 5, 64, 0, 100, 130)
    starts = itertools.accumulate(lens, initial=0)
    offsets = [blocks * 64 * i // len(lens) for i in range(len(lens) - 1)] + [blocks * 64 - lens[-1]]
    rows = [(0, start, n, 0, 0, offset) for start, n, offset in zip(starts, lens, offsets)]
    table = torch.tensor([*rows, (0,) * 6], dtype=torch.int32, device="cuda")
    return Spans(len(lens), True, sum(lens) + 7, 0, table, sum(lens) + 7, 0, 0)


def batched(blocks: int) -> Spans:
    """Two sequences whose lengths lie on the device."""
    rows = [(i, 0, 90, 0, 0, blocks * 64 // (i + 1) - 90) for i in range(2)]
    return Spans(2, False, 90, 0, torch.tensor([*rows, (0,) * 6], dtype=torch.int32, device="cuda"), 90, 0, 0)


def drawn(kind: str, *shape: int) -> Tensor:
    rng = torch.Generator("cuda").manual_seed(0)
    x = torch.rand(shape, device="cuda", generator=rng)
    if kind == "close":  # few lanes have all of the highest
        places = torch.rand(*shape[:-1], shape[-1] // 16, device="cuda", generator=rng)
        return x * torch.exp(8 * places).repeat_interleave(16, -1)
    if kind == "mostly ties":
        return torch.where(x < 0.03, x, 0.02)
    return {"random": x, "few values": (4 * x).floor(), "zero": 0 * x, "denormal": x * 1e-43}[kind]


def chosen(rank: Any, importance: Tensor, spans: Spans, blocks: int, n: int, forced: tuple[int, int]) -> Tensor:
    batch = 1 if spans.packed else spans.num_seqs
    out = torch.full((batch, spans.rows_q, importance.shape[1], n), -1, dtype=torch.int32, device="cuda")
    tiles, tile = spans.query_tiles(64), 0
    for count in (1, tiles.count - 1):  # and not from the first tile on
        rank(importance[tile * 64 :], out, spans, tiles, 64, tile, count, blocks, 64, n, *forced, False)
        tile += count
    return out


def own_blocks(spans: Spans) -> Tensor:
    """Of every row of the workspace, where a query has it, or -1."""
    own = torch.full((spans.query_tiles(64).count, 64), -1, device="cuda")
    table = spans.table.tolist() if spans.table is not None else [(0, 0, spans.q_len, 0, 0, spans.offset)] * spans.num_seqs
    tile = 0
    for _, _, queries, _, _, offset in table[: spans.num_seqs]:
        tiles = -(-queries // 64)
        query = torch.arange(tiles * 64, device="cuda")
        own[tile : tile + tiles] = torch.where(query < queries, (offset + query) // 64, -1).view(tiles, 64)
        tile += tiles
    return own.flatten()


CASES = [  # spans, blocks, n, blocks forced at the start and the end
    (plain, 2, 16, (1, 2)),
    (plain, 37, 16, (1, 2)),
    (plain, 2048, 16, (1, 2)),
    (batched, 777, 16, (1, 2)),
    (batched, 512, 32, (0, 1)),
    (packed, 1024, 16, (1, 2)),
    (packed, 1500, 5, (2, 3)),
    (packed, 300, 2, (0, 1)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("make", "blocks", "n", "forced"), CASES)
def test_beside_its_twin(make: Any, blocks: int, n: int, forced: tuple[int, int]) -> None:
    """Over a workspace that is NaN wherever no importance is."""
    spans = plain(100, blocks) if make is plain else make(blocks)
    program = kernels.program(64, torch.cuda.current_device())
    assert program is not None
    own, width = own_blocks(spans), -(-blocks // 16) * 16
    past = torch.arange(width, device="cuda") > own[:, None, None]
    for kind in ("random", "close", "few values", "mostly ties", "zero", "denormal"):
        importance = drawn(kind, len(own), 3, width).masked_fill_(past, float("nan"))
        call = importance, spans, blocks, n, forced
        got = chosen(lambda *arguments: kernels.top_n(program, *arguments), *call)
        want = chosen(portable.top_n, *call)
        assert torch.equal(got, want), kind
        assert (want >= 0).any()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    yield from counted(monkeypatch, kernels, "top_n")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["one sequence", "packed"])
def test_selection_takes_it(layout: str, calls: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk, each ranked beside the importance of the next; captured in a graph as well."""
    tokens, cfg = 5000, nsa.NSAConfig(head_dim=64, num_heads=16, num_kv_heads=1)
    draws = torch.Generator("cuda").manual_seed(0)
    ends = [0, 1700, tokens]
    told: dict[str, Any] = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device="cuda")} if layout == "packed" else {}
    make = lambda rows, heads: torch.randn(1, rows, heads, 64, generator=draws, device="cuda", dtype=torch.bfloat16)
    q, k = make(tokens, 16), make(sum(cfg.num_compressed_blocks(b - a) for a, b in itertools.pairwise(ends)), 1)
    k = k if told else make(cfg.num_compressed_blocks(tokens), 1)
    lse = nsa.compressed_attention(q, k, k, cfg, **told)[1]
    call = lambda: nsa.select_blocks(q, k, lse, cfg, **told)
    with mock.patch.object(cuda, "ranks", return_value="switched off"):
        want = call()
    monkeypatch.setattr(portable, "WORKSPACE", 6 * 64 * 4 * 96)
    for _ in range(10):
        assert torch.equal(call(), want)
    assert len(calls) > 100
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(10):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, want)


@pytest.mark.gpu
def test_wrong_lengths_stay_inside(calls: list[None]) -> None:
    cfg = nsa.NSAConfig(head_dim=64, num_heads=16, num_kv_heads=1)
    make = lambda rows, heads: torch.randn(1, rows, heads, 64, device="cuda", dtype=torch.bfloat16)
    q, k = make(300, 16), make(cfg.num_compressed_blocks(300), 1)
    lse = torch.zeros(1, 300, 16, device="cuda")
    for ends in ([0, 5000, -7, 10**6], [300, 0], [0, 0]):
        nsa.select_blocks(q, k, lse, cfg, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device="cuda"))
    for length in (10**6, 3, 0, -5):
        nsa.select_blocks(q, k, lse, cfg, seqlen_k=torch.tensor([length], dtype=torch.int32, device="cuda"))
    torch.cuda.synchronize()
    assert len(calls) == 7
