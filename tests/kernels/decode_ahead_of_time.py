"""Compile the kernels of a decode step for GPUs that this machine does not have: ``ahead_of_time.py`` for caches."""

from __future__ import annotations

import itertools
import sys
import time

import torch

import nsa
from nsa.decode_ops import decode
from tests.kernels.ahead_of_time import DIMS, DTYPES, SHARED, TARGETS, Launch, compiling

STEPS = ((1, 16, None, 1 << 16), (16, 16, 64, 4096), (3, 1, 128, 4096), (2, 128, None, 4096))  # queries, group, page size, room


READERS = ("decode_compressed_kernel", "decode_tokens_kernel")


def compile_steps(target: str, dtype: torch.dtype, dim: int, value_dim: int) -> list[Launch]:
    """Every kernel that appending a step and attending to it launch."""
    launches: list[Launch] = []
    for queries, group, page_size, tokens in STEPS:
        cfg = nsa.NSAConfig(head_dim=dim, value_dim=value_dim, num_heads=2 * group, num_kv_heads=2)
        cache = nsa.NSACache(cfg, 2, tokens, dtype=dtype, page_size=page_size)
        k, v = torch.zeros(2, queries, 2, dim, dtype=dtype), torch.zeros(2, queries, 2, value_dim, dtype=dtype)
        q, gates = torch.zeros(2, queries, 2 * group, dim, dtype=dtype), torch.zeros(2, queries, 2 * group, 3, dtype=dtype)
        cache._kernels = True
        with compiling(target) as found:
            for kind in ("mean", "linear"):
                compress_k, compress_v = (nsa.BlockCompressor(width, cfg, kind, dtype=dtype) for width in (dim, value_dim))
                cache.crop(0)
                for _ in range(32 // queries + 1):  # until a block is complete
                    cache.append(k, v, k, v, k, v, compress_k, compress_v)
            decode(q, gates, cache.view())
        launches += found
    return launches


def main(targets: list[str], dtypes: list[str], dims: list[tuple[int, int]]) -> int:
    wrong = 0
    for target, dtype, (d, dv) in itertools.product(targets, dtypes, dims):
        began = time.time()
        launches = compile_steps(target, DTYPES[dtype], d, dv)
        over = {x.kernel: x.shared for x in launches if x.shared > SHARED[target]}
        # Rows of a multiple of 16 numbers are aligned; a kernel that cannot tell takes thrice as long.
        aligned = d % 16 == dv % 16 == 0
        slow = {x.kernel for x in launches if aligned and x.narrow and x.kernel.endswith(READERS)}
        wrong += bool(over or slow)
        most = max(launches, key=lambda x: x.shared)
        verdict = f"most {most.shared} of {SHARED[target]} bytes ({most.kernel})"
        verdict = f"TOO MUCH: {over}" if over else f"NUMBER BY NUMBER: {slow}" if slow else verdict
        kernels = len({x.kernel for x in launches})
        print(f"{target} {dtype} {d}/{dv}: {kernels} kernels, {verdict}, {time.time() - began:.0f} s", flush=True)
    return wrong


if __name__ == "__main__":
    arguments = sys.argv[1:]
    targets, dtypes = arguments[0:1] or list(TARGETS), arguments[1:2] or list(DTYPES)
    sys.exit(main(targets, dtypes, [(int(x), int(x)) for x in arguments[2:3]] or list(DIMS)))
