"""What a streaming step hands to the kernels of a decode step besides keys and values: its length, and the gates.

The length is a number of the launch, so the host writes to no memory that a step before this one may still read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa import tuning
from nsa.kernels.triton.tile import wide


@triton.jit(do_not_specialize=["seq_len", "gated"])
def stream_inputs_kernel(q, gate_weights, gates, lengths, seq_len, gated, D: tl.constexpr, BD: tl.constexpr):
    head, dims = wide(tl.program_id(0)), tl.arange(0, BD)
    if head == 0:
        tl.store(lengths, seq_len)
    for branch in tl.static_range(3):
        gate = 1.0 / 3.0
        if gated:
            x = tl.load(q + head * D + dims, mask=dims < D, other=0.0).to(tl.float32)
            w = tl.load(gate_weights + branch * D + dims, mask=dims < D, other=0.0).to(tl.float32)
            gate = tl.sigmoid(tl.sum(x * w, 0))
        tl.store(gates + head * 3 + branch, gate)


def stream_inputs(q: Tensor, gate_weights: Tensor | None, gates: Tensor, lengths: Tensor, seq_len: int) -> None:
    """``seq_len`` into lengths int32 ``[1]``, and into gates fp32 ``[HQ, 3]`` the sigmoid of gate_weights ``[3, D]`` times q.

    q ``[HQ, D]`` contiguous. Without gate_weights every gate is 1/3.
    """
    heads, dim = q.shape
    stream_inputs_kernel[(heads,)](
        q, q if gate_weights is None else gate_weights, gates, lengths, seq_len, int(gate_weights is not None),
        D=dim, BD=tuning.padded_dim(dim), num_warps=1,
    )  # fmt: skip
