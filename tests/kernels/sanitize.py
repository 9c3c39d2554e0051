"""Every kernel once on small cases, for NVIDIA's compute-sanitizer, which ends with an error for what it finds.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/kernels/sanitize.py --portable
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python tests/kernels/sanitize.py --plant   # must fail

Numbers among the arguments are of the shapes to take, instead of all: one after another they compile for minutes.

Without caching every tensor is an allocation of its own, so that a byte too far is seen. The race checker does not understand
how a warp-specialised kernel hands its warps their work (it finds the same in cuBLAS), so it only sees the portable kernels.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
import triton
import triton.language as tl

import nsa
from nsa import decode_tuning, ops
from nsa.kernels import cuda, hopper

SHAPES = (  # dtype, D, DV, KV heads, group
    (torch.bfloat16, 128, 128, 1, 4),
    (torch.bfloat16, 128, 128, 2, 16),  # the selected branch and its dq in CUDA C++
    (torch.float16, 64, 64, 2, 16),
    (torch.bfloat16, 192, 128, 1, 16),
    (torch.float32, 40, 24, 2, 3),
    (torch.float32, 256, 256, 1, 40),  # selection blocks in pieces, a group's heads in shares
)


def config(dim: int, value_dim: int, kv_heads: int, group: int, length: int = 16) -> nsa.NSAConfig:
    return nsa.NSAConfig(
        head_dim=dim, value_dim=value_dim, num_heads=kv_heads * group, num_kv_heads=kv_heads, block_length=length,
        block_stride=length // 2, selection_block_size=64, num_selected_blocks=3, num_local_blocks=1, window_size=70,
    )  # fmt: skip


def call(dtype: torch.dtype, dim: int, value_dim: int, kv_heads: int, group: int, packed: bool) -> None:
    """Compression, every branch, the selection and the gated sum, forward and backward."""
    cfg = config(dim, value_dim, kv_heads, group)
    tokens = 211
    make = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype).requires_grad_()
    q, k, v = make(1, tokens, kv_heads * group, dim), make(1, tokens, kv_heads, dim), make(1, tokens, kv_heads, value_dim)
    gates = make(1, tokens, kv_heads * group, 3)
    told = {"cu_seqlens": torch.tensor([0, 5, 5, 100, 211], dtype=torch.int32, device="cuda")} if packed else {}
    offsets = told.get("cu_seqlens")
    k_cmp = ops.blocks_op(k, offsets, 16, 8, False)[..., 3, :]  # a copy of each block, as a learned compressor reads it
    v_cmp = nsa.compress_blocks(v, cfg, **told)
    o = nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, cfg, **told)
    o.backward(torch.randn_like(o))
    assert all(x.grad.isfinite().all() for x in (q, k, v, gates))


def decode(dtype: torch.dtype, dim: int, value_dim: int, kv_heads: int, group: int, page_size: int | None) -> None:
    """Steps over a cache: a chunk, then tokens that complete blocks, wrap the ring and begin a page."""
    cfg = config(dim, value_dim, kv_heads, group)
    cache = nsa.NSACache(cfg, 2, 192, dtype=dtype, device="cuda", page_size=page_size)
    make = lambda tokens, heads, width: torch.randn(2, tokens, heads, width, device="cuda").to(dtype)
    compress = [nsa.BlockCompressor(width, cfg, "mean") for width in (dim, value_dim)]
    for tokens in (117, 5, 16):
        cache.append(*(make(tokens, kv_heads, width) for width in (dim, value_dim) * 3), *compress)
        count = min(tokens, 16)
        q, gates = make(count, kv_heads * group, dim), make(count, kv_heads * group, 3)
        assert nsa.cached_attention(q, gates, cache).isfinite().all()


def decode_at_once(dtype: torch.dtype, dim: int, value_dim: int, kv_heads: int, group: int) -> None:
    """Steps of one token in one kernel, over more tiles than it has warps, and with weights in memory and not."""
    cfg = config(dim, value_dim, kv_heads, group, 32)
    for room in (9_300, 80_000):
        cache = nsa.NSACache(cfg, 2, room, dtype=dtype, device="cuda")
        make = lambda tokens, heads, width: torch.randn(2, tokens, heads, width, device="cuda").to(dtype)
        compress = [nsa.BlockCompressor(width, cfg, "mean") for width in (dim, value_dim)]
        for tokens in (9_250, 1, 16):
            cache.append(*(make(tokens, kv_heads, width) for width in (dim, value_dim) * 3), *compress)
            q, gates = make(1, kv_heads * group, dim), make(1, kv_heads * group, 3)
            assert nsa.cached_attention(q, gates, cache).isfinite().all()


@triton.jit
def overrun_kernel(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, at.to(tl.float32), mask=at <= n)  # one too far


def plant() -> None:
    n = 128 * 7  # an allocation ends where a page of 512 bytes does
    overrun_kernel[(1,)](torch.empty(n, device="cuda"), n, BLOCK=1024)
    torch.cuda.synchronize()


def main() -> None:
    if "--plant" in sys.argv:
        plant()
        return
    torch.manual_seed(0)
    numbers = [int(x) for x in sys.argv[1:] if x.isdigit()]
    for shape in [SHAPES[i] for i in numbers] or SHAPES:
        for page_size in (None, 64):
            decode(*shape, page_size)
        if "--portable" not in sys.argv:
            with mock.patch.object(decode_tuning, "whole", return_value=True):
                decode_at_once(*shape)
        for packed in (False, True):
            if "--portable" not in sys.argv:
                call(*shape, packed)
            off = lambda module, name: mock.patch.object(module, name, return_value="switched off")
            with off(hopper, "supports"), off(cuda, "ranks"):
                call(*shape, packed)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
