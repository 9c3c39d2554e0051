"""Chunks of queries and recomputation bound the memory; they change nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa
from nsa.reference import chunks
from tests.cases import KINDS, Case, make_inputs, random_case

MANY, NONE = 1, 1 << 40


def outputs_and_gradients(case: Case) -> dict[str, torch.Tensor]:
    x = make_inputs(case).to(torch.float64)
    o, indices = nsa.nsa_attention(*x.tensors(), case.cfg, **case.lengths(), return_block_indices=True)
    lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, case.cfg, **case.lengths())[1]
    if o.requires_grad:
        o.backward(torch.randn(o.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    grads = {f"d{name}": torch.zeros_like(y) if y.grad is None else y.grad for name, y in x.items()}
    return {"o": o.detach(), "lse": lse.detach(), "indices": indices, **grads}


@pytest.mark.parametrize("kept", [0, NONE], ids=["recomputed", "kept"])
@pytest.mark.parametrize("scores", [MANY, 200, 3000])
@pytest.mark.parametrize("number", range(2 * len(KINDS)))
def test_chunks_change_nothing(number: int, scores: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(number + 1000)
    monkeypatch.setattr(chunks, "CHUNK_SCORES", NONE)
    monkeypatch.setattr(chunks, "KEPT_SCORES", NONE)
    whole = outputs_and_gradients(case)
    monkeypatch.setattr(chunks, "CHUNK_SCORES", scores)
    monkeypatch.setattr(chunks, "KEPT_SCORES", kept)
    pieces = outputs_and_gradients(case)
    assert torch.equal(pieces.pop("indices"), whole.pop("indices"))
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)


def test_small_limits_do_chunk_and_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would compare a path with itself."""
    sizes, recomputed = [], []
    monkeypatch.setattr(chunks, "CHUNK_SCORES", 3000)
    monkeypatch.setattr(chunks, "KEPT_SCORES", 0)
    real, real_checkpoint = chunks.chunks, chunks.checkpoint
    for module in (nsa.reference.attend, nsa.reference.select):
        monkeypatch.setattr(module, "chunks", lambda *args: sizes.append(len(list(real(*args)))) or real(*args))
    monkeypatch.setattr(chunks, "checkpoint", lambda *args, **kw: recomputed.append(1) or real_checkpoint(*args, **kw))
    cfg = nsa.NSAConfig(head_dim=4, num_heads=2, block_length=4, block_stride=2, selection_block_size=4, window_size=100)
    outputs_and_gradients(Case(0, "plain", cfg, (100, 100), (100, 100)))
    assert min(sizes) > 1
    assert len(recomputed) > 6


LONG = """
import torch, nsa
torch.manual_seed(0)
cfg = nsa.NSAConfig(head_dim=64, num_heads=8, num_kv_heads=1)
T = 8192
q = torch.randn(1, T, 8, 64, requires_grad=True)
k, v = (torch.randn(1, T, 1, 64, requires_grad=True) for _ in range(2))
gates = torch.rand(1, T, 8, 3, requires_grad=True)
k_cmp, v_cmp = nsa.compress_blocks(k, cfg), nsa.compress_blocks(v, cfg)
o = nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, cfg)
o.square().mean().backward()
assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v, gates))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_of_a_long_sequence() -> None:
    """T = 8,192 with 8 and 1 heads of 64, forward and backward in fp32, the interpreter and torch included; all scores of one
    branch would be 2 GiB.
    """
    env = {**os.environ, "PYTHONPATH": str(Path(nsa.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) / 2**20
    assert peak < 1.5, f"peak of {peak:.2f} GiB"
