"""CUDA C++ to machine code, by the NVRTC that PyTorch's CUDA builds bring along: no toolkit is needed.

What was compiled is kept in the folder ``nsa`` of Triton's cache (``TRITON_CACHE_DIR``), named after all it depends on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import triton

SOURCES = Path(__file__).parent


class Unavailable(Exception):
    """Why a kernel cannot be compiled or loaded on this machine."""


def _places(name: str) -> Iterator[str]:
    """Where a library of NVIDIA's may lie: where the loader knows it, beside PyTorch, in the packages that PyTorch needs."""
    yield name
    folders = [Path(torch.__file__).parent / "lib"]
    found = importlib.util.find_spec("nvidia")
    for packages in (found.submodule_search_locations or []) if found else []:
        folders += sorted(Path(packages).glob("*/lib"))
    if "CUDA_HOME" in os.environ:
        folders.append(Path(os.environ["CUDA_HOME"]) / "lib64")
    yield from (str(folder / name) for folder in folders if (folder / name).exists())


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC of the CUDA version that PyTorch was built with.

    Raises:
        Unavailable: there is none.
    """
    if torch.version.cuda is None:
        raise Unavailable("PyTorch was built without CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    for place in _places(name):
        with suppress(OSError):
            return ctypes.CDLL(place)
    raise Unavailable(f"{name} is nowhere to be found")


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _check(code: int) -> None:
    if code:
        text = library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise Unavailable(f"NVRTC says {text(code).decode()}")


def key(sources: dict[str, bytes], options: tuple[str, ...], version: tuple[int, int]) -> str:
    """A name for what comes out of these; another whenever anything changes."""
    digest = hashlib.sha256()
    for part in (repr(version), *options, *(x for name in sorted(sources) for x in (name, sources[name]))):
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def sources() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh")}


def cubin(name: str, options: tuple[str, ...]) -> bytes:
    """Machine code of the file ``name``, from the cache or compiled.

    Raises:
        Unavailable: there is no NVRTC, or it can't compile this; the message says why.
    """
    texts = sources()
    kept = Path(triton.knobs.cache.dir) / "nsa" / f"{key(texts, (name, *options), version())}.cubin"
    with suppress(OSError):
        return kept.read_bytes()
    code = _compile(name, texts, options)
    with suppress(OSError):  # a cache that can't be written to is none
        _write(kept, code)
    return code


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whoever else writes or reads there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _compile(name: str, texts: dict[str, bytes], options: tuple[str, ...]) -> bytes:
    nvrtc, program = library(), ctypes.c_void_p()
    headers = {x: text for x, text in texts.items() if x.endswith(".cuh")}
    strings = ctypes.c_char_p * len(headers)
    names = strings(*(x.encode() for x in headers))
    _check(nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), texts[name], name.encode(), len(headers), strings(*headers.values()), names
    ))  # fmt: skip
    try:
        flags = (ctypes.c_char_p * len(options))(*(x.encode() for x in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), flags):
            log = _output(nvrtc, "ProgramLog", program).decode(errors="replace").strip("\0\n")
            raise Unavailable(f"NVRTC {'.'.join(map(str, version()))} can't compile {name}: {log}")
        return _output(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(nvrtc[f"nvrtcGet{what}"](program, data))
    return data.raw
