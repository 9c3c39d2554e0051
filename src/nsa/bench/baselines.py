"""Full causal attention on the same queries, keys and values: ``scaled_dot_product_attention`` with a backend of its own."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.bench.cases import Step, Work

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def baseline(name: str, work: Work) -> Step:
    """Full attention as a step. Its tensors are contiguous copies ``[1, H, T, D]``, the layout that these kernels prefer.

    ``"efficient"`` knows no groups of heads: it gets keys and values repeated for every query head, within the step.
    """
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (work.q, work.k, work.v))
    backend, cfg, repeated = BACKENDS[name], work.case.cfg, name == "efficient"

    def forward() -> tuple[Tensor, ...]:
        keys, values = (x.repeat_interleave(cfg.group_size, 1) if repeated else x for x in (k, v))
        with sdpa_kernel(backend):
            return (
                torch.nn.functional.scaled_dot_product_attention(
                    q, keys, values, is_causal=True, scale=cfg.softmax_scale, enable_gqa=not repeated
                ),
            )

    return Step(name, forward, {"q": q, "k": k, "v": v}, (work.do.transpose(1, 2).contiguous(),))


def refusal(step: Step, backward: bool) -> str | None:
    """``None`` if the backend computes ``step`` (and its backward), else its reason in one line.

    Raises:
        torch.OutOfMemoryError: it might compute it on a larger device.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # torch warns with the reasons, then raises without them
        try:
            with torch.set_grad_enabled(backward):  # the forward of what requires gradients may be refused for their sake
                outputs = step.forward()
            if backward:
                step.gradients(outputs, step.grad_outputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reasons = [str(w.message).split(" (Triggered internally")[0] for w in caught]
            return "; ".join(dict.fromkeys([*reasons, str(error).splitlines()[0]]))
    return None
