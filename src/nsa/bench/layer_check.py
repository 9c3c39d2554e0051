"""An attention layer of the language model, from its input to its output and back, on a sample of queries in fp64.

As in ``check``, the backward runs with a gradient that is 0 outside the sample, so every row of the input's gradient, and the
gradient of every weight, has an exact reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from nsa.bench.cases import Case
from nsa.bench.check import Finding, check_selection, compare, is_finite, sample_positions
from nsa.bench.sampled import Sample, combine, compress, compressed, selected, window
from nsa.module import NativeSparseAttention
from nsa.rope import apply_rope

WEIGHTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "o_proj")


def check_layer(name: str, layer: NativeSparseAttention, x: Tensor) -> list[Finding]:
    """The layer on ``x [1, T, C]``: its selection, its output and the gradients of ``x`` and the weights.

    The layer has the mean compressor, RoPE, keys and values of its own for each branch, and gates from the hidden state.
    """
    positions = sample_positions(Case(x.shape[1], "", layer.cfg, x.dtype, x.device))
    inputs = {"x": x.detach().requires_grad_(), **{weight: getattr(layer, weight).weight for weight in WEIGHTS}}
    with ExitStack() as stack:
        q, k_cmp = (_outputs_of(module, stack) for module in (layer.q_proj, layer.compress_k))
        o, indices = layer(inputs["x"], return_block_indices=True)
    sample, at = Sample(layer.cfg, positions, indices[0, positions].long()), (0, positions)
    do = torch.zeros_like(o)
    do[at] = torch.randn(do[at].shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device).to(x.dtype)
    grads = torch.autograd.grad(o, tuple(inputs.values()), do)

    def formula(precision: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = {key: value.detach().to(precision, copy=True).requires_grad_() for key, value in inputs.items()}
        result = layer_formula(leaves, layer, sample)
        return result.detach(), torch.autograd.grad(result, tuple(leaves.values()), do[at].to(precision))

    (exact, exact_grads), (naive, naive_grads) = formula(torch.float64), formula(x.dtype)
    elsewhere = None if is_finite(o) else "not finite"
    findings = [
        replace(_check_selection(layer, q[0][:, positions], k_cmp[0][0], x, indices, sample), step=name),
        compare((name, "forward", "o"), o[at].detach(), exact, naive, x.dtype, elsewhere),
    ]
    for key, grad, ref, plain in zip(inputs, grads, exact_grads, naive_grads, strict=True):
        findings.append(compare((name, "backward", f"d{key}"), grad, ref, plain, x.dtype))
    return findings


def layer_formula(leaves: Mapping[str, Tensor], layer: NativeSparseAttention, sample: Sample) -> Tensor:
    """The layer's output for the sampled queries, ``[S, C]``. ``leaves``: x ``[1, T, C]`` and the weights, in any precision."""
    cfg, at, x = layer.cfg, sample.positions, leaves["x"]
    rows = x[:, at]

    def project(x: Tensor, weight: str, dim: int) -> Tensor:
        return torch.unflatten(x @ leaves[weight].T, -1, (-1, dim))

    q = _turned(project(rows, "q_proj", cfg.head_dim), at, layer)[0]
    k_all = _turned(project(x, "k_proj", cfg.head_dim), torch.arange(x.shape[1], device=x.device), layer)[0]
    k, v = (torch.split(y, cfg.num_kv_heads, 1) for y in (k_all, project(x, "v_proj", cfg.value_dim)[0]))
    o_cmp = compressed(q, compress(k[0], cfg), compress(v[0], cfg), sample)
    o_slc, o_win = selected(q, k[1], v[1], sample), window(q, k[2], v[2], sample)
    o = combine(o_cmp, o_slc, o_win, project(rows, "gate_proj", 3)[0].sigmoid())
    return o.flatten(1) @ leaves["o_proj"].T


@torch.no_grad()
def _check_selection(
    layer: NativeSparseAttention, q: Tensor, k_cmp: Tensor, x: Tensor, indices: Tensor, sample: Sample
) -> Finding:
    """By the numbers that the layer scored: q ``[1, S, HQ * D]`` before RoPE, k_cmp ``[N, HK, D]``."""
    q = _turned(torch.unflatten(q, -1, (-1, layer.cfg.head_dim)), sample.positions, layer)[0]
    again = layer(x, return_block_indices=True)[1]
    unequal = None if torch.equal(indices, again) else "two runs select differently"
    return check_selection(q, k_cmp, x.shape[1], sample, unequal)


def _turned(x: Tensor, positions: Tensor, layer: NativeSparseAttention) -> Tensor:
    assert layer.rope_theta is not None
    return apply_rope(x, positions, layer.rope_theta)


def _outputs_of(module: nn.Module, stack: ExitStack) -> list[Tensor]:
    """What ``module`` returns until ``stack`` closes, in order."""
    found: list[Tensor] = []
    stack.callback(module.register_forward_hook(lambda _module, _inputs, output: found.append(output.detach())).remove)
    return found
