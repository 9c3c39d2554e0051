"""What is exported: the list of kernels beside their signatures, and the table beside the cubins."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nsa
from nsa.aot.__main__ import ARCHS, DIMS, asked_cases, builds
from nsa.aot.kernels import DTYPES, KERNELS, Case
from tests.aot.build import NATIVE, ROOT, run

EVERYTHING = asked_cases(ARCHS, DIMS, " ".join(DTYPES))


@pytest.mark.parametrize("role", KERNELS)
def test_every_argument_and_constant_is_named(role: str) -> None:
    """A pointer that is taken for a number would be passed as one."""
    kernel = KERNELS[role]
    names = {p.name: p.is_constexpr for p in kernel.function.params}
    assert set(kernel.pointers) | set(kernel.names) | set(kernel.rules) <= set(names)
    assert not any(names[x] for x in kernel.pointers)
    assert all(names[x] for x in kernel.rules)
    for case in EVERYTHING:
        for variant in kernel.variants(case):
            assert set(variant.constants) == {name for name, constant in names.items() if constant}
            assert variant.type in (*DTYPES, "i16", "i32", "any")
            assert variant.constants["DEPENDENT"] == (case.arch >= 90)
    for name, constant in names.items():
        if not constant and name not in kernel.pointers and name not in kernel.floats:
            # Every other argument is a count or a stride, as the kernel's source uses it: it is nowhere an address.
            assert not re.search(rf"(load|store)\({name}\b", kernel.function.src), f"{role}: is {name} a pointer?"


@pytest.mark.parametrize("role", KERNELS)
def test_integers_are_not_specialised_on(role: str) -> None:
    """One binary serves every length, but for strides, whose alignment the loads need."""
    kernel = KERNELS[role]
    for case in EVERYTHING:
        for variant in kernel.variants(case):
            aligned = set(kernel.aligned(variant))
            assert aligned >= set(kernel.pointers)
            assert all(name.startswith("stride_") for name in aligned - set(kernel.pointers))


def test_what_the_host_knows_has_names_there() -> None:
    """The C compiler would say so too, but only where there is one."""
    header = (NATIVE / "src" / "values.h").read_text()
    known = set(re.findall(r"X\((\w+)\)", header))
    for role, kernel in KERNELS.items():
        assert {name for _, name in kernel.parameters()} <= known, role
        assert {rule.value for rule in kernel.rules.values()} <= known, role
    roles = re.search(r"NSA_ROLES\(X\)(.*?)\n\n", (NATIVE / "src" / "kernel.h").read_text(), re.DOTALL)
    assert roles
    assert re.findall(r"X\((\w+)\)", roles[1]) == list(KERNELS)


def test_the_workspace_depends_on_no_gpu() -> None:
    """So its size can be told where there is none: what it follows from is the same for every architecture."""
    sized = ("BM", "BN", "CELL", "TILES", "BC", "BJ", "ALL", "BP")
    seen: dict[tuple[Any, ...], set[Any]] = {}
    for case in EVERYTHING:
        for role, kernel in KERNELS.items():
            found = tuple(
                tuple((name, x.constants[name]) for name in sized if name in x.constants) for x in kernel.variants(case)
            )
            seen.setdefault((role, case.dtype, case.dim, case.value_dim), set()).add(found)
    assert all(len(found) == 1 for found in seen.values())


def test_what_several_cases_share_is_compiled_once() -> None:
    asked = builds(EVERYTHING)
    assert len({str(x.describe()) for x in asked}) == len(asked)
    assert len([x for x in asked if x.role == "stream_window"]) == 2 * 4  # of 16 and 32 bits, for each architecture


@pytest.mark.parametrize(
    ("archs", "dims", "dtypes", "why"),
    [
        ("75", "64", "fp32", "NSA_ARCHS must be compute capabilities of 80 and more, such as 80 or 90, got '75'"),
        ("sm_9x", "64", "fp32", "got 'sm_9x'"),
        ("90", "12", "fp32", "NSA_DIMS must be multiples of 8 from 16 to 256, such as 128 or 192/128, got '12'"),
        ("90", "64/100", "fp32", "got '64/100'"),
        ("90", "64", "fp64", "NSA_DTYPES must be of fp32, fp16, bf16, got 'fp64'"),
    ],
)
def test_what_cannot_be_exported_is_refused(archs: str, dims: str, dtypes: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        asked_cases(archs, dims, dtypes)


def test_lists_may_be_written_in_several_ways() -> None:
    want = [Case(80, "fp16", 64, 64), Case(80, "fp16", 192, 128), Case(90, "fp16", 64, 64), Case(90, "fp16", 192, 128)]
    assert asked_cases("80;sm_90", "64,192/128", "fp16") == asked_cases("8.0 90 90", "64/64 192/128", "fp16") == want


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, and from an environment that has Triton and no torch."""
    folder = tmp_path_factory.mktemp("export")
    _export_without_torch(folder)
    return folder


