"""A decode step in one kernel of CUDA C++: how it is compiled and chosen; and on a GPU its results beside the reference's."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import nsa
from nsa import decode_tuning
from nsa.kernels.cuda import CHOSEN, HEAD_DIMS, ROWS, decode_step, driver, nvrtc
from nsa.kernels.cuda.selected_lists import options
from tests import naive
from tests.kernels.test_cuda_selected import NVCC
from tests.kernels.test_decode import Filled
from tests.kernels.test_steps import check_selection
from tests.steps import steps
from tests.tolerance import assert_within_2x

DTYPES = [torch.bfloat16, torch.float16]
CFG = nsa.NSAConfig(head_dim=128, num_heads=32, num_kv_heads=2)
LAYOUT = """#include "{source}"
static_assert(sizeof(Call) == {size});
{fields}
static_assert(D == {dim} && DV == {value_dim} && G == {rows} && THREADS == {threads});
static_assert(MOST_BLOCKS == {blocks} && MOST_CHOSEN == {chosen});
static_assert(LENGTH == {length} && STRIDE == {stride} && NEAR_TILES == {near} && KEPT == {kept});
static_assert(1023 + NEAR + NEAR_TILES * KEPT * 4 <= {shared});
"""


@pytest.mark.parametrize(("dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_by_nvcc(dim: int, value_dim: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Within registers and shared memory; and what the launcher says twice is said alike."""
    if NVCC is None:
        pytest.skip("there is no nvcc here")
    call = decode_step.Call
    fields = [f"static_assert(__builtin_offsetof(Call, {x[0]}) == {getattr(call, x[0]).offset});" for x in call._fields_]
    source = tmp_path / "layout.cu"
    source.write_text(LAYOUT.format(
        source=nvrtc.SOURCES / "decode_step.cu", size=ctypes.sizeof(call), fields="\n".join(fields), dim=dim,
        value_dim=value_dim, rows=ROWS, threads=decode_step.THREADS, blocks=decode_step.MOST_BLOCKS,
        chosen=CHOSEN, length=decode_step.LENGTH, stride=decode_step.STRIDE, near=decode_step.NEAR_TILES,
        kept=decode_step.KEPT, shared=decode_step.SHARED,
    ))  # fmt: skip
    command = [
        NVCC,
        "-cubin",
        "-o",
        str(tmp_path / "layout.cubin"),
        "--ptxas-options=-v",
        *options(dtype, ROWS, dim, value_dim),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "setmaxnreg" not in said, said  # ptxas says so where it ignores it
    assert max(int(x) for x in re.findall(r"Used (\d+) registers", said)) <= 65536 // decode_step.THREADS
    assert max(int(x) for x in re.findall(r"(\d+) bytes spill stores", said)) == 0
    assert decode_step.SHARED <= 232448


@pytest.mark.parametrize(("dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_by_nvrtc(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    try:
        nvrtc.library()
    except nvrtc.Unavailable as reason:
        pytest.skip(str(reason))
    assert nvrtc._compile("decode_step.cu", nvrtc.sources(), options(dtype, ROWS, dim, value_dim)).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "num_selected_blocks": 32}, None),
        ({"dim": 64}, None),
        ({"num_heads": 2}, None),
        ({"arch": 100}, "compute capability"),
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"dim": 192, "value_dim": 128}, None),
        ({"dim": 96}, "head dims of 64/64"),
        ({"value_dim": 64}, "head dims of 64/64"),
        ({"queries": 2}, "one token"),
        ({"num_heads": 64}, "up to 16 heads"),
        ({"paged": True}, "got pages"),
        ({"block_length": 16}, "blocks of 32 tokens every 16"),
        ({"num_selected_blocks": 33}, "up to 32 of 4096"),
        ({"max_seq_len": 1 << 19}, "up to 32 of 4096"),
    ],
)
def test_what_it_takes(changed: dict[str, Any], reason: str | None) -> None:
    call = {"dtype": torch.bfloat16, "dim": 128, "queries": 1, "paged": False, "max_seq_len": 1 << 18, "arch": 90} | changed
    call.setdefault("value_dim", call["dim"])
    sizes = {name: x for name, x in changed.items() if hasattr(CFG, name) and name != "value_dim"}
    cfg = replace(CFG, head_dim=call["dim"], value_dim=call["value_dim"], **sizes)
    q = torch.empty(1, call["queries"], cfg.num_heads, call["dim"], dtype=call["dtype"])
    said = decode_step.supports(q, call["value_dim"], call["paged"], call["max_seq_len"], cfg, call["arch"])
    assert said is None if reason is None else reason in (said or "")


@pytest.mark.parametrize(
    ("pairs", "whole"), [(128, True), (132, True), (64, True), (32, False), (160, False), (200, True), (264, True), (400, True)]
)
def test_when_it_is_chosen(pairs: int, whole: bool) -> None:
    assert decode_tuning.whole(pairs, 132) == whole


