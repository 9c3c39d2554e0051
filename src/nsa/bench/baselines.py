"""Full causal attention on the same queries, keys and values: ``scaled_dot_product_attention`` with a backend of its own."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.bench.cases import Step, Work

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def baseline(name: str, work: Work) -> Step:
    """Full attention as a step. Its tensors are contiguous copies ``[1, H, T, D]``, the layout that these kernels prefer."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (work.q, work.k, work.v))
    backend = BACKENDS[name]

    def forward() -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return (
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=work.case.cfg.softmax_scale, enable_gqa=True
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
            outputs = step.forward()
            if backward:
                step.gradients(outputs, step.grad_outputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reasons = [str(w.message).split(" (Triggered internally")[0] for w in caught]
            return "; ".join(dict.fromkeys([*reasons, str(error).splitlines()[0]]))
    return None
