"""The kernels of a decode step: over caches in every layout, and appending to them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import nsa
from nsa import tuning
from nsa.cache_store import POOLS, RINGS
from nsa.reference.chunks import Chunk
from nsa.reference.select import block_importance
from tests import naive
from tests.cases import Case, Inputs
from tests.kernels.draws import shapes
from tests.kernels.test_steps import check_selection
from tests.steps import steps
from tests.tolerance import assert_within_2x

NAMES = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")
PAGES = (None, 1, 3)  # selection blocks of a page
QUERIES = {"cuda": (1, 2, 5, 16), "cpu": (1, 2, 3, 7)}
MAX_CROP = 9


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In deterministic mode PyTorch fills what ``torch.empty`` returns with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Filled:
    """A cache with a history of sequences of different lengths, over memory that held NaN, and the raw tokens beside it."""

    def __init__(
        self, number: int, device: str, kernels: bool, compressor: str = "mean", batch: int | None = None,
        given: tuple[nsa.NSAConfig, torch.dtype, int] | None = None,
    ) -> None:  # fmt: skip
        """``given``: what a drawn cache has its own of, and how long it may be; it has no pages then."""
        known = shapes(device)
        shape, self.rng = known[number % len(known)], random.Random(number)
        self.cfg, self.dtype, self.device = shape.config(self.rng), getattr(torch, shape.dtype), device
        pages, drawn = PAGES[number % len(PAGES)], self.rng.randint(1, 3 if device == "cuda" else 2)
        batch = batch or drawn
        longest = 600 if device == "cuda" else 60
        if given is not None:
            (self.cfg, self.dtype, longest), pages = given, None
        self.draws = torch.Generator().manual_seed(number)
        self.cache = nsa.NSACache(
            self.cfg, batch, longest + MAX_CROP + 40, dtype=self.dtype, device=device, max_crop=MAX_CROP,
            page_size=None if pages is None else pages * self.cfg.selection_block_size,
        )  # fmt: skip
        for x in self.cache._store._rows.values():
            x.fill_(float("nan"))
        self.cache._kernels = kernels
        torch.manual_seed(number)
        self.compress = [
            nsa.BlockCompressor(dim, self.cfg, compressor, dtype=self.dtype, device=device)
            for dim in (self.cfg.head_dim, self.cfg.value_dim)
        ]
        self.held: list[dict[str, Tensor]] = [
            {name: torch.empty(0, self.cfg.num_kv_heads, self.width(name), dtype=self.dtype) for name in NAMES}
        ] * batch
        self.append(self.rng.choice([1, longest // 3, longest]))
        self.crop()
        for _ in range(2):
            self.append(self.rng.randint(1, 16))

    def width(self, name: str) -> int:
        return self.cfg.head_dim if name[0] == "k" else self.cfg.value_dim

    def draw(self, count: int, heads: int, dim: int) -> Tensor:
        return torch.randn(len(self.held), count, heads, dim, generator=self.draws).to(self.dtype)

    def replay(self, count: int) -> None:
        """Append as a replayed graph does: the host learns nothing, but from ``advance``."""
        self.cache.reserve(count)
        with mock.patch.object(nsa.NSACache, "frozen", True):
            self.append(count)
        self.cache.advance(count)

    def append(self, count: int) -> None:
        new = {name: self.draw(count, self.cfg.num_kv_heads, self.width(name)) for name in NAMES}
        self.cache.append(*(x.to(self.device) for x in new.values()), *self.compress)
        self.held = [{name: torch.cat([x, new[name][b]]) for name, x in held.items()} for b, held in enumerate(self.held)]

    def crop(self) -> None:
        lengths = [max(1, n - self.rng.randint(0, MAX_CROP)) for n in self.cache.lengths]
        self.cache.crop(lengths)
        self.held = [{name: x[:n] for name, x in held.items()} for n, held in zip(lengths, self.held)]

    def case(self, queries: int) -> Case:
        lens = self.cache.lengths
        return Case(0, "rows past a tensor", self.cfg, (queries,) * len(lens), lens)

    def inputs(self, queries: int) -> Inputs:
        """Everything a call without a cache takes; blocks as the cache holds them, which has a test of its own."""
        cfg = self.cfg
        raw = {
            name: torch.nn.utils.rnn.pad_sequence([held[name] for held in self.held], batch_first=True).to(self.device)
            for name in NAMES[2:]
        }
        k_cmp, v_cmp = self.cache.view().compressed()
        q = self.draw(queries, cfg.num_heads, cfg.head_dim).to(self.device)
        gates = self.draw(queries, cfg.num_heads, 3).sigmoid().to(self.device)
        return Inputs(q, k_cmp.nan_to_num(), v_cmp.nan_to_num(), **raw, gates=gates)


@pytest.mark.parametrize("number", range(12))
def test_a_step_over_any_cache(device: str, number: int) -> None:
    filled = Filled(number, device, kernels=False)
    queries = min(QUERIES[device][number % 4], *filled.cache.lengths)
    case, low = filled.case(queries), filled.inputs(queries)
    exact, plain = low.to(torch.float64), low.to(filled.dtype)
    got, indices = nsa.cached_attention(low.q, low.gates, filled.cache, return_block_indices=True, backend="triton")
    assert got.dtype == filled.dtype
    check_selection(case, exact, indices)
    ref, base = steps(case, exact, indices), naive.nsa_steps(case, plain, indices)
    assert_within_2x(f"o of {case}", got, ref.o, base.o, filled.dtype)
    again = nsa.cached_attention(low.q, low.gates, filled.cache, backend="triton")
    assert torch.equal(got, again), f"{case} is not the same on a second run"


@pytest.mark.parametrize(("number", "count"), [(0, 2), (1, 3), (2, 2)])
def test_slices_of_a_batch(device: str, number: int, count: int) -> None:
    """Launches of their own for parts of a batch change no bit of it: there are as many parts of the keys."""
    from nsa import decode_tuning

    filled = Filled(number, device, kernels=False, batch=5)
    queries = min(QUERIES[device][number % 4], *filled.cache.lengths)
    low = filled.inputs(queries)
    step = lambda: nsa.cached_attention(low.q, low.gates, filled.cache, return_block_indices=True, backend="triton")
    with mock.patch.object(decode_tuning, "compressed_splits", return_value=2):
        whole = step()
        with mock.patch.object(decode_tuning, "slices", return_value=count) as asked:
            sliced = step()
    assert asked.called
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


@pytest.mark.parametrize("compressor", ["mean", "mlp"])
@pytest.mark.parametrize("number", range(12))
def test_a_step_appends_what_the_reference_does(device: str, number: int, compressor: str) -> None:
    kernel, plain = (Filled(number, device, on, compressor) for on in (True, False))
    assert kernel.cache.lengths == plain.cache.lengths
    assert kernel.cache.view().lengths.tolist() == list(plain.cache.lengths)
    for size in (1, 2, 7, 16):
        if max(kernel.cache.lengths) + size <= kernel.cache.max_seq_len:
            (kernel.replay if size in (2, 16) else kernel.append)(size)
            plain.append(size)
    mine, theirs = kernel.cache.state_dict(), plain.cache.state_dict()
    for name, x in mine.items():
        y = theirs[name]
        if name in ("k_cmp", "v_cmp"):  # sums of another order
            rounding = torch.finfo(x.dtype).eps * (2 if compressor == "mean" else 8)
            torch.testing.assert_close(x, y, rtol=rounding, atol=2 * rounding, equal_nan=True)
        else:
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), name


@pytest.mark.parametrize("pages", PAGES)
def test_a_replayed_append_without_room(device: str, pages: int | None) -> None:
    number = next(i for i in itertools.count() if PAGES[i % len(PAGES)] == pages)
    filled = Filled(number, device, kernels=True)
    filled.append(min(16, filled.cache.max_seq_len - max(filled.cache.lengths)))
    while max(filled.cache.lengths) + 16 <= filled.cache.max_seq_len:
        filled.append(16)
    before, lengths = filled.cache.state_dict(), filled.cache.lengths
    with mock.patch.object(nsa.NSACache, "frozen", True):
        new = [filled.draw(16, filled.cfg.num_kv_heads, filled.width(name)).to(device) for name in NAMES]
        full = [n + 16 > filled.cache.max_seq_len for n in lengths]
        filled.cache.append(*new, *filled.compress)
    with pytest.raises(RuntimeError, match="a replayed graph had no room or no page and wrote nothing"):
        filled.cache.state_dict()
    assert any(full)
    after = filled.cache.state_dict()
    for b, was_full in enumerate(full):
        if was_full:
            assert filled.cache.lengths[b] == lengths[b]
            for name in ("k_win", "v_win", "k_tail", "v_tail"):
                assert torch.equal(after[name][b].nan_to_num(), before[name][b].nan_to_num())
            for name in ("k_slc", "v_slc"):
                assert torch.equal(after[name][b, : lengths[b]], before[name][b, : lengths[b]])


@pytest.mark.parametrize("pages", PAGES)
def test_ties_go_to_the_lowest_block(device: str, pages: int | None) -> None:
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=6, num_kv_heads=2, block_length=8, block_stride=4, selection_block_size=8,
        num_selected_blocks=5, num_initial_blocks=1, num_local_blocks=1, window_size=9,
    )  # fmt: skip
    cache = nsa.NSACache(cfg, 1, 90, dtype=torch.float32, device=device, page_size=None if pages is None else 8 * pages)
    k = torch.randn(1, 90, 2, 16, device=device)
    cache.append(k, k, k, k, k, k, nsa.BlockCompressor(16, cfg, "mean"), nsa.BlockCompressor(16, cfg, "mean"))
    q, gates = torch.zeros(1, 2, 6, 16, device=device), torch.ones(1, 2, 6, 3, device=device)
    _, indices = nsa.cached_attention(q, gates, cache, return_block_indices=True, backend="triton")
    # q = 0: block 0 and its last neighbour count fewer strides, all others tie exactly.
    assert indices[0, -1].tolist() == [[0, 1, 2, 3, 89 // 8]] * 2


@pytest.mark.parametrize(("ranked", "ranked_again"), [(4, 4096), (4, 4)])
def test_more_blocks_than_a_program_ranks(device: str, ranked: int, ranked_again: int) -> None:
    """Those that several programs chose are ranked again, and again."""
    from nsa import decode_tuning

    filled = Filled(0, device, kernels=False)
    low = filled.inputs(1)
    want = nsa.cached_attention(low.q, low.gates, filled.cache, return_block_indices=True, backend="triton")[1]
    with mock.patch.multiple(decode_tuning, RANKED=ranked, RANKED_AGAIN=ranked_again):
        got = nsa.cached_attention(low.q, low.gates, filled.cache, return_block_indices=True, backend="triton")[1]
    assert torch.equal(got, want)


def test_ties_among_all_that_a_program_ranks(device: str) -> None:
    """Of each chunk the first ones are chosen, and of those the first."""
    from nsa.decode_tuning import RANKED, cells
    from nsa.kernels.triton.decode_select import decode_select

    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=1, block_length=2, block_stride=2, selection_block_size=2, num_selected_blocks=5,
        num_local_blocks=1,
    )  # fmt: skip
    blocks = 3 * RANKED + 1
    tile = cells(cfg, 2 * blocks, 64)
    make = lambda *shape: torch.zeros(1, 1, 1, *shape, device=device)
    kept = make(tile.tiles * tile.per_tile), make(tile.tiles), make(tile.tiles)
    indices, lengths = make(5).int(), torch.full((1,), 2 * blocks, dtype=torch.int32, device=device)
    decode_select(kept, make(1), lengths, make(blocks), indices, 1, tile, 2, 2, 2, 1, 1, True)
    assert indices.flatten().tolist() == [0, 1, 2, 3, blocks - 1]


def test_more_places_than_blocks(device: str) -> None:
    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=4, num_kv_heads=2, block_length=4, block_stride=2, selection_block_size=8,
        num_selected_blocks=33, window_size=9,
    )  # fmt: skip
    make = lambda tokens, heads, dim: torch.randn(1, tokens, heads, dim, device=device)
    cache = nsa.NSACache(cfg, 1, 40, dtype=torch.float32, device=device)
    cache.append(*(make(39, 2, 16) for _ in range(6)), *(nsa.BlockCompressor(16, cfg, "mean") for _ in range(2)))
    q, gates = make(2, 4, 16), make(2, 4, 3).sigmoid()
    _, indices = nsa.cached_attention(q, gates, cache, return_block_indices=True, backend="triton")
    assert indices.tolist() == [[[[*range(5), *[-1] * 28]] * 2] * 2]


@pytest.mark.parametrize("ranked", [512, 4])
def test_nothing_to_attend_to(device: str, ranked: int) -> None:
    """An empty sequence, which a graph's first run without an append has, selects nothing and reads nothing."""
    from nsa import decode_tuning

    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=4, num_kv_heads=2, block_length=4, block_stride=2, selection_block_size=8,
        num_selected_blocks=3, num_local_blocks=1, window_size=9,
    )  # fmt: skip
    cache = nsa.NSACache(cfg, 2, 90, dtype=torch.float32, device=device)
    for x in cache._store._rows.values():
        x.fill_(float("nan"))
    q, gates = torch.randn(2, 3, 4, 16, device=device), torch.ones(2, 3, 4, 3, device=device)
    with cache.dry_run(), mock.patch.object(decode_tuning, "RANKED", ranked):
        o, indices = nsa.cached_attention(q, gates, cache, return_block_indices=True, backend="triton")
    assert torch.equal(indices, torch.full_like(indices, -1))
    assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("pages", PAGES)
