"""Does decoding with a cache give what one forward over the whole text gives?"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.models import LanguageModel, generate

NEAR_TIE = 1e-3  # logits this close may swap places through rounding alone


@dataclass(frozen=True)
class DecodeCheck:
    """A continuation, compared position by position with the uncached forward.

    Attributes:
        temperature: it was drawn at; 0 takes the likeliest byte.
        continuation: the bytes that were generated.
        max_difference: largest difference of two logits.
        near_ties: positions where another byte is likeliest, but the two are within ``NEAR_TIE``.
        mismatches: positions where another byte is likeliest by more.
        tokens_per_second: of the cached decoder, the prompt's own computation left out.
    """

    temperature: float
    continuation: bytes
    max_difference: float
    near_ties: int
    mismatches: int
    tokens_per_second: float


@torch.no_grad()
def check_decode(model: LanguageModel, prompt: Tensor, new_tokens: int, temperature: float = 0.0) -> DecodeCheck:
    """Continue ``prompt`` (int64 ``[T]``) by ``new_tokens >= 2`` and compare the logits that each was drawn from."""
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    started, draws = 0.0, torch.Generator().manual_seed(0)
    for token, scores in generate(model, prompt[None], new_tokens, temperature=temperature, generator=draws):
        if not tokens:
            started = time.perf_counter()
        tokens.append(token)
        logits.append(scores)
    seconds = time.perf_counter() - started
    cached, generated = torch.cat(logits), torch.cat(tokens)  # [new, V], [new]
    whole = torch.cat([prompt, generated[:-1]])
    uncached = model(whole[None])[0, len(prompt) - 1 :].float()
    ours, theirs = cached.argmax(-1, keepdim=True), uncached.argmax(-1, keepdim=True)
    gap = uncached.gather(1, theirs) - uncached.gather(1, ours)
    return DecodeCheck(
        temperature,
        bytes(generated.tolist()),
        (cached - uncached).abs().max().item(),
        int(((ours != theirs) & (gap <= NEAR_TIE)).sum()),
        int((gap > NEAR_TIE).sum()),
        (new_tokens - 1) / seconds,
    )