def _export_without_torch(folder: Path) -> None:
    code = f"""
import importlib.util, sys
from pathlib import Path
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "torch" else find(name, *package)
from nsa.aot.__main__ import asked_cases, export
assert not hasattr(sys.modules["torch"], "nn")
export(asked_cases("80", "32", "fp32"), Path({str(folder)!r}), 2)
"""
    run(sys.executable, "-c", code, PYTHONPATH=str(ROOT / "src"))


def symbols(image: bytes) -> Iterator[str]:
    """Names in the symbol tables of a 64-bit ELF file."""
    assert image[:5] == b"\x7fELF\x02"
    (sections,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, sections + i * size) for i in range(count)]
    for header in headers:
        if header[1] == 2:  # SHT_SYMTAB; its link is the table of names
            names = headers[header[6]][4]
            for at in range(header[4], header[4] + header[5], 24):
                start = names + struct.unpack_from("<I", image, at)[0]
                yield image[start : image.index(b"\0", start)].decode()


@pytest.mark.slow
def test_the_table_is_complete(exported: Path) -> None:
    """Every variant is in it, with a cubin that has the function, for the right architecture, and that names no file."""
    facts, blob = json.loads((exported / "kernels.json").read_text()), (exported / "kernels.bin").read_bytes()
    asked = builds(asked_cases("80", "32", "fp32"))
    assert [{name: x[name] for name in y.describe()} for x, y in zip(facts, asked)] == [y.describe() for y in asked]
    table = (exported / "kernels.c").read_text()
    for x in facts:
        image = blob[x["offset"] : x["offset"] + x["size"]]
        assert x["offset"] % 64 == 0
        assert x["symbol"] in set(symbols(image))
        assert b".py" not in image
        assert b"debug_line" not in image
        assert x["shared"] <= 101376  # of an 8.6, which runs what is compiled for 8.0
        numbers = ", ".join(str(x[name]) for name in ("num_warps", "shared", "offset", "size")) + ", 0"  # waits for nothing
        assert f'"{x["symbol"]}", {x["arch"]}, NSA_TYPE_{x["type"]}, {numbers}' in table
    assert table.count("NSA_ROLE_") == len(asked)


@pytest.mark.slow
def test_a_second_export_compiles_nothing(exported: Path) -> None:
    cache = exported / "cache"
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    first = (exported / "kernels.c").read_text()
    (cache / "of-a-kernel-that-was.cubin").write_bytes(b"")
    _export_without_torch(exported)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert (exported / "kernels.c").read_text() == first


@pytest.mark.parametrize(
    ("option", "value", "why"), [("--archs", "75", "NSA_ARCHS must be"), ("--jobs", "0", "--jobs must be at least 1, got 0")]
)
def test_the_command_says_what_is_wrong(option: str, value: str, why: str) -> None:
    command = [sys.executable, "-m", "nsa.aot", "--output", "/nowhere", option, value]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "src")
    assert done.returncode == 1
    assert done.stderr.startswith(f"nsa.aot: {why}")


def test_versions_agree() -> None:
    header = (NATIVE / "include" / "nsa" / "nsa.h").read_text()
    parts = [re.search(rf"NSA_VERSION_{x} (\d+)", header)[1] for x in ("MAJOR", "MINOR", "PATCH")]  # type: ignore[index]
    assert ".".join(parts) == nsa.__version__
