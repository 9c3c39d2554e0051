"""The selected branch in CUDA C++: how it is compiled, kept and chosen; and on a GPU its results beside the reference's and its
twin's."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import nsa
from nsa import ops
from nsa.kernels import cuda, launch
from nsa.kernels.cuda import nvrtc, selected_dq, selected_lists
from nsa.kernels.cuda import selected_forward as kernels
from nsa.kernels.triton.sequence import spans
from nsa.ops.arguments import sequence_info
from tests import naive
from tests.cases import Case
from tests.kernels.draws import GPU_SHAPES, guarded_inputs
from tests.steps import steps
from tests.tolerance import assert_within_2x

Dims = tuple[int, int]  # of keys and of values


def config(group: int, dims: Dims = (128, 128)) -> nsa.NSAConfig:
    return nsa.NSAConfig(head_dim=dims[0], value_dim=dims[1], num_heads=2 * group, num_kv_heads=2)


CFG, GROUPS = config(16), [16, 8, 4, 2, 1]
DTYPES = [torch.bfloat16, torch.float16]
NVCC = shutil.which("nvcc") or next(map(str, sorted(Path("/usr/local").glob("cuda-1[23]*/bin/nvcc"))), None)
LAYOUT = """#include "{source}"
static_assert(sizeof(Call) == {size});
{fields}
static_assert(SIZE == {block} && D == {dim} && DV == {value_dim} && G == {group} && R == {queries} && WIDTH == {width});
static_assert(Item<R>::WORDS == {item} && LIST_THREADS<R> == {lister} && THREADS == {threads});
static_assert(1023 + BARRIERS + (2 * SLOTS + 1) * 8 <= {shared});
"""
LAUNCHERS = {"selected_forward": kernels, "selected_dq": selected_dq}
SPILLS = {  # bytes that a thread may store, of groups of 16 and of smaller ones; those of long keys lie outside of the loop
    ("selected_forward", False): (32, 32),
    ("selected_forward", True): (32, 32),
    ("selected_dq", False): (0, 32),
    ("selected_dq", True): (32, 128),
}
EACH = pytest.mark.parametrize(
    ("name", "group", "dims", "dtype"), [*itertools.product(LAUNCHERS, GROUPS, cuda.HEAD_DIMS, DTYPES)], ids=str
)


@EACH
def test_compiles_by_nvcc(name: str, group: int, dims: Dims, dtype: torch.dtype, tmp_path: Path) -> None:
    """Within registers and shared memory; and what the launcher says twice is said alike."""
    launcher: Any = LAUNCHERS[name]
    if NVCC is None:
        pytest.skip("there is no nvcc here")
    source = tmp_path / "layout.cu"
    fields = [
        f"static_assert(__builtin_offsetof(Call, {x[0]}) == {getattr(launcher.Call, x[0]).offset});"
        for x in (*selected_lists.Lists._fields_, *launcher.Call._fields_)
    ]
    source.write_text(LAYOUT.format(
        source=nvrtc.SOURCES / f"{name}.cu", size=ctypes.sizeof(launcher.Call), fields="\n".join(fields),
        block=cuda.SIZE, dim=dims[0], value_dim=dims[1], group=group, queries=selected_lists.queries_of(launcher.WARPS, group),
        width=cuda.WIDTH, item=selected_lists.item_words(launcher.WARPS, group),
        lister=selected_lists.list_threads(launcher.WARPS, group), threads=launcher.THREADS, shared=launcher.SHARED,
    ))  # fmt: skip
    options = selected_lists.options(dtype, group, *dims)
    command = [NVCC, "-cubin", "-o", str(tmp_path / "layout.cubin"), "--ptxas-options=-v", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "setmaxnreg" not in said, said  # ptxas says so where it ignores it
    assert max(int(x) for x in re.findall(r"Used (\d+) registers", said)) <= 65536 // launcher.THREADS
    assert max(int(x) for x in re.findall(r"(\d+) bytes spill stores", said)) <= SPILLS[name, dims[0] > 128][group < 16]
    assert launcher.SHARED <= 232448
    given = selected_lists.list_shared(selected_lists.words_of(cuda.MOST_KEYS))
    assert max(map(int, re.findall(r"(\d+) bytes smem", said))) + given <= 72 << 10  # three of them fit a multiprocessor


@EACH
def test_compiles_by_nvrtc(name: str, group: int, dims: Dims, dtype: torch.dtype) -> None:
    try:
        nvrtc.library()
    except nvrtc.Unavailable as reason:
        pytest.skip(str(reason))
    assert nvrtc._compile(f"{name}.cu", nvrtc.sources(), selected_lists.options(dtype, group, *dims)).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "width": 3}, None),
        ({"arch": 100}, "compute capability"),
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"value_dim": 64}, "head dims of 64/64 or 128/128 or 192/128"),
        ({"dim": 64, "value_dim": 64}, None),
        ({"dim": 192}, None),
        ({"dim": 192, "value_dim": 192}, "head dims of"),
        ({"dim": 96, "value_dim": 96}, "head dims of"),
        ({"group": 1}, None),
        ({"group": 8}, None),
        ({"group": 3}, "rows of a fragment"),
        ({"group": 32}, "rows of a fragment"),
        ({"size": 32}, "64 tokens"),
        ({"width": 17}, "16 blocks"),
        ({"keys": cuda.MOST_KEYS + 1}, "blocks of"),
    ],
)
def test_what_it_takes(changed: dict[str, Any], reason: str | None) -> None:
    call = {
        "dtype": torch.bfloat16,
        "dim": 128,
        "value_dim": 128,
        "group": 16,
        "size": 64,
        "width": 16,
        "keys": 65536,
        "arch": 90,
    }
    said = cuda.supports(**{**call, **changed})
    assert said is None if reason is None else reason in (said or "")


def test_the_random_draws_reach_it() -> None:
    taken = [cuda.supports(getattr(torch, x.dtype), x.dim, x.value_dim, x.group, x.size, x.n, 500, 90) for x in GPU_SHAPES]
    assert None in taken[:6]  # of which every layout of lengths is drawn


def test_a_key_for_everything() -> None:
    one = ({"a.cu": b"x", "b.cuh": b"y"}, ("-o",), (13, 0))
    others = [
        ({"a.cu": b"x", "b.cuh": b"z"}, ("-o",), (13, 0)),
        ({"a.cu": b"xb.cuh", "": b"y"}, ("-o",), (13, 0)),
        ({"a.cu": b"x", "b.cuh": b"y"}, ("-o", "-p"), (13, 0)),
        ({"a.cu": b"x", "b.cuh": b"y"}, ("-o",), (13, 1)),
    ]
    assert nvrtc.key(*one) == nvrtc.key(dict(reversed(one[0].items())), *one[1:])
    assert len({nvrtc.key(*x) for x in (one, *others)}) == 5


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The options of what was compiled, by a compiler that isn't there."""
    asked: list[tuple[str, ...]] = []

    def compile(name: str, texts: dict[str, bytes], options: tuple[str, ...]) -> bytes:
        asked.append(options)
        return " ".join((name, *options)).encode()

    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_compile", compile)
    return asked