def test_a_selection_block_in_which_more_blocks_start_than_a_tile_holds(device: str, pages: int | None) -> None:
    from nsa import decode_tuning

    cfg = nsa.NSAConfig(
        head_dim=16, num_heads=4, num_kv_heads=2, block_length=3, block_stride=1, selection_block_size=20,
        num_selected_blocks=3, num_local_blocks=1, window_size=9,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    make = lambda tokens, heads, dim: torch.randn(2, tokens, heads, dim, generator=draws).to(device)
    cache = nsa.NSACache(cfg, 2, 150, dtype=torch.float32, device=device, page_size=None if pages is None else 20 * pages)
    cache.append(*(make(139, 2, 16) for _ in range(6)), *(nsa.BlockCompressor(16, cfg, "mean") for _ in range(2)))
    q, gates = make(3, 4, 16), make(3, 4, 3).sigmoid()
    with mock.patch.object(decode_tuning, "tile", return_value=tuning.Tile(16, 16, 4, 1)):
        got, mine = nsa.cached_attention(q, gates, cache, return_block_indices=True, backend="triton")
    want, theirs = nsa.cached_attention(q, gates, cache, return_block_indices=True, backend="reference")
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("splits", "block_n", "looked_at"), [(1, 32, 2048), (3, 16, 16)])
def test_importance_within_1e_5_of_equation_9(
    device: str, number: int, splits: int, block_n: int, looked_at: int, alone: bool
) -> None:
    """Block by block: what a top-n lets through could hide a wrong weight, or a part's lse that is missing.

    All heads at once, or one after another.
    """
    from nsa.decode_tuning import cells
    from nsa.kernels.triton import decode_select
    from nsa.kernels.triton.decode_compressed import decode_compressed

    filled = Filled(number, device, kernels=False)
    cfg, view, queries = filled.cfg, filled.cache.view(), min(2, *filled.cache.lengths)
    q = filled.draw(queries, cfg.num_heads, cfg.head_dim).to(device)
    tile = cells(cfg, view.max_seq_len, block_n)
    make = lambda *shape: torch.full((len(q), queries, *shape), float("nan"), device=device)
    o, lse = make(cfg.num_heads, 9, cfg.value_dim), make(cfg.num_heads, 9)
    kept = make(cfg.num_heads, tile.tiles * tile.per_tile), *(make(cfg.num_heads, tile.tiles) for _ in range(2))
    got = make(cfg.num_kv_heads, cfg.num_selection_blocks(view.max_seq_len))
    sizes = cfg.block_length, cfg.block_stride, cfg.selection_block_size
    decode_compressed(
        q, view.k_cmp, view.v_cmp, view.table, view.lengths, o, lse, kept, splits, tuning.Tile(16, block_n, 4, 1), tile,
        not view.contiguous, *sizes, cfg.softmax_scale,
    )  # fmt: skip
    indices = torch.empty(len(q), queries, cfg.num_kv_heads, cfg.num_selected_blocks, dtype=torch.int32, device=device)
    with mock.patch.object(decode_select, "TILE", looked_at):
        decode_select.decode_select(
            kept, lse, view.lengths, got, indices, splits, tile, *sizes, cfg.num_initial_blocks, cfg.num_local_blocks, alone
        )  # fmt: skip
    k_cmp, v_cmp = (x.double().nan_to_num() for x in view.compressed())
    for b, length in enumerate(view.host_lengths):
        mine, k, v = q[b : b + 1].double(), k_cmp[b : b + 1], v_cmp[b : b + 1]
        row_lse = nsa.compressed_attention(mine, k, v, cfg, seqlen_k=length, backend="reference")[1]
        k = k[:, : cfg.num_compressed_blocks(length)]
        want = block_importance(mine, k, row_lse, Chunk(slice(0, queries), length - queries, length), cfg)[0]  # [HK, TQ, M]
        for t in range(queries):
            own = (length - queries + t) // cfg.selection_block_size + 1
            torch.testing.assert_close(got[b, t, :, :own].double(), want[:, t, :own], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("programs", [1, 4000])
def test_few_and_many_parts(device: str, programs: int) -> None:
    """Of each branch, down to a tile of 16 keys a part: none of the others' lse may be missing from the selection's."""
    from nsa import decode_tuning

    filled = Filled(1, device, kernels=False)
    while filled.cfg.num_compressed_blocks(max(filled.cache.lengths)) <= 16:  # more than one tile
        filled.append(16)
    queries = min(3, *filled.cache.lengths)
    case, low = filled.case(queries), filled.inputs(queries)
    exact, plain = low.to(torch.float64), low.to(filled.dtype)
    small = mock.patch.object(decode_tuning, "tile", return_value=tuning.Tile(16, 16, 4, 1))
    counts = mock.patch.multiple(decode_tuning, COMPRESSED_PROGRAMS=programs, TOKEN_PROGRAMS=programs)
    with counts, small:
        got, indices = nsa.cached_attention(low.q, low.gates, filled.cache, return_block_indices=True, backend="triton")
    check_selection(case, exact, indices)
    assert_within_2x("o", got, steps(case, exact, indices).o, naive.nsa_steps(case, plain, indices).o, filled.dtype)


def test_the_operators_are_what_their_schemas_say(device: str) -> None:
    from nsa import decode_ops

    filled = Filled(0, device, kernels=False)
    view, cfg, low = filled.cache.view(), filled.cfg, filled.inputs(1)
    tensors, store = filled.cache._store.tensors, filled.cache._store
    pools, rings = ([tensors[name] for name in names] for names in (POOLS, RINGS))
    sizes = cfg.block_length, cfg.block_stride
    new = [filled.draw(1, cfg.num_kv_heads, filled.width(name)).to(device) for name in NAMES]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(decode_ops.decode_blocks, (*new[:2], *rings[2:], store.lengths, 1, *sizes), test_utils=tests)
    torch.library.opcheck(
        decode_ops.decode_op,
        (
            low.q.detach(), low.gates.detach(), pools, rings[:2], view.table, view.lengths, view.max_seq_len, False, *sizes,
            cfg.selection_block_size, cfg.num_selected_blocks, cfg.num_initial_blocks, cfg.num_local_blocks, cfg.window_size,
            cfg.softmax_scale,
        ),
        test_utils=tests,
    )  # fmt: skip
    limit, overflow = filled.cache._limit, filled.cache._overflow
    for made in (None, [x[:, :0] for x in new[:2]]):
        arguments = (new, made, pools, rings, view.table, store.lengths, limit, overflow, False, *sizes)
        torch.library.opcheck(decode_ops.decode_append, arguments, test_utils=tests)


@pytest.mark.parametrize("branch", ["selected", "compressed"])
def test_heads_far_apart(device: str, branch: str) -> None:
    """A contiguous cache of 8 million tokens has its third head 2^31 numbers after the first."""
    from nsa import decode_tuning
    from nsa.kernels.triton.decode_compressed import decode_compressed
    from nsa.kernels.triton.decode_tokens import decode_tokens

    apart, tokens, dim, heads = 2**30, 48, 16, 3
    cfg = nsa.NSAConfig(
        head_dim=dim, num_heads=heads, num_kv_heads=heads, block_length=16, block_stride=16, selection_block_size=16,
        num_selected_blocks=3, window_size=16,
    )  # fmt: skip
    try:
        room = torch.empty(2 * apart + tokens * dim, dtype=torch.float16, device=device)
    except (RuntimeError, MemoryError):
        pytest.skip("there is no room for so much")
    far = room.as_strided((1, tokens, heads, dim), (0, dim, apart, 1))
    far.copy_(torch.randn(1, tokens, heads, dim, generator=torch.Generator().manual_seed(0)))
    q = torch.randn(1, 1, heads, dim, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    number = lambda *x: torch.tensor(x, dtype=torch.int32, device=device)
    lengths, table = number(tokens), number(0).view(1, 1)
    arch = tuning.arch(q.device)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = q.new_zeros(1, 1, heads, 2, dim, dtype=torch.float32), q.new_zeros(1, 1, heads, 2, dtype=torch.float32)
        tile = decode_tuning.tile(cfg, 1, q.dtype, arch)
        if branch == "selected":
            splits = decode_tuning.TokenSplits(3, 1, 1)
            ring = x[:, :16].contiguous()
            indices = number(0, 1, 2).expand(1, 1, heads, 3).contiguous()
            decode_tokens(
                q, x, x, ring, ring, indices, table, lengths, o, lse, 0, splits, tile, False, 16, 16, cfg.softmax_scale
            )  # fmt: skip
        else:
            cells = decode_tuning.cells(cfg, 16 * tokens, tile.block_n)
            kept = tuple(q.new_zeros(1, 1, heads, cells.tiles * n, dtype=torch.float32) for n in (cells.per_tile, 1, 1))
            decode_compressed(
                q, x, x, table, lengths * 16, o, lse, kept, 2, tile, cells, False, 16, 16, 16, cfg.softmax_scale
            )  # fmt: skip
        return o, lse

    for mine, other in zip(parts(far), parts(far.contiguous())):
        assert torch.equal(mine, other)
        assert mine.any()
