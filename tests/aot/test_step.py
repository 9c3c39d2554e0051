"""The C library, step by step, beside the reference: on a GPU, or with its kernels in Triton's interpreter."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa
from tests.aot import binding, build
from tests.aot.binding import Context
from tests.aot.expected import Stream, draw
from tests.aot.interpreted import Interpreter
from tests.tolerance import assert_within_2x

LENGTHS = {"cuda": (1, 31, 32, 64, 65, 1000, 65537), "cpu": (1, 31, 32, 65, 100)}

Make = Callable[..., AbstractContextManager[Context]]


@pytest.fixture(scope="module")
def libraries() -> dict[str, Any]:
    return {}


@pytest.fixture
def make(device: str, libraries: dict[str, Any]) -> Make:
    """Makes contexts; what a launch raises in the interpreter, the call that launched raises."""
    if device not in libraries:
        exported, library = build.arrange(device)
        after: Callable[[], None] = lambda: None
        if device == "cpu":
            driver = build.FOLDER / "libfake_cuda.so"
            os.environ["NSA_CUDA_DRIVER"] = str(driver)
            libraries["interpreter"] = Interpreter(driver, exported)
            after = libraries["interpreter"].check
        libraries[device] = binding.load(library), after
    library, after = libraries[device]
    return partial(_context, library, after)


def _context(library: ctypes.CDLL, after: Callable[[], None], cfg: nsa.NSAConfig, *args: Any, **kwargs: Any) -> Any:
    return binding.context(library, cfg, *args, after=after, **kwargs)


def config(dims: tuple[int, int], heads: int = 4, kv_heads: int = 1, **sizes: int) -> nsa.NSAConfig:
    return nsa.NSAConfig(head_dim=dims[0], value_dim=dims[1], num_heads=heads, num_kv_heads=kv_heads, **sizes)


def prepare(ctx: Context, stream: Stream) -> None:
    ctx.set_gate_weights(stream.gate)
    ctx.set_compression_weights(*stream.compressors)


def compute(ctx: Context, stream: Stream, seq_len: int) -> Tensor:
    out = stream.q.new_full((stream.cfg.num_heads, stream.cfg.value_dim), float("nan"))
    return ctx.compute_attention(stream.q, stream.k[:seq_len], stream.v[:seq_len], out)


def check(name: str, got: Tensor, stream: Stream, seq_len: int, window: tuple[Tensor, Tensor] | None = None) -> None:
    ref, base = stream.reference(seq_len, window)
    assert_within_2x(f"{name}, {seq_len} tokens of {stream.cfg}", got, ref, base, stream.q.dtype)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_lengths(device: str, make: Make, variant: tuple[tuple[int, int], torch.dtype], kind: str) -> None:
    """Around every edge of a block, from one token on; with the defaults and with weights."""
    dims, dtype = variant
    cfg = config(dims)
    stream = draw(cfg, LENGTHS[device][-1], dtype, device, kind)
    with make(cfg, dtype, LENGTHS[device][-1]) as ctx:
        prepare(ctx, stream)
        for seq_len in LENGTHS[device]:
            check(kind, compute(ctx, stream, seq_len), stream, seq_len)


# Block length, stride, selection block, blocks, initial, local, window; query heads and KV heads.
SHAPES = [
    ((32, 16, 64, 16, 1, 2, 512), 6, 2),
    ((16, 4, 64, 4, 1, 1, 40), 17, 1),  # 16 blocks start in a selection block; more heads than a tile has
    ((8, 2, 64, 5, 1, 2, 64), 4, 2),  # 32
    ((8, 1, 64, 4, 2, 1, 33), 8, 1),  # 64: more than a tile of fp32 holds
    ((12, 6, 12, 7, 1, 3, 5), 40, 2),  # 2; no power of two anywhere
    ((4, 4, 4, 20, 2, 2, 1), 3, 3),  # 1; more blocks than 16
]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(device: str, make: Make, shape: tuple[tuple[int, ...], int, int], half: bool) -> None:
    (length, stride, size, n, initial, local, window), heads, kv_heads = shape
    dims, dtype = build.DIMS[device][-1 if half else 0], torch.float16 if half else torch.float32
    cfg = config(
        dims, heads, kv_heads, block_length=length, block_stride=stride, selection_block_size=size, num_selected_blocks=n,
        num_initial_blocks=initial, num_local_blocks=local, window_size=window,
    )  # fmt: skip
    tokens = min(8 * size + 5, 300) if device == "cpu" else 3001
    stream = draw(cfg, tokens, dtype, device)
    with make(cfg, dtype, tokens + 100) as ctx:
        check("sizes", compute(ctx, stream, tokens), stream, tokens)


def test_more_blocks_than_a_program_ranks(device: str, make: Make) -> None:
    """Which follows from ``max_seq_len``; the sequence may be short."""
    cfg = config((64, 64), block_length=8, block_stride=8, selection_block_size=8, num_selected_blocks=6, window_size=16)
    tokens = 200 if device == "cpu" else 20000
    stream = draw(cfg, tokens, torch.float32, device)
    with make(cfg, torch.float32, 30000) as ctx:
        check("chunks", compute(ctx, stream, tokens), stream, tokens)


def test_the_window_wraps_around(device: str, make: Make) -> None:
    """Three rounds, in bites of every size; the keys' tail has other tokens, so that it shows which of both is read."""
    cfg = config((64, 64), 2, window_size=20)
    stream, other = (draw(cfg, 90, torch.float32, device, seed=seed) for seed in range(2))
    with make(cfg, torch.float32, 100) as ctx:
        done = 0
        for size in (1, 12, 7, 20, 33, 17):
            ctx.update_window(other.k[done : done + size], other.v[done : done + size])
            done += size
            check("window", compute(ctx, stream, done), stream, done, (other.k, other.v))
        ctx.reset()
        check("after a reset", compute(ctx, stream, done), stream, done)


