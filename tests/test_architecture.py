"""The shape of the package: imports point down, and importing it costs and touches nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nsa

PACKAGE = Path(nsa.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top down. A module imports from lower lines, and from its own package; names on one line don't know each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo", "bench", "aot"},
    {"train"},
    {"models"},
    {"module", "distributed"},
    {"decode", "decode_graph"},
    {"cache", "context"},
    {"cache_store"},
    {"functional"},
    {"_dispatch", "decode_ops"},
    {"ops"},
    {"kernels"},
    {"reference", "_validate", "_autocast"},
    {"layout", "cache_view", "paging", "decode_tuning"},
    {"config", "rope", "tuning", "_autocast"},
]
HEIGHT = {name: -i for i, names in enumerate(LAYERS) for name in names}
# Who may import what takes long, or is not always there.
HEAVY = {
    "triton": {"kernels", "bench", "aot"},  # bench times with its clock
    "matplotlib": {"demo", "bench"},
    "typer": {"cli", "bench", "__main__"},
    "rich": {"cli", "bench"},
    "safetensors": {"train", "models"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of what the file imports, anywhere in it; ``from nsa import x`` is ``nsa.x``'s home."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            if node.module == "nsa":
                yield from (f"nsa.{nsa._HOME.get(alias.name, alias.name)}" for alias in node.names)
            else:
                yield node.module or ""


def part(name: str) -> str | None:
    """``nsa.train.loop`` belongs to ``train``; what ``python -m`` starts to ``__main__``; the package itself to none."""
    pieces = name.split(".")
    if pieces[-1] == "__main__":
        return "__main__"
    return pieces[1] if len(pieces) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    importer = part(name_of(path))
    if importer is None:
        return  # nsa/__init__.py names everything and imports it lazily
    assert importer in HEIGHT, f"give {importer} its place in LAYERS"
    for name in imports(path):
        imported = part(name) if name.split(".")[0] == "nsa" else None
        if imported is None or imported == importer or imported.startswith("__"):
            continue
        assert imported in HEIGHT, f"give {imported} its place in LAYERS"
        assert HEIGHT[imported] < HEIGHT[importer], f"{name_of(path)} imports {name}, which is not below it"


def test_reference_and_kernels_share_nothing() -> None:
    for path in FILES:
        own, other = name_of(path), {part(name) for name in imports(path) if name.startswith("nsa.")}
        if own.startswith("nsa.reference"):
            assert other <= {"reference", "config", "layout"}, f"{own} imports {other}"
        if own.startswith("nsa.kernels"):
            assert other <= {"kernels", "config", "layout", "tuning", "decode_tuning"}, f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_stay_where_they_are_used(path: Path) -> None:
    for name in imports(path):
        allowed = HEAVY.get(name.split(".")[0])
        assert allowed is None or part(name_of(path)) in allowed, f"{name_of(path)} imports {name}"


def test_a_test_of_the_test() -> None:
    """The checks above read this repository, not an empty list."""
    assert len(FILES) > 15
    assert {"nsa.functional", "nsa.reference.attend"} <= set(map(name_of, FILES))
    assert "nsa.layout" in set(imports(PACKAGE / "reference" / "select.py"))
    assert {"nsa._validate", "nsa._dispatch"} <= set(imports(PACKAGE / "functional.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_and_named_after_something(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 500
    assert path.stem not in {"utils", "util", "common", "helpers", "helper", "misc", "tools"}


def fresh(code: str) -> str:
    """What a new interpreter prints that runs ``code``."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = """
cfg = nsa.NSAConfig(head_dim=4, num_heads=2, block_length=4, block_stride=2, selection_block_size=4)
layer = nsa.NativeSparseAttention(8, cfg)
x = torch.randn(1, 50, 8, requires_grad=True)
layer(x).sum().backward()
assert x.grad.isfinite().all()
"""


def test_it_works_without_triton() -> None:
    code = f"import sys; sys.modules['triton'] = None\nimport torch, nsa\n{CALL}\nprint('computed')"
    assert fresh(code) == "computed"


def test_importing_loads_nothing_heavy() -> None:
    """Nor does calling the reference; Triton is loaded by the first kernel that runs."""
    code = f"""
import sys, torch
before = set(sys.modules)
import nsa
for name in nsa.__all__:
    getattr(nsa, name)
{CALL}
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & {set(HEAVY)!r}))
"""
    assert fresh(code) == ""


def test_importing_asks_for_no_device() -> None:
    code = """
import torch
def refuse(*args, **kwargs):
    raise AssertionError("asked for a device")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = refuse
torch.cuda.current_device = torch.cuda.get_device_capability = torch.cuda.get_device_name = refuse
import nsa
for name in nsa.__all__:
    getattr(nsa, name)
print("asked nothing")
"""
    assert fresh(code) == "asked nothing"


def test_importing_takes_no_time() -> None:
    code = "import torch, time; t = time.process_time(); import nsa; print(time.process_time() - t)"
    assert any(float(fresh(code)) < 0.05 for _ in range(3))  # once is proof; a busy machine may need a second try


def test_every_public_name_exists() -> None:
    assert set(nsa._HOME) == set(nsa.__all__)
    assert set(nsa.__all__) <= set(dir(nsa))
    for name in nsa.__all__:
        assert getattr(nsa, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="module 'nsa' has no attribute 'attention'"):
        nsa.attention  # noqa: B018
