"""Every output and every gradient of the kernels, against the reference in fp64 on the same inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import nsa
from nsa import tuning
from nsa.reference.chunks import Chunk
from nsa.reference.select import block_importance
from tests import naive
from tests.cases import Case, Inputs
from tests.kernels.draws import drawn_case, guarded_inputs, portable
from tests.steps import gradients, steps
from tests.tolerance import assert_within_2x


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """In deterministic mode PyTorch fills what ``torch.empty`` returns with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_every_output_and_gradient(device: str, draw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa.kernels import cuda, hopper

    if portable(draw, device):
        monkeypatch.setattr(hopper, "supports", lambda *_: "switched off")
        monkeypatch.setattr(cuda, "ranks", lambda *_: "switched off")
    case, dtype = drawn_case(draw, device)
    low = guarded_inputs(case, dtype, device)
    exact, plain = low.to(torch.float64), low.to(dtype)
    indices = nsa.nsa_attention(*low.tensors(), case.cfg, **case.lengths(device), return_block_indices=True, backend="triton")[
        1
    ]
    check_selection(case, exact, indices)
    got, ref, base = steps(case, low, indices, "triton"), steps(case, exact, indices), naive.nsa_steps(case, plain, indices)
    for name in ("o_cmp", "lse", "o_slc", "o_win", "o"):
        y = getattr(got, name)
        assert y.dtype == (torch.float32 if name == "lse" else dtype)
        assert_within_2x(f"{name} of {case}", y, getattr(ref, name), getattr(base, name), dtype)
    assert not got.lse.requires_grad
    grad = torch.randn(ref.o.shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64).to(device, dtype)
    mine, want, other = gradients(low, got.o, grad), gradients(exact, ref.o, grad), gradients(plain, base.o, grad)
    again = gradients(low, got.o, grad) if device == "cuda" else mine
    for name, g in mine.items():
        assert g.dtype == dtype
        assert_within_2x(f"{name} of {case}", g, want[name], other[name], dtype)
        assert torch.equal(g, again[name]), f"{name} of {case} is not the same on a second run"


def check_selection(case: Case, x: Inputs, indices: Tensor) -> None:
    """Right by score: forced blocks all in, none better left out by more than rounding, ascending, -1 behind."""
    cfg = case.cfg
    size, n = cfg.selection_block_size, cfg.num_selected_blocks
    for (b, rows), (_, k_rows), (_, c_rows) in case.places():
        queries, tokens = rows.stop - rows.start, k_rows.stop - k_rows.start
        if queries == 0:
            continue
        q, k = x.q[b : b + 1, rows].detach(), x.k_cmp[b : b + 1, c_rows].detach()
        lse = nsa.compressed_attention(q, k, x.v_cmp[b : b + 1, c_rows].detach(), cfg, seqlen_k=tokens, backend="reference")[1]
        importance = block_importance(q, k, lse, Chunk(slice(0, queries), tokens - queries, tokens), cfg)[0].transpose(0, 1)
        block = torch.arange(importance.shape[-1], device=q.device)
        own = (torch.arange(tokens - queries, tokens, device=q.device) // size)[:, None, None]
        forced = ((block < cfg.num_initial_blocks) | (block > own - cfg.num_local_blocks)) & (block <= own)
        score = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -1)
        chosen = indices[b, rows]
        held = chosen >= 0
        assert torch.equal(held.sum(-1), (own[..., 0] + 1).clamp_max(n).expand(-1, cfg.num_kv_heads)), "wrong number of blocks"
        assert (held[..., :-1] | ~held[..., 1:]).all(), "-1 before a block"
        assert ((chosen[..., 1:] > chosen[..., :-1]) | ~held[..., 1:]).all(), "not ascending"
        mask = torch.zeros(*chosen.shape[:2], importance.shape[-1] + 1, dtype=torch.bool, device=q.device)
        mask = mask.scatter(-1, torch.where(held, chosen, importance.shape[-1]).long(), True)[..., :-1]
        worst_in = score.masked_fill(~mask, torch.inf).amin(-1)
        best_out = score.masked_fill(mask, -1).amax(-1)
        assert (worst_in >= best_out * (1 - 2e-5)).all(), f"a better block was left out in {case}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_where_a_query_sees_one_key(device: str, dtype: torch.dtype) -> None:
    """Its softmax is 1 whatever the score: q and k get no gradient but rounding, measured on what cancels, and v gets all."""
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=6, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8, window_size=1
    )
    rng = torch.Generator().manual_seed(0)
    make = lambda heads: torch.randn(1, 11, heads, 16, generator=rng).to(device, dtype).requires_grad_()
    q, k, v = make(6), make(2), make(2)
    o = nsa.window_attention(q, k, v, cfg, backend="triton")
    grad = torch.randn(o.shape, generator=rng).to(device, dtype)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), grad)
    assert (o - v.repeat_interleave(3, 2)).abs().max() <= (1e-6 if dtype == torch.float32 else 0) * float(v.abs().max())
    size = float((grad.double().abs() * o.double().abs()).sum(-1).max())
    assert dq.abs().max() <= 1e-6 * size * float(k.abs().max())
    assert dk.abs().max() <= 1e-6 * size * float(q.abs().max()) * 3
    want = grad.double().unflatten(2, (2, 3)).sum(3)
    assert (dv.double() - want).norm() <= (2e-5 if dtype == torch.float32 else 1e-3) * want.norm()