def test_a_window_that_begins_in_the_middle(device: str, make: Make) -> None:
    cfg = config((64, 64), 4, 2, window_size=20)
    stream, other = (draw(cfg, 90, torch.float32, device, seed=seed) for seed in range(2))
    with make(cfg, torch.float32, 100) as ctx:
        for first, stop in ((41, 60), (60, 61), (61, 75)):
            ctx.update_window(other.k[first:stop], other.v[first:stop])
            window = None if stop == 60 else (other.k, other.v)  # 19 tokens are one too few
            check("window", compute(ctx, stream, stop), stream, stop, window)
        # A whole window is the same from whichever slot it is read; a part of one is not.
        ctx.reset()
        ctx.update_window(other.k[5:20], other.v[5:20])
        check("newest", compute(ctx, stream, 12), stream, 12, (other.k[8:20], other.v[8:20]))


@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_incremental(device: str, make: Make, kind: str) -> None:
    cfg = config((64, 64), 4, 2, window_size=20)
    stream = draw(cfg, 200, torch.float32, device, kind)
    with make(cfg, torch.float32, 200, incremental=True) as ctx:
        prepare(ctx, stream)
        for seq_len in (31, 32, 48, 48, 130, 200):
            check("incremental", compute(ctx, stream, seq_len), stream, seq_len)
        with pytest.raises(RuntimeError, match="seq_len must not shrink, got 199 after 200; call nsa_reset first"):
            compute(ctx, stream, 199)
        ctx.reset()
        check("after a reset", compute(ctx, stream, 40), stream, 40)


def test_one_compressor_of_two(device: str, make: Make) -> None:
    cfg = config(build.DIMS[device][-1], 6, 3)
    stream = draw(cfg, 150, torch.float32, device, "linear")
    for compressors in ((stream.compressors[0], None), (None, stream.compressors[1])):
        mixed = Stream(cfg, stream.k, stream.v, stream.q, stream.gate, compressors)
        with make(cfg, torch.float32, 150) as ctx:
            prepare(ctx, mixed)
            check("mixed", compute(ctx, mixed, 150), mixed, 150)


@pytest.mark.gpu
def test_two_threads(device: str, make: Make) -> None:
    """Two contexts, each with a stream and a thread of its own; ``native/tests/test_threads.c`` has them without a GPU."""
    cfg = config((128, 128), 64, 4)
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                stream = draw(cfg, 4000, torch.float16, device, seed=seed)
            side.synchronize()
            with make(cfg, torch.float16, 4000, stream=side.cuda_stream) as ctx, torch.cuda.stream(side):
                for seq_len in range(3800, 4000, 7):
                    got = compute(ctx, stream, seq_len)
                    side.synchronize()
                    check(f"thread {seed}", got, stream, seq_len)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@pytest.mark.gpu
def test_a_graph(device: str, make: Make) -> None:
    """A captured step, replayed over other tokens in the same memory."""
    cfg = config((64, 64), 16, 1)
    stream, other = (draw(cfg, 2000, torch.float16, device, seed=seed) for seed in range(2))
    out = stream.q.new_full((cfg.num_heads, cfg.value_dim), float("nan"))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with make(cfg, torch.float16, 2000, stream=side.cuda_stream) as ctx:
        with torch.cuda.graph(graph, stream=side):
            ctx.update_window(stream.k, stream.v)
            ctx.compute_attention(stream.q, stream.k, stream.v, out)
        for mine, theirs in ((stream.q, other.q), (stream.k, other.k), (stream.v, other.v)):
            mine.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize()
        check("graph", out, other, 2000)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_steps_right_behind_each_other(device: str, make: Make, captured: bool) -> None:
    """Of two sequences in turns: where kernels start early, none may see or replace what is another step's."""
    cfg = config((64, 64), 16, 1)
    streams = [draw(cfg, 2000, torch.float16, device, seed=seed) for seed in range(2)]
    queries = [stream.q.clone() for stream in streams]
    outs = streams[0].q.new_full((12, cfg.num_heads, cfg.value_dim), float("nan"))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def steps() -> None:
        for i, out in enumerate(outs):
            if i % 4 == 3:  # no kernel, in between
                streams[i % 2].q.copy_(queries[i % 2])
            ctx.update_window(streams[i % 2].k, streams[i % 2].v)
            ctx.compute_attention(streams[i % 2].q, streams[i % 2].k, streams[i % 2].v, out)

    # So long that blocks are chosen among the chosen.
    with make(cfg, torch.float16, 100000, stream=side.cuda_stream) as ctx:
        if captured:
            with torch.cuda.graph(graph, stream=side):
                steps()
            for _ in range(3):
                graph.replay()
        else:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                steps()
        torch.cuda.synchronize()
        for i, out in enumerate(outs):
            check(f"step {i}", out, streams[i % 2], 2000)
