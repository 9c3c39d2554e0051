"""What one decode step must give: the streaming API's reference in fp64, and a naive one in the inputs' dtype beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import nsa
from tests import naive

Compressor = tuple[Tensor, tuple[Tensor, ...]] | None


@dataclass
class Stream:
    """Tokens of one sequence, one query for each length that is asked for, and weights; all in one dtype."""

    cfg: nsa.NSAConfig
    k: Tensor
    v: Tensor
    q: Tensor
    gate: Tensor | None = None
    compressors: tuple[Compressor, Compressor] = field(default=(None, None))

    def reference(self, seq_len: int, window: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """In fp64 and naively in the inputs' dtype, ``[HQ, DV]``. ``window``: other keys and values for the window's branch."""
        cfg, k, v = self.cfg, self.k[:seq_len], self.v[:seq_len]
        exact = nsa.NSAContext(cfg, backend="reference")
        exact.set_gate_weights(None if self.gate is None else self.gate.double())
        exact.set_compression_weights(
            **{
                f"{name}_{what}": value
                for name, pair in zip("kv", self.compressors)
                if pair is not None
                for what, value in (("embedding", pair[0].double()), ("weights", tuple(w.double() for w in pair[1])))
            }
        )
        k_win, v_win = (k, v) if window is None else (x[:seq_len] for x in window)
        exact.update_window(k_win.double(), v_win.double())
        want = exact.compute_attention(self.q.double(), k.double(), v.double())
        return want, self._naive(seq_len, k, v, k_win, v_win)

    def _naive(self, seq_len: int, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor) -> Tensor:
        cfg, q = self.cfg, self.q
        k_cmp, v_cmp = (
            naive.compress(x[None], cfg.block_length, cfg.block_stride, *((None, []) if c is None else (c[0], list(c[1]))))[0]
            if seq_len >= cfg.block_length
            else x[:0]
            for x, c in zip((k, v), self.compressors)
        )
        double = [x[None].double() for x in (q[None], k_cmp, v_cmp)]
        _, lse = nsa.compressed_attention(*double, cfg, seqlen_k=seq_len, backend="reference")
        indices = nsa.select_blocks(double[0], double[1], lse, cfg, seqlen_k=seq_len, backend="reference")[0]
        o_cmp, _, o_slc, o_win = naive.one_sequence(cfg, q[None], k_cmp, v_cmp, k, v, k_win, v_win, indices)
        gates = q.new_full((len(q), 3), 1 / 3) if self.gate is None else (q @ self.gate.T).sigmoid()
        return sum(gates[:, i, None] * o[0] for i, o in enumerate((o_cmp, o_slc, o_win)))


def draw(cfg: nsa.NSAConfig, tokens: int, dtype: torch.dtype, device: str, kind: str = "mean", seed: int = 0) -> Stream:
    """A stream whose selections no rounding decides: the blocks that are not forced and should be read stand out."""
    source = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=source)
    q, k = rand(cfg.num_heads, cfg.head_dim), rand(tokens, cfg.num_kv_heads, cfg.head_dim)
    wanted = cfg.num_selected_blocks - cfg.num_initial_blocks - cfg.num_local_blocks
    step = max(2, tokens // cfg.selection_block_size // (wanted + 1))
    for head in range(cfg.num_kv_heads):
        mine = slice(head * cfg.group_size, (head + 1) * cfg.group_size)
        common = torch.nn.functional.normalize(rand(cfg.head_dim), dim=0) * cfg.head_dim**0.25
        q[mine] = 0.5 * q[mine] + 2 * common
        for block in range(wanted):
            first = (cfg.num_initial_blocks + block * step) * cfg.selection_block_size
            k[first : first + cfg.selection_block_size, head] += (2 + 0.15 * block) * common
    place = lambda x: x.to(device, dtype)
    stream = Stream(cfg, place(k), place(rand(tokens, cfg.num_kv_heads, cfg.value_dim)), place(q))
    if kind != "mean":
        stream.gate = place(rand(3, cfg.head_dim) / cfg.head_dim**0.5)
        made = []
        for dim in (cfg.head_dim, cfg.value_dim):
            # Near the mean, so that what stands out still does.
            mean = torch.eye(dim).repeat(1, cfg.block_length) / cfg.block_length
            noise = lambda rows, dim=dim: rand(rows, cfg.block_length * dim) * 0.02 / (cfg.block_length * dim) ** 0.5
            weights = (mean + noise(dim),)
            if kind == "mlp":  # silu(x) - silu(-x) = x
                both = torch.cat([torch.eye(dim), -torch.eye(dim)], 1)
                weights = (torch.cat([mean, -mean]) + noise(2 * dim), both)
            made.append((place(0.1 * rand(cfg.block_length, dim)), tuple(map(place, weights))))
        stream.compressors = (made[0], made[1])
    return stream
