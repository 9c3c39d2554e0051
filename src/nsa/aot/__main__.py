"""``python -m nsa.aot``: the kernels of the C library, for the GPUs, head dims and dtypes that are asked for."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from nsa.aot import table
from nsa.aot.compiling import Binary, Build, binary
from nsa.aot.kernels import DTYPES, KERNELS, Case

ARCHS, DIMS = "80 90 100 120", "64 128 256 192/128"


def asked_cases(archs: str, dims: str, dtypes: str) -> list[Case]:
    """The product of lists whose items are separated by blanks, commas or semicolons.

    Raises:
        ValueError: an item is no compute capability, no pair of head dims, or no dtype.
    """
    cases = []
    for arch in _items(archs):
        number = arch.removeprefix("sm_").replace(".", "")
        if not number.isdecimal() or int(number) < 80:
            raise ValueError(f"NSA_ARCHS must be compute capabilities of 80 and more, such as 80 or 90, got {arch!r}")
        for pair in _items(dims):
            dim, _, value_dim = pair.partition("/")
            sizes = [int(x) if x.isdecimal() else 0 for x in (dim, value_dim or dim)]
            if any(x < 16 or x > 256 or x % 8 for x in sizes):
                raise ValueError(f"NSA_DIMS must be multiples of 8 from 16 to 256, such as 128 or 192/128, got {pair!r}")
            for dtype in _items(dtypes):
                if dtype not in DTYPES:
                    raise ValueError(f"NSA_DTYPES must be of {', '.join(DTYPES)}, got {dtype!r}")
                cases.append(Case(int(number), dtype, *sizes))
    return list(dict.fromkeys(cases))


def builds(cases: list[Case]) -> list[Build]:
    """Every variant of every case, once."""
    found: dict[str, Build] = {}
    for case in cases:
        for role, kernel in KERNELS.items():
            for variant in kernel.variants(case):
                build = Build(role, case.arch, variant)
                found.setdefault(str(build.describe()), build)
    return list(found.values())


def export(cases: list[Case], folder: Path, jobs: int) -> list[Binary]:
    """Compile what ``folder / "cache"`` does not have, and write the table."""
    asked, cache = builds(cases), folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of a cubin, which names files of the machine that made it
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch  # every stage of every kernel, which nobody needs again
        with ProcessPoolExecutor(jobs) as pool:
            made = list(pool.map(partial(binary, cache=cache), asked))
    table.write(cases, made, folder)
    kept = {x.build.key() for x in made}
    for path in cache.iterdir():
        if path.stem not in kept:
            path.unlink()
    return made


def _items(text: str) -> list[str]:
    return text.replace(",", " ").replace(";", " ").split()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nsa.aot", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for kernels.c, kernels.bin, kernels.json and the cache")
    for name, default, what in (
        ("archs", ARCHS, "compute capabilities"),
        ("dims", DIMS, "head dims, or key/value dims"),
        ("dtypes", " ".join(DTYPES), "of tensors"),
    ):
        variable = f"NSA_{name.upper()}"
        add(f"--{name}", default=os.environ.get(variable) or default, help=f"{what}; default ${variable} or {default}")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile; default %(default)s")
    told = parser.parse_args()
    try:
        if told.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {told.jobs}")
        cases = asked_cases(told.archs, told.dims, told.dtypes)
        if not cases:
            raise ValueError("NSA_ARCHS, NSA_DIMS and NSA_DTYPES must each name something")
        made = export(cases, told.output, told.jobs)
    except ValueError as error:
        print(f"nsa.aot: {error}", file=sys.stderr)
        return 1
    print(f"nsa.aot: {len(made)} kernels, {sum(len(x.cubin) for x in made) / 1e6:.1f} MB, in {told.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
