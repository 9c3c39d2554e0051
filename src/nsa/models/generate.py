"""Continue prompts token by token with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nsa.cache import NSACache
from nsa.decode_graph import DecodeGraph
from nsa.models.language_model import Cache, LanguageModel

CHUNK = 512  # tokens of prompts of different lengths that are computed at a time


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one token for each sequence at a time, and the logits it was drawn from.

    The prompts are computed once; every further token costs one step over the layers' caches, on a GPU one graph.

    Args:
        model: left in the mode it is in.
        prompt: int64 ``[B, T]``, at least one token.
        max_new_tokens: how many to yield.
        lengths: tokens of each prompt where they differ, which the rest of its row pads; for ``attention="nsa"`` only.
        temperature: 0 takes the likeliest token, always the same; 1 draws from the model's distribution.
        generator: a CPU generator to draw with; default torch's.

    Yields:
        int64 ``[B]`` and fp32 ``[B, V]``, on the prompt's device.

    Raises:
        TypeError, ValueError: a prompt without tokens, lengths that it does not have, a negative count or temperature.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be [B, T] with at least one token, got {list(prompt.shape)}")
    lengths = _checked_lengths(model, prompt, lengths)
    if max_new_tokens == 0:
        return
    if len(set(lengths)) == 1:
        caches = model.make_caches(prompt.shape[0], lengths[0] + max_new_tokens - 1)
        logits = model(prompt[:, : lengths[0]], caches)[:, -1].float()
    else:
        caches, logits = _start_apart(model, prompt, lengths, max_new_tokens)
    step: Callable[[Tensor], Tensor] | None = None
    for i in range(max_new_tokens):
        tokens = draw(logits, temperature, generator)
        yield tokens, logits
        if i + 1 < max_new_tokens:
            step = step or _stepper(model, caches, tokens)
            logits = step(tokens)


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A token for each row of ``logits [B, V]``: int64 ``[B]``. Drawn on the CPU, so that a seed means the same everywhere."""
    if temperature == 0:
        return logits.argmax(-1)
    likely = torch.softmax(logits.double().cpu() / temperature, -1)
    return torch.multinomial(likely, 1, generator=generator)[:, 0].to(logits.device)


def _checked_lengths(model: LanguageModel, prompt: Tensor, lengths: Sequence[int] | None) -> list[int]:
    batch, longest = prompt.shape
    if lengths is None:
        return [longest] * batch
    if len(lengths) != batch or not all(1 <= n <= longest for n in lengths):
        raise ValueError(f"lengths must be {batch} numbers from 1 to {longest}, got {list(lengths)}")
    if len(set(lengths)) > 1 and model.cfg.attention != "nsa":
        raise ValueError(f"lengths must be equal for attention={model.cfg.attention!r}, got {list(lengths)}")
    return list(lengths)


def _start_apart(
    model: LanguageModel, prompt: Tensor, lengths: Sequence[int], max_new_tokens: int
) -> tuple[list[Cache], Tensor]:
    """Caches that hold prompts of different lengths, and the logits ``[B, V]`` after each.

    All go through the model side by side, a chunk at a time; what lies past a prompt's end is cropped off again.
    """
    batch, longest = len(lengths), max(lengths)
    size = min(CHUNK, longest)
    caches = model.make_caches(batch, longest + size + max_new_tokens - 1, max_crop=size)
    logits = torch.zeros(batch, model.cfg.vocab_size, device=prompt.device)
    for start in range(0, longest, size):
        stop = min(start + size, longest)
        found = model(prompt[:, start:stop], caches)
        for b, length in enumerate(lengths):
            if start < length <= stop:
                logits[b] = found[b, length - start - 1].float()
        for cache in caches:
            assert isinstance(cache, NSACache)
            cache.crop([min(length, stop) for length in lengths])
    return caches, logits


def _stepper(model: LanguageModel, caches: list[Cache], tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes the next logits ``[B, V]`` of the newest tokens ``[B]``: a graph where the caches can be captured."""
    captured = [cache for cache in caches if isinstance(cache, NSACache) and cache.capturable]
    if len(captured) < len(caches):
        return lambda newest: model(newest[:, None], caches)[:, -1].float()
    held = tokens[:, None].clone()
    graph = DecodeGraph(lambda: model(held, caches), captured)

    def replay(newest: Tensor) -> Tensor:
        held.copy_(newest[:, None])
        return graph.replay()[:, -1].to(torch.float32, copy=True)  # the next replay writes where this one did

    return replay
