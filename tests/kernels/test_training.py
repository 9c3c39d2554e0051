"""Many steps in a row: what single gradients hide, such as a bias that adds up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa

DEVICE = "cuda"
STEPS = 200
CFG = nsa.NSAConfig(
    head_dim=64, num_heads=8, num_kv_heads=2, block_length=16, block_stride=8, selection_block_size=64, num_selected_blocks=4,
    window_size=64,
)  # fmt: skip


def lessons() -> list[tuple[Tensor, Tensor]]:
    """What another layer computes, one pair for each step and one more."""
    torch.manual_seed(1)
    teacher = nsa.NativeSparseAttention(96, CFG, backend="reference").to(DEVICE)
    with torch.no_grad():
        return [(x, teacher(x)) for x in torch.randn(STEPS + 1, 2, 640, 96).to(DEVICE)]


def trained(backend: str, dtype: torch.dtype, data: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[float]]:
    """Output for tokens it did not see, and the losses, of a layer that learns."""
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(96, CFG, backend=backend).to(DEVICE)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3)
    losses = []

    def run(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            return layer(x).float()

    for x, wanted in data[:STEPS]:
        loss = (run(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return run(data[STEPS][0]), torch.stack(losses).tolist()


@pytest.mark.gpu
@pytest.mark.slow
def test_200_steps_end_where_the_reference_ends() -> None:
    """Within twice the gap that bf16 makes in the reference itself."""
    data = lessons()
    exact, losses = trained("reference", torch.float32, data)
    assert losses[-1] < losses[0] / 2, "it must learn something"
    low, _ = trained("reference", torch.bfloat16, data)
    for dtype in (torch.bfloat16, torch.float32):
        got, mine = trained("triton", dtype, data)
        gap, error = (low - exact).norm() / exact.norm(), (got - exact).norm() / exact.norm()
        print(f"{dtype}: kernels {error:.3g}, reference in bf16 {gap:.3g}; losses {mine[-1]:.5f}, {losses[-1]:.5f}")
        assert 0 < error <= 2 * gap
