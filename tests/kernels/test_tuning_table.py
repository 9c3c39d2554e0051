"""Every tile that ``nsa.tuning`` chooses on Hopper gives right results: those that the random draws don't reach, here.

A wrong tile is a real danger: one of the scores' tiles, with a stage less, once was fast and 13% off.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import nsa
from nsa import tuning
from nsa.kernels import hopper
from tests import naive
from tests.cases import Case
from tests.kernels.draws import GPU_SHAPES, Shape, guarded_inputs
from tests.tolerance import assert_within_2x

DIMS = ((16, 16), (40, 72), (64, 64), (80, 80), (128, 64), (128, 128), (192, 128), (256, 192), (256, 256))
GROUPS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 32, 40, 48, 64, 80, 128)
BLOCKS = ((8, 8), (4, 16), (16, 32), (1, 64), (4, 64), (8, 64), (16, 64), (32, 64), (64, 64), (20, 100), (16, 128))
GRID = [
    Shape(dtype, *dims, 1, group, stride, stride, size, n)
    for dtype, dims, group, (stride, size), n in itertools.product(("bfloat16", "float32"), DIMS, GROUPS, BLOCKS, (3, 16, 33))
]


def choices(x: Shape) -> set[tuple[object, ...]]:
    """What is chosen for a call of this shape, each with the kernels that it is chosen for."""
    arch, dtype = 90, getattr(torch, x.dtype)
    dims, blocks = (x.dim, x.value_dim, dtype), (x.group, x.size, arch)
    selected = {f.__name__: f(*dims, *blocks) for f in (tuning.selected_forward, tuning.selected_dq, tuning.selected_dkv)}
    found: set[tuple[object, ...]] = set(selected.items())
    found.add(("union", tuning.union_queries(x.group, x.n, selected["selected_forward"].block_m)))
    registers = tuning.importance_registers(x.dim, dtype, x.size // x.stride, arch)
    found.add(("importance", tuning.importance(x.dim, dtype, arch), registers))
    on_hopper = hopper.supports(dtype, x.dim, x.value_dim, arch) is None
    for windowed in (False, True):
        for f in (tuning.interval_forward, tuning.interval_dq, tuning.interval_dkv):
            found.add((f.__name__, windowed, f(*dims, windowed, arch)))
        if on_hopper:
            for g in (tuning.hopper_interval_forward, tuning.hopper_interval_dq):
                found.add((g.__name__, windowed, g(windowed, x.group)))
            found.add(("hopper_interval_dkv", windowed, tuning.hopper_interval_dkv(x.dim)))
    return found


def covering(grid: Iterable[Shape], known: Iterable[Shape]) -> list[Shape]:
    """Few shapes of ``grid`` with all choices in it that those of ``known`` do not make."""
    reached = set().union(*map(choices, known))
    left, taken = {x: choices(x) - reached for x in grid}, []
    while any(left.values()):
        best = max(left, key=lambda x: len(left[x]))
        taken.append(best)
        done = left[best]
        left = {x: rest - done for x, rest in left.items() if rest - done}
    return taken


REST = covering(GRID, GPU_SHAPES)


def test_nothing_is_left_out() -> None:
    every = set().union(*map(choices, GRID))
    assert len(every) > 100
    assert every == set().union(*map(choices, [*GPU_SHAPES, *REST])) & every
    assert len(REST) < 40


def branches(case: Case, x: tuple[Tensor, ...], indices: Tensor, backend: str | None) -> tuple[Tensor, ...]:
    """The outputs of the three branches; by ``tests/naive.py`` without a backend."""
    q, k_cmp, v_cmp, k, v = x
    if backend is None:
        every = [naive.one_sequence(case.cfg, q[0], k_cmp[0], v_cmp[0], k[0], v[0], k[0], v[0], indices[0])]
        return tuple(y[None] for y in (every[0][0], every[0][2], every[0][3]))
    return (
        nsa.compressed_attention(q, k_cmp, v_cmp, case.cfg, backend=backend)[0],
        nsa.selected_attention(q, k, v, indices, case.cfg, backend=backend),
        nsa.window_attention(q, k, v, case.cfg, backend=backend),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(REST)), ids=lambda i: "-".join(map(str, vars(REST[i]).values())))
def test_right_with_every_tile(number: int) -> None:
    """Outputs and gradients of the branches whose tiles no random draw has."""
    shape = REST[number]
    dtype, news = getattr(torch, shape.dtype), set(choices(shape)) - set().union(*map(choices, GPU_SHAPES))
    intervals = any(str(name).startswith(("interval", "hopper")) for name, *_ in news)
    cfg = nsa.NSAConfig(
        head_dim=shape.dim, value_dim=shape.value_dim, num_heads=shape.group, num_kv_heads=1, block_length=shape.length,
        block_stride=shape.stride, selection_block_size=shape.size, num_selected_blocks=shape.n, window_size=70,
    )  # fmt: skip
    tokens = max(211, 3 * shape.size + 5)
    case = Case(number, "plain", cfg, (tokens,), (tokens,))
    low = guarded_inputs(case, dtype, "cuda")
    draws = torch.Generator().manual_seed(number)
    indices = torch.randint(0, tokens // shape.size + 1, (1, tokens, 1, shape.n), generator=draws, dtype=torch.int32).cuda()
    wanted = [0, 1, 2] if intervals else [1]

    def results(x: tuple[Tensor, ...], backend: str | None, grads: list[Tensor]) -> list[Tensor]:
        outputs = branches(case, x, indices, backend)
        found = []
        for b in wanted:
            mine = torch.autograd.grad(outputs[b], x, grads[b].to(outputs[b].dtype), allow_unused=True)
            found += [outputs[b].detach(), *(g for g in mine if g is not None)]
        return found

    tensors = tuple(getattr(low, name) for name in ("q", "k_cmp", "v_cmp", "k_slc", "v_slc"))
    shapes = [(1, tokens, shape.group, shape.value_dim)] * 3
    grads = [torch.randn(s, generator=draws, dtype=torch.float64).cuda().to(dtype) for s in shapes]
    as_type = lambda to: tuple(x.detach().to(to).requires_grad_() for x in tensors)
    got = results(tensors, "triton", grads)
    for i, each in enumerate(
        zip(got, results(as_type(torch.float64), "reference", grads), results(as_type(dtype), None, grads))
    ):
        assert_within_2x(f"result {i} of {shape}", *each, dtype)
