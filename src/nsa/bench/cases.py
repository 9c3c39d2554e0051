"""One case of the benchmark: its tensors, and the calls on them that are checked and then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsa import functional
from nsa.bench.data import random_like, trained_like
from nsa.config import NSAConfig

STEPS = ("compress", "compressed", "selection", "selected", "window", "combine")
WHOLE = "whole"


@dataclass(frozen=True)
class Case:
    """A length and a kind of data in one geometry. ``backend`` is what ``nsa.nsa_attention`` takes."""

    length: int
    data: str
    cfg: NSAConfig
    dtype: torch.dtype
    device: torch.device
    backend: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """A call to time.

    Attributes:
        forward: computes the outputs; a new graph each time.
        inputs: what the backward is taken with respect to, by name; empty where there is none.
        grad_outputs: a gradient for each output.
    """

    name: str
    forward: Callable[[], tuple[Tensor, ...]]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    grad_outputs: tuple[Tensor, ...] = ()

    def gradients(
        self, outputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...], retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """A gradient for each of ``inputs``, in their order."""
        return torch.autograd.grad(outputs, tuple(self.inputs.values()), grad_outputs, retain_graph=retain_graph)


@dataclass(frozen=True)
class Work:
    """The tensors of a case and everything that is done with them.

    Attributes:
        q, k, v: ``[1, T, HQ, D]``, ``[1, T, HK, D]``, ``[1, T, HK, DV]``, leaves that require gradients; keys and values are
            those of all branches.
        do: ``[1, T, HQ, DV]``, the gradient of the output.
        k_cmp: ``[1, N, HK, D]``, what the selection scored.
        indices: int32 ``[1, T, HK, n]``, the selection that the selected step reads, or that the whole made.
        steps: the six steps, each on the tensors that the one before made, and last the whole; or the whole alone.
        indices_of_whole: the selection that the whole makes by itself.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    k_cmp: Tensor
    indices: Tensor
    steps: dict[str, Step]
    indices_of_whole: Callable[[], Tensor]


def make_work(case: Case, single_steps: bool = True) -> Work:
    """Draw the tensors of ``case`` and, with ``single_steps``, run each step once for the next one's inputs.

    Raises:
        ValueError: the backend can't compute this case, or the length does not suit the data; the message says why.
    """
    cfg, backend = case.cfg, case.backend
    draw = trained_like if case.data == "trained-like" else random_like
    q, k, v = (_leaf(x) for x in draw(case.length, cfg, seed=case.seed, dtype=case.dtype, device=case.device))
    g = torch.Generator(device=case.device).manual_seed(case.seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=case.device, dtype=torch.float32).to(case.dtype)

    gates = _leaf(normal(1, case.length, cfg.num_heads, 3).sigmoid())
    do = normal(1, case.length, cfg.num_heads, cfg.value_dim)

    with torch.no_grad():
        k_cmp, v_cmp = (_leaf(functional.compress_blocks(x, cfg, backend=backend)) for x in (k, v))

    def compress() -> tuple[Tensor, Tensor]:
        return functional.compress_blocks(k, cfg, backend=backend), functional.compress_blocks(v, cfg, backend=backend)

    def attend() -> tuple[Tensor, Tensor]:
        kc, vc = compress()
        return functional.nsa_attention(q, kc, vc, k, v, k, v, gates, cfg, return_block_indices=True, backend=backend)

    @torch.no_grad()
    def indices_of_whole() -> Tensor:
        return attend()[1]

    whole = Step(WHOLE, lambda: attend()[:1], {"q": q, "k": k, "v": v, "gates": gates}, (do,))
    if not single_steps:
        return Work(case, q, k, v, do, k_cmp, indices_of_whole(), {WHOLE: whole}, indices_of_whole)

    with torch.no_grad():
        o_cmp, lse = functional.compressed_attention(q, k_cmp, v_cmp, cfg, backend=backend)
        indices = functional.select_blocks(q, k_cmp, lse, cfg, backend=backend)
        o_slc = functional.selected_attention(q, k, v, indices, cfg, backend=backend)
        o_win = functional.window_attention(q, k, v, cfg, backend=backend)
    o_cmp, o_slc, o_win = _leaf(o_cmp), _leaf(o_slc), _leaf(o_win)

    steps = (
        Step("compress", compress, {"k": k, "v": v}, (normal(*k_cmp.shape), normal(*v_cmp.shape))),
        Step(
            "compressed",
            lambda: functional.compressed_attention(q, k_cmp, v_cmp, cfg, backend=backend)[:1],
            {"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp},
            (do,),
        ),
        Step("selection", lambda: (functional.select_blocks(q, k_cmp, lse, cfg, backend=backend),)),
        Step(
            "selected",
            lambda: (functional.selected_attention(q, k, v, indices, cfg, backend=backend),),
            {"q": q, "k": k, "v": v},
            (do,),
        ),
        Step(
            "window",
            lambda: (functional.window_attention(q, k, v, cfg, backend=backend),),
            {"q": q, "k": k, "v": v},
            (do,),
        ),
        Step(
            "combine",
            lambda: (functional.combine(o_cmp, o_slc, o_win, gates, backend=backend),),
            {"o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win, "gates": gates},
            (do,),
        ),
        whole,
    )
    return Work(case, q, k, v, do, k_cmp, indices, {step.name: step for step in steps}, indices_of_whole)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
