"""Tests that can fail: each break of the reference below must be seen by a check that passes without it.

A break is a source edit, applied to a copy of the package's modules in a fresh process, where the named tests then run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import nsa

ORACLE = "tests/reference/test_against_oracle.py"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Break:
    what: str
    file: str
    before: str
    after: str
    seen_by: str


BREAKS = [
    Break(
        "compressed blocks visible one token early",
        "reference/attend.py",
        "visible = last[:seen] <= chunk.positions(q.device)[:, None]",
        "visible = last[:seen] <= chunk.positions(q.device)[:, None] + 1",
        f"{ORACLE}::test_every_step_and_the_whole",
    ),
    Break(
        "compressed blocks visible one token late",
        "reference/attend.py",
        "visible = last[:seen] <= chunk.positions(q.device)[:, None]",
        "visible = last[:seen] < chunk.positions(q.device)[:, None]",
        f"{ORACLE}::test_every_step_and_the_whole",
    ),
    Break(
        "a window of w + 1 tokens",
        "reference/attend.py",
        "(tokens > positions - cfg.window_size)",
        "(tokens >= positions - cfg.window_size)",
        f"{ORACLE}::test_every_step_and_the_whole",
    ),
    Break(
        "equation 9 counts every compressed block once",
        "reference/select.py",
        "for r in range(covers):",
        "for r in range(1):",
        f"{ORACLE}::test_every_step_and_the_whole",
    ),
    Break(
        "the initial block is not forced",
        "reference/select.py",
        "(block < cfg.num_initial_blocks) | (block > own",
        "(block < 0) | (block > own",
        f"{ORACLE}::test_every_step_and_the_whole",
    ),
    Break(
        "one local block fewer is forced",
        "reference/select.py",
        "(block > own - cfg.num_local_blocks)",
        "(block > own - cfg.num_local_blocks + 1)",
        f"{ORACLE}::test_every_step_and_the_whole",
    ),
    Break(
        "ties go to the highest block",
        "reference/select.py",
        "value, index = torch.sort(ranked, dim=-1, descending=True, stable=True)",
        "value, index = (x.flip(-1) for x in torch.sort(ranked, dim=-1, stable=True))",
        f"{ORACLE}::test_exact_ties_go_to_the_lowest_block",
    ),
    Break(
        "selected attention sees the rest of its own block",
        "reference/attend.py",
        "wanted[..., tokens // size] & (tokens <= chunk.positions(q.device)[:, None])",
        "wanted[..., tokens // size]",
        f"{ORACLE}::test_every_step_and_the_whole",
    ),
    Break(
        "the gates of compressed and selected attention change places",
        "reference/attend.py",
        "g[..., 0, :] * o_cmp.to(acc) + g[..., 1, :] * o_slc.to(acc)",
        "g[..., 1, :] * o_cmp.to(acc) + g[..., 0, :] * o_slc.to(acc)",
        "tests/test_functional.py::test_a_gate_opens_its_own_branch",
    ),
    Break(
        "the compressor's weights get no gradient",
        "reference/compress.py",
        "linear(silu(first), weights[1])",
        "linear(silu(first), weights[1].detach())",
        "tests/reference/test_gradients.py::test_compressor",
    ),
    Break(
        "the compressor's input gets no gradient",
        "reference/compress.py",
        "blocks = gather_blocks(x, cfg, cu_seqlens)\n    if not weights",
        "blocks = gather_blocks(x.detach(), cfg, cu_seqlens)\n    if not weights",
        "tests/reference/test_gradients.py::test_compressor",
    ),
    Break(
        "packed sequences share a block",
        "reference/compress.py",
        "ends = owned.cumsum(0)",
        "ends = owned.cumsum(0) + 1",
        f"{ORACLE}::test_compression",
    ),
    Break(
        "a cache compresses a block from the wrong token",
        "cache.py",
        "start: Tensor | int = blocks[:, 0] * stride - store.lengths + held",
        "start: Tensor | int = blocks[:, 0] * stride - store.lengths + held - 1",
        "tests/test_cache_replays.py::test_replays_write_where_appends_do",
    ),
    Break(
        "forked sequences forget their length",
        "cache.py",
        "[self._lengths[i] for i in order], [self._longest[i] for i in order]",
        "self._lengths, [self._longest[i] for i in order]",
        "tests/test_cache.py::test_reorder_and_fork",
    ),
    Break(
        "a ring stays at its end instead of beginning anew",
        "cache_store.py",
        "positions[:, old:] % slots, x",
        "positions[:, old:].clamp_max(slots - 1), x",
        "tests/test_cache_boundaries.py::test_steps_pass_the_ends_of_rings_blocks_and_pages",
    ),
    Break(
        "the tail of the compressed branch has no slack for a crop",
        "cache_store.py",
        "cfg.block_length - 1 + max_crop + STEP",
        "cfg.block_length - 1 + 1",
        "tests/test_cache_boundaries.py::test_a_crop_across_an_end_brings_the_old_tokens_back",
    ),
    Break(
        "a compressed block lies in the page where it begins",
        "cache.py",
        'store.write_pages(f"{name}_cmp", blocks + store.lead, made',
        'store.write_pages(f"{name}_cmp", blocks, made',
        "tests/test_cache_boundaries.py::test_blocks_that_begin_in_one_page_and_end_in_the_next",
    ),
    Break(
        "forked sequences write to the page that they share",
        "paging.py",
        "- left[pages[i]] > 1:",
        "- left[pages[i]] > 9:",
        "tests/test_cache_boundaries.py::test_forks_go_their_own_ways",
    ),
    Break(
        "a paged fork leaves the ring and the tail behind",
        "cache_store.py",
        "(*POOLS, *RINGS) if self.table.fixed else RINGS:",
        "(*POOLS, *RINGS) if self.table.fixed else ():",
        "tests/test_cache_boundaries.py::test_forks_go_their_own_ways",
    ),
    Break(
        "the ring starts one slot late",
        "context.py",
        "slots = torch.arange(self._seen - size, self._seen, device=k.device) % w",
        "slots = torch.arange(self._seen - size + 1, self._seen + 1, device=k.device) % w",
        "tests/test_context.py::test_the_window_takes_any_number_of_tokens",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: b.what)
def test_a_break_is_seen(broken: Break, tmp_path: Path) -> None:
    source = Path(nsa.__file__).parent
    shutil.copytree(source, tmp_path / "nsa", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "nsa" / broken.file
    text = file.read_text()
    assert text.count(broken.before) == 1, f"{broken.file} must hold once: {broken.before}"
    file.write_text(text.replace(broken.before, broken.after))
    # `pytest` must not see that it runs inside another, nor take this one's options.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--configs", "60", broken.seen_by],
        cwd=ROOT, env={**env, "PYTHONPATH": f"{tmp_path}", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, f"{broken.seen_by} did not see it:\n{done.stdout}{done.stderr}"
    assert " failed" in done.stdout
