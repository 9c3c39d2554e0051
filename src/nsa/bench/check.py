"""Correctness of the tensors that are about to be timed, on a sample of queries, against fp64.

The backward runs with a gradient that is 0 outside the sample, so that every row of every gradient of a key or value has an
exact reference, and every other row of a query's gradient must be 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.bench.cases import Case, Step, Work
from nsa.bench.sampled import FORMULAS, Sample, importance

RELATIVE_NORM = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}  # times the largest reference value
SCORE_ROUNDING = 2e-5  # relative; an importance within 1e-5 on each side of a comparison
BY_QUERY = ("q", "gates", "o_cmp", "o_slc", "o_win")  # inputs with a row for each query
SAMPLED = 64  # queries
PART = 65536  # rows that are looked at together


@dataclass(frozen=True)
class Finding:
    """How far one tensor is from its reference.

    Attributes:
        max_error: ``max|got - ref|``, which may be ``allowed``: twice the error of the same formula computed in the tensors'
            dtype, and a floor. For the selection: the largest relative shortfall of a selected block's exact importance
            against the n-th highest.
        relative_norm: ``|got - ref| / |ref|``, which must be under ``bound``. For the selection: the largest relative
            shortfall of a selected set's exact importance against the best set's.
        wrong: what is wrong, or None.
    """

    step: str
    direction: str
    tensor: str
    max_error: float
    allowed: float
    relative_norm: float
    bound: float
    wrong: str | None = None


def sample_positions(case: Case, count: int = SAMPLED, chunk: int | None = None) -> Tensor:
    """int64 ``[S]`` rising: the edges of the first blocks, of the window, of the chunks and of the sequence, the rest drawn."""
    length, cfg = case.length, case.cfg
    middle = length // 2 // cfg.selection_block_size * cfg.selection_block_size
    edges = [0, length - 1, length - 2, middle - 1, middle]
    for size in (cfg.block_length, cfg.block_stride, cfg.selection_block_size, cfg.window_size):
        edges += [size - 1, size, length - size - 1, length - size]
    for start in range(chunk, length, chunk) if chunk else ():
        edges += [start - 1, start]
    wanted = sorted({t for t in edges if 0 <= t < length})
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(case.seed)).tolist()
    return torch.tensor(sorted([*dict.fromkeys([*wanted, *drawn])][: max(count, len(wanted))]), device=case.device)


def check(work: Work, backward: bool = True) -> list[Finding]:
    """A finding for each output of each step and, with ``backward``, for each gradient."""
    positions = sample_positions(work.case)
    sample = Sample(work.case.cfg, positions, work.indices[0, positions].long())
    q, k_cmp = _rows(work.q, True, sample), work.k_cmp[0]
    findings = [check_selection(q, k_cmp, work.case.length, sample, _unequal(work))]
    for name, step in work.steps.items():
        if name in FORMULAS:
            findings += check_step(step, sample, work.case.dtype, backward)
    return findings


def check_step(step: Step, sample: Sample, dtype: torch.dtype, backward: bool) -> list[Finding]:
    """A finding for each output of ``step`` and, with ``backward``, for each gradient, against its formula."""
    by_key = step.name == "compress"  # its outputs have a row for each block, not for each query
    outputs = step.forward()
    grad_outputs = step.grad_outputs if by_key else tuple(_outside_zeroed(g, sample) for g in step.grad_outputs)
    grads = step.gradients(outputs, grad_outputs) if backward else ()

    def formula(precision: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        leaves = {
            name: _rows(x, name in BY_QUERY, sample).detach().to(precision, copy=True).requires_grad_(backward)
            for name, x in step.inputs.items()
        }
        results = FORMULAS[step.name](leaves, sample)
        values = tuple(x.detach() for x in results)
        if not backward:
            return values, ()
        incoming = tuple(_rows(g, not by_key, sample).to(precision) for g in grad_outputs)
        return values, torch.autograd.grad(results, tuple(leaves.values()), incoming)

    exact, exact_grads = formula(torch.float64)
    naive, naive_grads = formula(dtype)
    findings = []
    for i, output in enumerate(outputs):
        name = ("k_cmp", "v_cmp")[i] if by_key else "o"
        elsewhere = None if is_finite(output) else "not finite"
        got = _rows(output, not by_key, sample).detach()
        findings.append(compare((step.name, "forward", name), got, exact[i], naive[i], dtype, elsewhere))
    for name, grad, ref, plain in zip(step.inputs, grads, exact_grads, naive_grads):
        got, elsewhere = _rows(grad, name in BY_QUERY, sample), None
        if name in BY_QUERY and grad.count_nonzero() != got.count_nonzero():  # NaN counts too
            elsewhere = "not 0 for a query whose output has gradient 0"
        findings.append(compare((step.name, "backward", f"d{name}"), got, ref, plain, dtype, elsewhere))
    return findings


def _rows(x: Tensor, by_query: bool, sample: Sample) -> Tensor:
    """Without the batch axis, and for tensors with a row for each query the sampled rows."""
    return x[0, sample.positions] if by_query else x[0]


def _outside_zeroed(grad: Tensor, sample: Sample) -> Tensor:
    kept = torch.zeros_like(grad)
    kept[:, sample.positions] = grad[:, sample.positions]
    return kept


def is_finite(x: Tensor) -> bool:
    """Every number of ``x [1, rows, ...]``, without a copy of it: there may be no room for one."""
    return all(bool(torch.isfinite(torch.stack(part.aminmax())).all()) for part in torch.split(x, PART, 1))


def compare(
    what: tuple[str, str, str], got: Tensor, ref: Tensor, naive: Tensor, dtype: torch.dtype, elsewhere: str | None = None
) -> Finding:
    """The library's rule for numbers: twice a naive implementation's error plus a floor, and the relative norm."""
    error = (got.double() - ref).abs()
    largest, size = float(ref.abs().max()), float(ref.norm())
    allowed = 2 * float((naive.double() - ref).abs().max()) + FLOOR[dtype] * largest
    norm = float(error.norm()) / size if size else float(error.norm() > 0)
    worst, bound = float(error.max()), RELATIVE_NORM[dtype]
    wrong = elsewhere
    if wrong is None and not (worst <= allowed and norm < bound):  # NaN is never within
        beyond = (~(error <= allowed)).nonzero()
        wrong = f"first wrong at {beyond[0].tolist()}, {len(beyond)} of {error.numel()}" if len(beyond) else "norm too large"
    return Finding(*what, worst, allowed, norm, bound, wrong)


@torch.no_grad()
def _unequal(work: Work) -> str | None:
    """Which selections of all queries differ, that must not."""
    if "selection" in work.steps and not torch.equal(work.steps["selection"].forward()[0], work.indices):
        return "two runs select differently"
    if not torch.equal(work.indices_of_whole(), work.indices):
        return "the whole and the step select differently" if "selection" in work.steps else "two runs select differently"
    return None


@torch.no_grad()
def check_selection(q: Tensor, k_cmp: Tensor, length: int, sample: Sample, unequal: str | None = None) -> Finding:
    """Structure exactly, choice by score. q ``[S, HQ, D]``, k_cmp ``[N, HK, D]``; ``unequal``: what is known to be wrong."""
    scores = importance(q.double(), k_cmp.double(), length, sample)  # [S, HK, M]
    cfg, chosen = sample.cfg, _as_mask(sample.indices, scores.shape[-1])
    block, own = torch.arange(scores.shape[-1], device=q.device), (sample.positions // cfg.selection_block_size)[:, None, None]
    candidate = (block <= own).expand_as(chosen)
    forced = ((block < cfg.num_initial_blocks) | (block > own - cfg.num_local_blocks)) & candidate
    free = scores.masked_fill(forced | ~candidate, -1)
    places = (cfg.num_selected_blocks - forced.sum(-1)).clamp(min=0)  # [S, HK]
    ranked = free.sort(-1, descending=True).values
    best = torch.where(torch.arange(ranked.shape[-1], device=q.device) < places[..., None], ranked.clamp(min=0), 0).sum(-1)
    last = (places - 1).clamp(0, ranked.shape[-1] - 1)
    limit = ranked.gather(-1, last[..., None]).clamp(min=0)  # [S, HK, 1]: what the last free place goes for
    tiny = torch.finfo(scores.dtype).tiny
    short = torch.where(chosen & ~forced, (limit - scores).clamp(min=0) / limit.clamp(min=tiny), 0).max()
    got = torch.where(chosen & ~forced, scores, 0).sum(-1)
    sums = ((best - got).clamp(min=0) / best.clamp(min=tiny)).max()
    wrong = _malformed(sample.indices, chosen, candidate, forced, cfg.num_selected_blocks)
    wrong = wrong or unequal
    if wrong is None and not (short <= SCORE_ROUNDING and sums <= SCORE_ROUNDING):
        wrong = "a block of less importance was selected before one of more"
    return Finding("selection", "forward", "indices", float(short), SCORE_ROUNDING, float(sums), SCORE_ROUNDING, wrong)


def _as_mask(indices: Tensor, blocks: int) -> Tensor:
    """``[S, HK, n]`` block numbers as bool ``[S, HK, M]``; those out of range are left out."""
    inside = (indices >= 0) & (indices < blocks)
    mask = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(inside, indices, blocks), True)[..., :blocks]


def _malformed(indices: Tensor, chosen: Tensor, candidate: Tensor, forced: Tensor, n: int) -> str | None:
    """What is wrong with the sets apart from their choice."""
    held = (indices >= 0).sum(-1)
    rising = ((indices[..., 1:] > indices[..., :-1]) | (indices[..., 1:] == -1)).all()
    if not rising or not ((indices >= -1).all() and (indices < chosen.shape[-1]).all()):
        return "indices must rise and end in -1"
    if not torch.equal(held, candidate.sum(-1).clamp(max=n)):
        return "as many blocks must be selected as there are places and candidates"
    if (chosen & ~candidate).any():
        return "a block in a query's future was selected"
    if (forced & ~chosen).any():
        return "a forced block was not selected"
    return None