def test_compiles_once(compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new"))
    for _ in range(2):
        assert nvrtc.cubin("selected_forward.cu", ("-a",)) == b"selected_forward.cu -a"
        assert nvrtc.cubin("selected_forward.cu", ("-b",)) == b"selected_forward.cu -b"
    assert compiled == [("-a",), ("-b",)]
    assert sorted(x.suffix for x in (tmp_path / "new" / "nsa").iterdir()) == [".cubin"] * 2
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    nvrtc.cubin("selected_forward.cu", ("-a",))
    assert len(compiled) == 3


def test_does_without_a_cache(compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert nvrtc.cubin("selected_forward.cu", ()) == b"selected_forward.cu"


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("fails", ["library", "version"])
def test_says_why_its_twin_runs(name: str, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher: Any = LAUNCHERS[name]
    monkeypatch.setattr(nvrtc, fails, mock.Mock(side_effect=nvrtc.Unavailable("the reason")))
    with pytest.warns(RuntimeWarning, match=f"{name} takes its slower kernel: the reason") as warned:
        assert launcher.program.__wrapped__(torch.bfloat16, 16, 128, 128, 0) is None
    assert warned[0].filename == __file__


# Where a call's tensors are, the heads of a group, whether the program loads, and whether it runs.
PLACES = pytest.mark.parametrize(
    ("place", "group", "loads", "taken"),
    [
        ("cuda", 16, True, True),
        ("cuda", 16, False, False),
        ("cuda", 1, True, True),
        ("cuda", 8, False, False),
        ("cuda", 12, True, False),
        ("cpu", 16, True, False),
    ],
)


def on_hopper(launcher: Any, place: str, group: int, loads: bool, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """As if there were one: makes what stands for a tensor of so many heads, which a launch only asks for its like."""
    monkeypatch.setattr(launch.tuning, "arch", lambda _: 90)
    monkeypatch.setattr(launch.hopper, "supports", lambda *_: None)
    monkeypatch.setattr(launch, "union_lists", lambda *_: SimpleNamespace(queries=4))
    monkeypatch.setattr(launcher, "program", lambda _, *asked: object() if loads and asked == (group, 128, 128, 0) else None)
    return lambda heads: SimpleNamespace(shape=(1, 99, heads, 128), dtype=torch.bfloat16, device=torch.device(place, 0))


@PLACES
def test_which_twin_runs(place: str, group: int, loads: bool, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa.kernels.hopper import selected_forward as gluon

    fake = on_hopper(kernels, place, group, loads, monkeypatch)
    monkeypatch.setattr(kernels, "selected_forward", lambda *_: ("cuda", None, None))
    monkeypatch.setattr(gluon, "selected_forward", lambda *_: ("gluon", None, None))
    indices = torch.zeros(1, 99, 2, 16, dtype=torch.int32)
    ran = launch.selected_forward(fake(2 * group), fake(2), fake(2), indices, None, 64, 0.1)[0]
    assert ran == ("cuda" if taken else "gluon")


# On a GPU.


def counted(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> Iterator[list[None]]:
    """One entry for each call that a kernel took; a call that fell back is an error."""
    taken: list[None] = []
    kernel = getattr(module, name)

    def counting(*args: Any) -> Any:
        taken.append(None)
        return kernel(*args)

    monkeypatch.setattr(module, name, counting)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield taken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    yield from counted(monkeypatch, kernels, "selected_forward")


def twin(call: Callable[[], Any]) -> Any:
    with mock.patch.object(cuda, "supports", return_value="switched off"):
        return call()


def odd_sets(case: Case, width: int, empty: bool = False) -> Tensor:
    """Any order, duplicates, negatives, the future, and what overflows when multiplied."""
    rng = torch.Generator().manual_seed(case.seed)
    shape = (*case.shape(case.lens_q, case.extra_q), CFG.num_kv_heads, width)
    if empty:
        return torch.full(shape, -1, dtype=torch.int32, device="cuda")
    indices = torch.randint(-2, max(case.lens_k) // 64 + 3, shape, generator=rng, dtype=torch.int32)
    wild = torch.rand(shape, generator=rng)
    return indices.masked_fill(wild < 0.05, 2**31 - 1).masked_fill(wild > 0.95, -(2**31)).cuda()


CASES = {
    "one query": Case(0, "plain", CFG, (1,), (1,)),
    "less than a tile": Case(1, "plain", CFG, (7,), (7,)),
    "half a tile over": Case(2, "plain", CFG, (203,), (203,), extra_cmp=2),
    "a batch": Case(3, "plain", CFG, (161, 161), (161, 161)),
    "whole tiles and blocks": Case(4, "plain", CFG, (256, 256), (256, 256)),
    "a chunk": Case(5, "offset", CFG, (37, 37), (300, 300)),
    "rows past an int": Case(6, "rows past an int", CFG, (101,), (170,), extra_k=11),
    "rows past a tensor": Case(7, "rows past a tensor", CFG, (40, 40), (77, 230), extra_k=9),
    "packed": Case(8, "packed", CFG, (1, 15, 16, 17, 100), (1, 15, 16, 17, 100), extra_q=3, extra_k=20),
    "packed, some empty": Case(9, "packed", CFG, (0, 64, 0, 65, 129, 0), (0, 64, 0, 65, 129, 0)),
    "packed chunks": Case(10, "packed offset", CFG, (0, 5, 16, 33, 64), (17, 100, 16, 200, 65), extra_q=1, extra_k=5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 5, 0], ids=["16 blocks", "5 blocks", "none"])
@pytest.mark.parametrize("name", CASES)
def test_beside_reference_and_twin(name: str, width: int, dtype: torch.dtype, calls: list[None]) -> None:
    """Alone and with the gated sum, over inputs that lie strided among NaN."""
    case = CASES[name]
    low = guarded_inputs(case, dtype, "cuda")
    exact, plain = low.to(torch.float64), low.to(dtype)
    indices = odd_sets(case, width or 16, not width)
    got, ref, base = steps(case, low, indices, "triton"), steps(case, exact, indices), naive.nsa_steps(case, plain, indices)
    assert len(calls) == 2
    assert_within_2x(f"o_slc of {case}", got.o_slc, ref.o_slc, base.o_slc, dtype)
    assert_within_2x(f"o of {case}", got.o, ref.o, base.o, dtype)
    told = case.lengths("cuda")
    with torch.no_grad():  # the gated sum alone, which must be the same to the bit
        assert torch.equal(got.o, nsa.nsa_attention(*low.tensors(), CFG, block_indices=indices, **told, backend="triton"))
        assert len(calls) == 3
        alone = lambda: with_lse(case, low.q, low.k_slc, low.v_slc, indices)
        (o, lse), (other, other_lse) = alone(), twin(alone)
    assert len(calls) == 4
    assert torch.equal(o, got.o_slc)
    torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=1e-4)
    assert (o.double() - other.double()).norm() <= 1e-2 * other.double().norm()


OTHERS = [  # groups, head dims, cases: a few, for each group and layout of lengths has its twin compiled
    *itertools.product([1], [(128, 128)], ["half a tile over", "rows past a tensor", "packed chunks"]),
    (2, (128, 128), "packed chunks"),
    *itertools.product([4], [(128, 128)], ["half a tile over", "packed, some empty"]),
    *itertools.product([8], [(128, 128)], ["rows past a tensor", "packed chunks"]),
    *itertools.product([16], [(64, 64)], ["half a tile over", "rows past a tensor", "packed, some empty"]),
    (4, (64, 64), "packed chunks"),
    *itertools.product([16], [(192, 128)], ["half a tile over", "rows past a tensor", "packed chunks"]),
    *itertools.product([8], [(192, 128)], ["rows past a tensor", "packed, some empty"]),
    *itertools.product([1, 2, 4], [(192, 128)], ["packed chunks"]),
]


def of_shape(name: str, group: int, dims: Dims) -> tuple[Case, torch.dtype]:
    return replace(CASES[name], cfg=config(group, dims)), DTYPES[group == 8]


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dims", "name"), OTHERS)
def test_other_groups_and_head_dims(group: int, dims: Dims, name: str, calls: list[None]) -> None:
    """Alone, then with the gated sum."""
    case, dtype = of_shape(name, group, dims)
    low = guarded_inputs(case, dtype, "cuda")
    indices, told = odd_sets(case, 16), case.lengths("cuda")
    arguments = lambda x: (x.q.detach(), x.k_slc.detach(), x.v_slc.detach(), indices)
    o, lse = with_lse(case, *arguments(low))
    assert len(calls) == 1
    ref = nsa.selected_attention(*arguments(low.to(torch.float64)), case.cfg, **told, backend="reference")
    assert_within_2x(f"o_slc of {case}", o, ref, naive.nsa_steps(case, low.to(dtype), indices).o_slc, dtype)
    other, other_lse = twin(lambda: with_lse(case, *arguments(low)))
    torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=1e-4)
    assert (o.double() - other.double()).norm() <= 1e-2 * other.double().norm()
    rng = torch.Generator("cuda").manual_seed(case.seed)
    make = lambda *shape: torch.randn(*o.shape[:3], *shape, generator=rng, device="cuda").to(dtype)
    o_cmp, o_win, gates = make(dims[1]), make(dims[1]), make(3)
    where = spans(o.shape[1], low.k_slc.shape[1], sequence_info(o, *lengths_of(case, low.k_slc)), 1, 1)
    rows = torch.zeros(o.shape[:2], dtype=torch.bool, device="cuda")
    for (batch, its), *_ in case.places():
        rows[batch, its] = True
    for save in (True, False):
        sum_, own, again = launch.selected_and_combined(
            *arguments(low), where, 64, case.cfg.softmax_scale, o_cmp, o_win, gates, save
        )  # fmt: skip
        want = sum(gates[..., i, None].double() * x.double() for i, x in enumerate((o_cmp, o, o_win)))
        assert torch.equal(again, lse)
        assert torch.equal(own, o if save else own.new_empty(0))
        assert ((sum_.double() - want)[rows].abs() <= 2**-8 * want[rows].abs() + 1e-5).all()
    assert len(calls) == 3


def lengths_of(case: Case, k: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """As an operator takes them."""
    told = case.lengths("cuda")
    cu_q, said = told.get("cu_seqlens"), told.get("seqlen_k", 0 if case.packed else k.shape[1])
    lens, number = (said, 0) if isinstance(said, Tensor) else (None, said)
    return cu_q, told.get("cu_seqlens_k", cu_q), lens, number


def with_lse(case: Case, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return ops.selected_op(q, k, v, indices, *lengths_of(case, k), 64, case.cfg.softmax_scale)


def big(tokens: int, dtype: torch.dtype, group: int = 16, dims: Dims = (128, 128)) -> tuple[Tensor, ...]:
    """More tiles than multiprocessors, neighbours that share half of their blocks, and scores whose maximum grows by leaps."""
    rng = torch.Generator("cuda").manual_seed(0)
    make = lambda heads, dim: torch.randn(1, tokens, heads, dim, generator=rng, device="cuda")
    q, k, v = make(4 * group, dims[0]) * 3, make(4, dims[0]), make(4, dims[1])
    own = torch.arange(tokens, device="cuda")[None, :, None, None] // 64
    share = torch.rand(1, tokens, 4, 16, generator=rng, device="cuda")
    share = torch.where(
        torch.rand(share.shape, generator=rng, device="cuda") < 0.5, share[:, torch.arange(tokens) // 9 * 9], share
    )
    indices = (share * (own + 1)).int()
    indices[..., 0], indices[..., 1] = 0, own[..., 0]
    return q.to(dtype), k.to(dtype), v.to(dtype), indices


LARGE = [
    *itertools.product([1003, 8191], DTYPES, [16], [(128, 128)]),
    *itertools.product([40000], [torch.bfloat16], GROUPS, [(128, 128)]),
    (40000, torch.bfloat16, 16, (64, 64)),
    *itertools.product([40000], [torch.bfloat16], [16, 4], [(192, 128)]),
    (8191, torch.float16, 1, (192, 128)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dtype", "group", "dims"), LARGE)
def test_the_same_every_time(tokens: int, dtype: torch.dtype, group: int, dims: Dims, calls: list[None]) -> None:
    q, k, v, indices = big(tokens, dtype, group, dims)
    call = lambda: ops.selected_op(q, k, v, indices, None, None, None, tokens, 64, 128**-0.5)
    o, lse = call()
    other, other_lse = twin(call)
    torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=1e-3)
    worst = (o.double() - other.double()).norm(dim=-1) / other.double().norm(dim=-1)
    assert worst.max() <= 3e-2, f"row {worst.argmax()} differs by {worst.max()}"
    for _ in range(10):
        again = call()
        assert torch.equal(again[0], o)
        assert torch.equal(again[1], lse)
    assert len(calls) == 11


@pytest.mark.gpu
def test_captured_in_a_graph(calls: list[None]) -> None:
    q, k, v, indices = big(1003, torch.bfloat16)
    call = lambda: ops.selected_op(q, k, v, indices, None, None, None, 1003, 64, 128**-0.5)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = call()
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    indices.copy_(indices.roll(1, 2))
    graph.replay()
    again = call()
    assert torch.equal(o, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_wrong_lengths_stay_inside(group: int, calls: list[None]) -> None:
    q, k, v, indices = big(300, torch.bfloat16, group)
    for ends in ([0, 5000, -7, 10**6], [300, 0], [0, 0]):
        wild = torch.tensor(ends, dtype=torch.int32, device="cuda")
        ops.selected_op(q, k, v, indices, wild, wild, None, 0, 64, 0.1)
    for length in (10**6, 3, 0, -5):
        ops.selected_op(q, k, v, indices, None, None, torch.tensor([length], dtype=torch.int32, device="cuda"), 0, 64, 0.1)
    torch.cuda.synchronize()
    assert len(calls) == 7
