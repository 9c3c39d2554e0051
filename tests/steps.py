"""Every differentiable step of a case through the public functions, and the gradients of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

import nsa
from tests import naive
from tests.cases import Case, Inputs


def steps(case: Case, x: Inputs, indices: Tensor, backend: str = "reference") -> naive.Steps:
    cfg, told = case.cfg, {**case.lengths(x.q.device), "backend": backend}
    o_cmp, lse = nsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, cfg, **told)
    o_slc = nsa.selected_attention(x.q, x.k_slc, x.v_slc, indices, cfg, **told)
    o_win = nsa.window_attention(x.q, x.k_win, x.v_win, cfg, **told)
    o = nsa.nsa_attention(*x.tensors(), cfg, block_indices=indices, **told)
    return naive.Steps(o_cmp, lse, o_slc, o_win, o)


def gradients(x: Inputs, o: Tensor, grad: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(o, x.tensors(), grad.to(o.dtype), allow_unused=True, retain_graph=True)
    return {f"d{name}": torch.zeros_like(y) if g is None else g for (name, y), g in zip(x.items(), grads)}
