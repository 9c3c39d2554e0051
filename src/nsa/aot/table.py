"""The exported kernels as C: a table of them, and one file of all cubins that the assembler includes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nsa import decode_tuning
from nsa.aot.compiling import Binary
from nsa.aot.kernels import KERNELS, Case, Kernel

CUBIN_ALIGNMENT = 64
PASSED = {"i32": "NSA_PASSED_INT", "fp32": "NSA_PASSED_FLOAT"}


def write(cases: Sequence[Case], binaries: Sequence[Binary], folder: Path) -> None:
    """``kernels.c``, ``kernels.bin``, and for whoever checks them ``kernels.json``."""
    blob, places = bytearray(), {}
    for x in binaries:
        if x.cubin not in places:
            blob += bytes(-len(blob) % CUBIN_ALIGNMENT)
            places[x.cubin] = len(blob)
            blob += x.cubin
    entries = [(x, places[x.cubin]) for x in binaries]
    # Also where nothing changes, so that a build tool sees that they were made.
    (folder / "kernels.bin").write_bytes(blob)
    (folder / "kernels.json").write_text(json.dumps([_facts(x, offset) for x, offset in entries], indent=1))
    (folder / "kernels.c").write_text("\n".join(_lines(cases, entries)))


def _facts(x: Binary, offset: int) -> dict[str, Any]:
    place = {"symbol": x.symbol, "shared": x.shared, "offset": offset, "size": len(x.cubin)}
    return x.build.describe() | place | {"parameters": list(KERNELS[x.build.role].parameters())}


def _lines(cases: Sequence[Case], entries: Sequence[tuple[Binary, int]]) -> Iterable[str]:
    yield "/* Made by python -m nsa.aot out of the Triton kernels; not to be edited. */"
    yield '#include "kernel.h"'
    yield ""
    told = ("COMPRESSED_PROGRAMS", "FEW_PROGRAMS", "FEW_PARTS", "TOKEN_PROGRAMS")
    yield f"const NSATuning nsa_tuning = {{{', '.join(str(getattr(decode_tuning, name)) for name in told)}}};"
    archs, dims, dtypes = (sorted(set(x)) for x in zip(*((c.arch, _dims(c), c.dtype) for c in cases)))
    held = f"compute capability {_joined(archs)}, head dims {_joined(dims)}, {_joined(dtypes)}"
    yield f'const char nsa_exported[] = "{held}";'
    yield ""
    for role, kernel in KERNELS.items():
        yield f"static const NSAParameter {role}[] = {{{', '.join(_parameters(kernel))}}};"
        yield f'_Static_assert(sizeof {role} / sizeof *{role} <= NSA_MAX_PARAMETERS, "parameters of {role}");'
    yield ""
    yield "const NSAKernel nsa_kernels[] = {"
    for x, offset in entries:
        build = x.build
        constants = [_constant(KERNELS[build.role], name, number) for name, number in _ordered(x).items()]
        yield (
            f'    {{NSA_ROLE_{build.role}, "{x.symbol}", {build.arch}, NSA_TYPE_{build.variant.type}, '
            f"{build.variant.num_warps}, {x.shared}, {offset}, {len(x.cubin)}, "
            f"{build.variant.constants['DEPENDENT']}, {build.role}, "
            f"sizeof {build.role} / sizeof *{build.role}, {{{', '.join(constants)}}}}},"
        )
    yield "};"
    yield "const int nsa_num_kernels = sizeof nsa_kernels / sizeof *nsa_kernels;"
    yield ""


def _joined(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def _dims(case: Case) -> str:
    return str(case.dim) if case.dim == case.value_dim else f"{case.dim}/{case.value_dim}"


def _parameters(kernel: Kernel) -> Iterable[str]:
    for kind, name in kernel.parameters():
        yield f"{{NSA_VALUE_{name}, {'NSA_PASSED_POINTER' if kind[0] == '*' else PASSED[kind]}}}"


def _ordered(x: Binary) -> dict[str, int]:
    """The constants with those first by which a variant is picked, in the order in which they count."""
    constants = x.build.variant.constants
    return {name: constants[name] for name in (*KERNELS[x.build.role].rules, *constants)}


def _constant(kernel: Kernel, name: str, number: int) -> str:
    rule = kernel.rules.get(name)
    if rule is None:
        return f'{{"{name}", {number}, NSA_RULE_none, NSA_VALUE_none}}'
    return f'{{"{name}", {number}, NSA_RULE_{rule.kind}, NSA_VALUE_{rule.value}}}'
