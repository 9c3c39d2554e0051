"""Continue a prompt token by token with a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa.models.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one token for each sequence at a time, and the logits it was drawn from.

    The prompt is computed once; every further token costs one step over the layers' caches.

    Args:
        model: left in the mode it is in.
        prompt: int64 ``[B, T]``, at least one token.
        max_new_tokens: how many to yield.
        temperature: 0 takes the likeliest token, always the same; 1 draws from the model's distribution.
        generator: a CPU generator to draw with; default torch's.

    Yields:
        int64 ``[B]`` and fp32 ``[B, V]``, on the prompt's device.

    Raises:
        TypeError, ValueError: a prompt without tokens, a negative count or temperature.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be [B, T] with at least one token, got {list(prompt.shape)}")
    if max_new_tokens == 0:
        return
    caches = model.make_caches(prompt.shape[0], prompt.shape[1] + max_new_tokens - 1)
    logits = model(prompt, caches)[:, -1].float()
    for i in range(max_new_tokens):
        tokens = draw(logits, temperature, generator)
        yield tokens, logits
        if i + 1 < max_new_tokens:
            logits = model(tokens[:, None], caches)[:, -1].float()


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A token for each row of ``logits [B, V]``: int64 ``[B]``. Drawn on the CPU, so that a seed means the same everywhere."""
    if temperature == 0:
        return logits.argmax(-1)
    likely = torch.softmax(logits.double().cpu() / temperature, -1)
    return torch.multinomial(likely, 1, generator=generator)[:, 0].to(logits.device)
