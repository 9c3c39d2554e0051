"""What is timed: normal tensors, whose selections hardly overlap, and tensors whose selections look like a trained model's.

In the second kind every 64-token segment of the keys carries one of a few directions ("topics"), every segment of the queries
another; ``strength`` sets how much of the score they decide. It is calibrated so that neighbouring queries share about half of
their 16 selected blocks and four neighbours select about 33 blocks together, as measured on a model trained with NSA on source
code. A timing on this data counts only where both figures of the selections that it timed lie in ``OVERLAP`` and
``UNION_OF_4``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig

KINDS = ("random", "trained-like")
UNION_OF_4 = (30.0, 37.0)  # blocks that four neighbouring queries select together
OVERLAP = (0.44, 0.64)  # share of a query's blocks that its predecessor selected too
STRENGTH = {8192: 0.066, 16384: 0.088, 32768: 0.100, 65536: 0.113, 131072: 0.119}
# Times that for other head dims and groups, by (D, G): the topics' share of a score grows with the root of D, and the noise of
# G heads cancels. Calibrated at 65,536 tokens; any other shape takes 1, and its figures say whether that does.
OF_SHAPE = {(128, 16): 1.0, (128, 4): 1.62, (128, 1): 2.74, (192, 16): 0.867, (64, 16): 1.274}
SEGMENT = 64  # tokens


def random_like(
    seq_len: int, cfg: NSAConfig, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q ``[1, T, HQ, D]``, k ``[1, T, HK, D]``, v ``[1, T, HK, DV]``."""
    g = torch.Generator(device=device).manual_seed(seed)
    shapes = ((cfg.num_heads, cfg.head_dim), (cfg.num_kv_heads, cfg.head_dim), (cfg.num_kv_heads, cfg.value_dim))
    q, k, v = (_normal(g, 1, seq_len, *shape).to(dtype) for shape in shapes)
    return q, k, v


def trained_like(
    seq_len: int,
    cfg: NSAConfig,
    *,
    seed: int = 0,
    strength: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[1, T, HQ, D]``, k ``[1, T, HK, D]``, v ``[1, T, HK, DV]`` whose selections overlap like a trained model's.

    Args:
        seq_len: T, a multiple of 64.
        strength: how much of the score the topics decide; None for the calibrated value of the nearest length and the shape.

    Raises:
        ValueError: ``seq_len`` is no positive multiple of 64.
    """
    if seq_len < SEGMENT or seq_len % SEGMENT:
        raise ValueError(f"seq_len must be a positive multiple of {SEGMENT} for trained-like data, got {seq_len}")
    if strength is None:
        nearest = min(STRENGTH, key=lambda calibrated: abs(calibrated - seq_len))
        strength = STRENGTH[nearest] * OF_SHAPE.get((cfg.head_dim, cfg.group_size), 1.0)
    g = torch.Generator(device=device).manual_seed(seed)
    segments = seq_len // SEGMENT
    topics = _normal(g, max(segments // 20, 1), cfg.head_dim)

    def mix(heads: int) -> Tensor:
        noise = _normal(g, segments, SEGMENT, heads, cfg.head_dim)
        topic = topics[torch.randint(len(topics), (segments,), generator=g, device=device)][:, None, None]
        return (noise + strength * topic).reshape(1, seq_len, heads, cfg.head_dim).to(dtype)

    q, k = mix(cfg.num_heads), mix(cfg.num_kv_heads)
    return q, k, _normal(g, 1, seq_len, cfg.num_kv_heads, cfg.value_dim).to(dtype)


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, device=g.device, dtype=torch.float32)


def selection_figures(block_indices: Tensor, start: int = 2048) -> tuple[float, float]:
    """The share of a query's blocks that its predecessor selected too, and the mean union over aligned groups of 4 queries.

    Args:
        block_indices: int ``[1, T, HK, n]``, padded with -1.
        start: the first query that counts; earlier ones select nearly all there is. NaN where none is left.
    """
    late = block_indices[0, start - start % 4 :].transpose(0, 1)  # [HK, T', n]
    late = late[:, : late.shape[1] // 4 * 4]
    if late.shape[1] == 0:
        return float("nan"), float("nan")
    after, before = late[:, 1::7], late[:, :-1:7]  # every seventh pair of neighbours
    shared = (after[..., :, None] == before[..., None, :]).any(-1) & (after >= 0)
    overlap = shared.float().sum(-1) / (after >= 0).sum(-1)
    four = late.reshape(late.shape[0], -1, 4 * late.shape[-1])[:, ::5].sort(-1)[0]
    new = (four[..., 1:] != four[..., :-1]) & (four[..., 1:] >= 0)
    union = new.float().sum(-1) + (four[..., 0] >= 0).float()
    return overlap.mean().item(), union.mean().item()


def counts(kind: str, overlap: float, union: float) -> bool:
    """Whether a timing on data of this ``kind``, with these figures, may be quoted. NaN figures never pass."""
    return kind != "trained-like" or (OVERLAP[0] <= overlap <= OVERLAP[1] and UNION_OF_4[0] <= union <= UNION_OF_4[1])