@pytest.mark.parametrize("layout", ["batched", "packed"])
@pytest.mark.parametrize("n", [5, 6, 7, 8])
def test_ties_go_to_the_lowest_block(device: str, n: int, layout: str) -> None:
    """A block too many would be written where the next one belongs: which of the two stays hangs on their numbers."""
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=6, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8,
        num_selected_blocks=n, num_initial_blocks=1, num_local_blocks=1,
    )  # fmt: skip
    tokens = 90
    q = torch.zeros(1, tokens, 6, 16, device=device)
    k = torch.randn(1, cfg.num_compressed_blocks(tokens), 2, 16, device=device)
    told = {} if layout == "batched" else {"cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32, device=device)}
    lse = nsa.compressed_attention(q, k, k, cfg, **told, backend="triton")[1]
    got = nsa.select_blocks(q, k, lse, cfg, **told, backend="triton")
    last = (tokens - 1) // 8
    # q = 0: block 0 and its last neighbour count fewer strides, all others tie exactly.
    assert got[0, -1].tolist() == [[*range(n - 1), last]] * 2
    assert torch.equal(got, nsa.select_blocks(q, k, lse, cfg, **told, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_callers_sets_of_blocks(device: str, dtype: torch.dtype) -> None:
    """Any order, any width, duplicates once; negatives and the future count for nothing."""
    rng = torch.Generator().manual_seed(0)
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=6, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8, num_selected_blocks=4
    )
    tokens = 70 if device == "cuda" else 25
    make = lambda heads: torch.randn(2, tokens, heads, 16, generator=rng).to(device, dtype).requires_grad_()
    q, k, v = make(6), make(2), make(2)
    for width in (1, 3, 13):
        indices = torch.randint(-3, tokens // 8 + 4, (2, tokens, 2, width), generator=rng, dtype=torch.int32).to(device)
        got = nsa.selected_attention(q, k, v, indices, cfg, backend="triton")
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = nsa.selected_attention(*exact, indices, cfg, backend="reference")
        grad = torch.randn(got.shape, generator=rng).to(device, dtype)
        mine = torch.autograd.grad(got, (q, k, v), grad)
        theirs = torch.autograd.grad(want, exact, grad.double())
        for y, z in zip((got, *mine), (want, *theirs)):
            assert (y.double() - z).norm() <= (2e-5 if dtype == torch.float32 else 5e-3) * z.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gates_of_any_sign(device: str, dtype: torch.dtype) -> None:
    """A sigmoid's gates lie between 0 and 1, but the sum is defined for all: the backward carries their sign apart."""
    rng = torch.Generator().manual_seed(0)
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=6, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8,
        num_selected_blocks=4, window_size=9,
    )  # fmt: skip
    make = lambda rows, heads, dim: torch.randn(1, rows, heads, dim, generator=rng).to(device, dtype)
    keys = [make(rows, 2, 16) for rows in (cfg.num_compressed_blocks(50), 50, 50) for _ in range(2)]
    gates = make(50, 6, 3)
    gates[:, ::7] = 0
    low = [x.requires_grad_() for x in (make(50, 6, 16), *keys, gates)]
    got, indices = nsa.nsa_attention(*low, cfg, return_block_indices=True, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in low]
    want = nsa.nsa_attention(*exact, cfg, block_indices=indices, backend="reference")
    grad = make(50, 6, 16)
    mine, theirs = torch.autograd.grad(got, low, grad), torch.autograd.grad(want, exact, grad.double())
    assert (gates < 0).any()
    assert (mine[-1][:, ::7] != 0).any()
    for y, z in zip((got, *mine), (want, *theirs)):
        assert (y.double() - z).norm() <= (2e-5 if dtype == torch.float32 else 5e-3) * z.norm()


def test_more_blocks_than_a_program_ranks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million tokens have them: the ranking then goes through memory piece by piece."""
    from nsa.kernels import cuda
    from nsa.kernels.triton import top_n

    monkeypatch.setattr(cuda, "ranks", lambda *_: "switched off")
    monkeypatch.setattr(top_n, "WIDEST", 16)
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=6, num_kv_heads=2, block_length=4, block_stride=4, selection_block_size=4,
        num_selected_blocks=7, num_local_blocks=1,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 210, 6, 16, generator=rng).to(device), torch.randn(1, 52, 2, 16, generator=rng).to(device)
    for scale in (1, 0):  # and exact ties
        lse = nsa.compressed_attention(scale * q, k, k, cfg, backend="triton")[1]
        got = nsa.select_blocks(scale * q, k, lse, cfg, backend="triton")
        want = nsa.select_blocks(scale * q.double(), k.double(), lse.double(), cfg, backend="reference")
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_importance_in_many_chunks(device: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranked while the next chunk is computed: over and over, so that one that is overwritten too early would show."""
    from nsa.kernels.triton import top_n

    tokens = 1500 if device == "cuda" else 150
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=6, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8, num_selected_blocks=5,
        window_size=9,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    ends = [0, tokens // 3, tokens]
    blocks = sum(cfg.num_compressed_blocks(b - a) for a, b in itertools.pairwise(ends))
    told = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=device)} if layout == "packed" else {}
    blocks = blocks if told else cfg.num_compressed_blocks(tokens)
    q, k = (torch.randn(1, rows, heads, 16, generator=draws).to(device) for rows, heads in ((tokens, 6), (blocks, 2)))
    lse = nsa.compressed_attention(q, k, k, cfg, **told, backend="triton")[1]
    want = nsa.select_blocks(q, k, lse, cfg, **told, backend="triton")
    room = tuning.importance(16, q.dtype, tuning.arch(q.device)).block_m * 2 * 4 * (tokens // 8)  # of a tile of queries
    for tiles in (1, 3, 4):
        monkeypatch.setattr(top_n, "WORKSPACE", tiles * room + room // 2)
        for _ in range(10 if device == "cuda" else 1):
            assert torch.equal(nsa.select_blocks(q, k, lse, cfg, **told, backend="triton"), want)


def test_blocks_that_no_query_of_a_chunk_sees_are_left_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one sequence; of two, each query's blocks are the same, and none are left out."""
    from nsa.kernels.triton import top_n

    tokens = 300 if device == "cuda" else 150
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=2, num_kv_heads=1, block_length=2, block_stride=1, selection_block_size=6, num_selected_blocks=5,
        num_initial_blocks=1, num_local_blocks=1, window_size=9,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, rows, heads, 16, generator=draws).to(device) for rows, heads in ((tokens, 2), (tokens - 1, 1)))
    choose = lambda q, k: nsa.select_blocks(
        q, k, nsa.compressed_attention(q, k, k, cfg, backend="triton")[1], cfg, backend="triton"
    )
    want = choose(torch.cat([q, q]), torch.cat([k, k]))[:1]
    monkeypatch.setattr(top_n, "WORKSPACE", 1)  # a tile of queries at a time
    assert torch.equal(choose(q, k), want)


@pytest.mark.gpu
def test_importance_in_many_chunks_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of a graph wait only for what they are told to wait for: replayed back to back over inputs that change."""
    from nsa.kernels.triton import top_n

    tokens, cfg = 6000, nsa.NSAConfig(head_dim=64, num_heads=16, num_kv_heads=1)
    rows = tuning.importance(64, torch.bfloat16, tuning.arch(torch.device("cuda"))).block_m
    monkeypatch.setattr(top_n, "WORKSPACE", 6 * rows * 4 * 96)  # of 6 tiles, and so 3 at a time
    draws = torch.Generator("cuda").manual_seed(0)
    make = lambda rows, heads: torch.randn(4, 1, rows, heads, 64, generator=draws, device="cuda", dtype=torch.bfloat16)
    qs, ks = make(tokens, 16), make(cfg.num_compressed_blocks(tokens), 1)
    call = lambda q, k: nsa.select_blocks(q, k, nsa.compressed_attention(q, k, k, cfg)[1], cfg)
    want = [call(q, k) for q, k in zip(qs, ks)]
    q, k = qs[0].clone(), ks[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = call(q, k)
    got = []
    for i in range(40):
        q.copy_(qs[i % 4])
        k.copy_(ks[i % 4])
        graph.replay()
        got.append(chosen.clone())
    for i, each in enumerate(got):
        assert torch.equal(each, want[i % 4]), f"replay {i}"


@pytest.mark.parametrize(("group", "size"), [(3, 20), (18, 18), (17, 32)])
def test_where_shared_memory_is_scarce(device: str, group: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no more than the smallest tile takes, selection blocks go in pieces of 16 keys, and groups in shares of 16 heads."""
    least = lambda arch: tuning.shared_bytes("dq", 16, 16, 16, 24, torch.float32, 1, arch)
    monkeypatch.setattr(tuning, "shared_memory", least)
    tile = tuning.selected_dkv(16, 24, torch.float32, group, size, tuning.arch(torch.device(device)))
    assert (tile.block_m, tile.block_n) == (16, 16)
    rng = torch.Generator().manual_seed(0)
    cfg = nsa.NSAConfig(
        head_dim=16, value_dim=24, num_heads=group, num_kv_heads=1, block_length=2, block_stride=2, selection_block_size=size,
        num_selected_blocks=3,
    )  # fmt: skip
    tokens, rows = 75, 90
    make = lambda heads, dim: torch.randn(1, rows, heads, dim, generator=rng).to(device)
    q, k, v = make(group, 16)[:, :20].requires_grad_(), make(1, 16), make(1, 24)
    k[:, tokens:], v[:, tokens:] = float("nan"), float("nan")
    k, v = k.requires_grad_(), v.requires_grad_()
    indices = torch.randint(-1, -(-tokens // size), (1, 20, 1, 3), generator=rng, dtype=torch.int32).to(device)
    got = nsa.selected_attention(q, k, v, indices, cfg, seqlen_k=tokens, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = nsa.selected_attention(*exact, indices, cfg, seqlen_k=tokens, backend="reference")
    grad = torch.randn(got.shape, generator=rng).to(device)
    mine = torch.autograd.grad(got, (q, k, v), grad)
    theirs = torch.autograd.grad(want, exact, grad.double())
    for y, z in zip((got, *mine), (want, *theirs)):
        assert (y.double() - z).norm() <= 2e-5 * z.norm()