@pytest.mark.parametrize("fails", ["library", "version"])
def test_says_why_its_twin_runs(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, fails, mock.Mock(side_effect=nvrtc.Unavailable("the reason")))
    with pytest.warns(RuntimeWarning, match="decode_step takes its slower kernel: the reason") as warned:
        assert decode_step.program.__wrapped__(torch.bfloat16, 128, 128, 0) is None
    assert warned[0].filename == __file__


@pytest.mark.parametrize("room", [300, 80_000])
def test_what_it_launches(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for each pair, told where everything lies; weights in memory only where there are too many."""
    described, kernel = mock.Mock(), mock.Mock()
    monkeypatch.setattr(driver, "describe", described)
    monkeypatch.setattr(driver, "enter", mock.Mock())
    cache = nsa.NSACache(CFG, 3, room, dtype=torch.bfloat16)
    view, numbers = cache.view(), torch.zeros(3 * 32 * 128 + 1, dtype=torch.bfloat16)
    q, gates = numbers[1:].view(3, 1, 32, 128), torch.zeros(3, 1, 32, 3)
    pools, rings = [view.k_slc, view.v_slc, view.k_cmp, view.v_cmp], [view.k_win, view.v_win]
    told = []
    kernel.launch.side_effect = lambda grid, shared, arguments, early: told.append(
        (
            grid,
            shared,
            early,
            arguments[:-1],
            decode_step.Call.from_buffer_copy(ctypes.string_at(arguments[-1], ctypes.sizeof(decode_step.Call))),
        )
    )
    o, indices = decode_step.decode_step(kernel, q, gates, pools, rings, view.lengths, CFG)
    ((grid, shared, early, maps, call),) = told
    assert (grid, shared, early) == ((6, 1), decode_step.SHARED, True)
    assert maps == [x.args[0] for x in described.call_args_list]
    assert maps == [maps[0] + 128 * i for i in range(6)]
    assert maps[0] % 64 == 0
    in_order = (view.k_cmp, view.v_cmp, view.k_slc, view.v_slc, view.k_win, view.v_win)
    assert all(x.args[1] is y for x, y in zip(described.call_args_list, in_order, strict=True))
    assert call.q % 4 == 0  # a copy: these queries lie at an odd address
    assert (call.gates, call.lengths, call.o, call.indices) == tuple(x.data_ptr() for x in (gates, view.lengths, o, indices))
    assert (call.heads, call.kv_heads, call.group, call.n, call.window, call.wide_gates) == (32, 2, 16, 16, 512, 1)
    assert (call.rows, call.slots, call.tiles) == (view.k_slc.shape[1], view.k_win.shape[1], -(-view.k_cmp.shape[1] // 64))
    assert (call.kept is None) == (call.tiles <= decode_step.NEAR_TILES) == (room == 300)


@pytest.fixture
def always(device: str) -> Iterator[mock.Mock]:
    """The kernel, for however few sequences."""
    if device == "cpu":
        pytest.skip("only a GPU runs it")
    with (
        mock.patch.object(decode_tuning, "whole", return_value=True),
        mock.patch.object(decode_step, "decode_step", wraps=decode_step.decode_step) as called,
    ):
        yield called


CASES = [  # the configuration, and the most tokens
    ({}, 600),
    ({}, 30_000),
    ({"num_heads": 10, "num_selected_blocks": 32, "window_size": 100}, 9_000),
    ({"num_kv_heads": 32, "num_selected_blocks": 3, "num_local_blocks": 1}, 3_000),
    ({"head_dim": 64, "value_dim": 64, "window_size": 64, "num_initial_blocks": 3}, 20_000),
    ({"head_dim": 64, "value_dim": 64, "num_selected_blocks": 8, "window_size": 1000}, 70),
    ({"head_dim": 192, "num_selected_blocks": 20, "num_local_blocks": 4}, 10_000),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_step_over_any_cache(device: str, number: int, dtype: torch.dtype, always: mock.Mock) -> None:
    changed, longest = CASES[number]
    filled = Filled(number, device, kernels=True, batch=3, given=(replace(CFG, **changed), dtype, longest))
    for turn in range(3):
        if turn:
            filled.append(turn)
        case, low = filled.case(1), filled.inputs(1)
        exact, plain = low.to(torch.float64), low.to(dtype)
        got, indices = nsa.cached_attention(low.q, low.gates, filled.cache, return_block_indices=True)
        assert always.call_count == 2 * turn + 1
        check_selection(case, exact, indices)
        ref, base = steps(case, exact, indices), naive.nsa_steps(case, plain, indices)
        assert_within_2x(f"o of {case}", got, ref.o, base.o, dtype)
        again = nsa.cached_attention(low.q, low.gates, filled.cache)
        assert torch.equal(got, again), f"{case} is not the same on a second run"


@pytest.mark.parametrize("tokens", [1, 31, 32, 64, 65, 1_055, 1_056, 1_057, 65_552, 65_553, 200_000])
def test_chooses_what_its_twin_does(device: str, tokens: int, always: mock.Mock) -> None:
    """At every edge of a block and of a tile; gates of fp32."""
    draw = torch.Generator(device).manual_seed(tokens)
    make = lambda count, heads, dim=128: torch.randn(2, count, heads, dim, generator=draw, device=device, dtype=torch.bfloat16)
    cache = nsa.NSACache(CFG, 2, 200_064, dtype=torch.bfloat16, device=device)
    means = [nsa.BlockCompressor(128, CFG, "mean") for _ in range(2)]
    cache.append(*(make(tokens, 2) for _ in range(6)), *means)
    q, gates = 3 * make(1, 32), make(1, 32, 3).float().sigmoid()
    got, mine = nsa.cached_attention(q, gates, cache, return_block_indices=True)
    assert always.call_count == 1
    with mock.patch.object(decode_tuning, "whole", return_value=False):
        want, theirs = nsa.cached_attention(q, gates, cache, return_block_indices=True)
    assert always.call_count == 1
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("tokens", [5_000, 100_000])
def test_ties_go_to_the_lowest_block(device: str, tokens: int, always: mock.Mock) -> None:
    cache = nsa.NSACache(CFG, 2, 100_064, dtype=torch.bfloat16, device=device)
    k = torch.randn(2, tokens, 2, 128, device=device, dtype=torch.bfloat16)
    cache.append(k, k, k, k, k, k, *(nsa.BlockCompressor(128, CFG, "mean") for _ in range(2)))
    q, gates = k.new_zeros(2, 1, 32, 128), k.new_ones(2, 1, 32, 3)
    _, indices = nsa.cached_attention(q, gates, cache, return_block_indices=True)
    own = (tokens - 1) // 64
    assert always.called
    # Block 0 counts fewer strides, but is forced; all others tie exactly.
    assert indices[:, 0].tolist() == [[[*range(14), own - 1, own]] * 2] * 2


def test_nothing_to_attend_to(device: str, always: mock.Mock) -> None:
    """An empty sequence, which a graph's first run without an append has, selects nothing and reads nothing."""
    cache = nsa.NSACache(CFG, 2, 300, dtype=torch.float16, device=device)
    for x in cache._store._rows.values():
        x.fill_(float("nan"))
    q, gates = torch.randn(2, 1, 32, 128, device=device).half(), torch.ones(2, 1, 32, 3, device=device).half()
    with cache.dry_run():
        o, indices = nsa.cached_attention(q, gates, cache, return_block_indices=True)
    assert always.called
    assert torch.equal(indices, torch.full_like(indices, -1))
    assert torch.equal(o, torch.zeros_like(o))


def test_queries_at_an_odd_address(device: str, always: mock.Mock) -> None:
    cache = nsa.NSACache(CFG, 1, 300, dtype=torch.bfloat16, device=device)
    cache.append(
        *torch.randn(6, 1, 200, 2, 128, device=device).bfloat16(), *(nsa.BlockCompressor(128, CFG, "mean") for _ in "kv")
    )
    numbers = torch.randn(32 * 128 + 1, device=device).bfloat16()
    odd, gates = numbers[1:].view(1, 1, 32, 128), numbers[: 32 * 3].view(1, 1, 32, 3).sigmoid()
    assert odd.data_ptr() % 4 == 2
    assert torch.equal(nsa.cached_attention(odd, gates, cache), nsa.cached_attention(odd.clone(), gates, cache))
    assert always.call_count == 2


def test_replays_give_what_steps_give(device: str, always: mock.Mock) -> None:
    """While the window's ring wraps around, and blocks and tiles begin."""
    make = lambda heads, dim=128: torch.zeros(2, 1, heads, dim, dtype=torch.bfloat16, device=device)
    new, q, gates = [make(2) for _ in range(6)], make(32), make(32, 3)
    means = [nsa.BlockCompressor(128, CFG, "mean") for _ in range(2)]
    captured, plain = (nsa.NSACache(CFG, 2, 1_300, dtype=torch.bfloat16, device=device) for _ in range(2))

    def step(cache: nsa.NSACache) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            cache.append(*new, *means)
        return nsa.cached_attention(q, gates, cache, return_block_indices=True)

    rng = torch.Generator(device).manual_seed(0)
    before = [torch.randn(2, 990, 2, 128, generator=rng, device=device).bfloat16() for _ in range(6)]
    for cache in (captured, plain):
        cache.append(*before, *means)
    graph = nsa.DecodeGraph(lambda: step(captured), [captured], 1)
    for _ in range(150):
        for x in (*new, q, gates):
            x.copy_(torch.randn(x.shape, generator=rng, device=device))
        o, indices = graph.replay()
        want, theirs = step(plain)
        assert torch.equal(indices, theirs)
        assert torch.equal(o, want)
    assert always.called
