"""The C library's own build and tests, as someone runs them who has exported kernels and no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.aot.build import FOLDER, ROOT, compiler, export, locked, run


def _raw(folder: Path) -> Path:
    """What the example in C reads: a query and 100 keys and values of 8 heads of 64."""
    torch.cat([torch.randn(n * 64) for n in (8, 100, 100)]).numpy().tofile(folder / "raw.bin")
    return folder / "raw.bin"


def _safetensors(folder: Path) -> Path:
    tensors = {"query": torch.randn(8, 64), "keys": torch.randn(100, 2, 64), "values": torch.randn(100, 2, 64)}
    save_file(tensors, folder / "tokens.safetensors", {"made by": "a test"})
    return folder / "tokens.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["", "address,undefined"], ids=["plain", "sanitized"])
def test_cmake_and_ctest(sanitize: str, tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("there is no CMake")
    compiler()
    with locked(FOLDER):
        exported = export("90", "cpu")
    run("cmake", "-S", ROOT, "-B", tmp_path, f"-DNSA_EXPORTED={exported}", f"-DNSA_SANITIZE={sanitize}")
    run("cmake", "--build", tmp_path, "--parallel", "2")
    run("cmake", "-E", "chdir", tmp_path, "ctest", "--output-on-failure")
    for name, arguments in (("decode", (_raw(tmp_path), 100, 8, 64)), ("decode_cxx", (_safetensors(tmp_path), 3))):
        example = tmp_path / "native" / "examples" / name
        run(example, *arguments, NSA_CUDA_DRIVER=str(next(tmp_path.rglob("libfake_cuda.so"))))
        done = subprocess.run(
            [example, *map(str, arguments)], env={"NSA_CUDA_DRIVER": "/no/such"}, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (1, b"no NVIDIA GPU on this machine\n")
    if sanitize:
        return
    # Installed, another project finds it, links it and runs.
    prefix, user = tmp_path / "prefix", tmp_path / "user"
    user.mkdir()
    (user / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(user C)\nfind_package(nsa 0.1 REQUIRED)\n"
        "add_executable(shared main.c)\ntarget_link_libraries(shared PRIVATE nsa::nsa)\n"
        "add_executable(static main.c)\ntarget_link_libraries(static PRIVATE nsa::nsa_static)\n"
    )
    (user / "main.c").write_text(
        "#include <nsa/nsa.h>\nint main(void) { NSAConfig config = nsa_create_default_config(64, 8); NSAContext ctx;\n"
        "return nsa_init(&ctx, &config) == NSA_ERROR_NO_DEVICE ? 0 : 1; }\n"
    )
    run("cmake", "--install", tmp_path, "--prefix", prefix)
    assert (prefix / "include" / "nsa" / "nsa.h").exists()
    assert "-lnsa" in next(prefix.rglob("nsa.pc")).read_text()
    run("cmake", "-S", user, "-B", user / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", user / "build")
    for name in ("shared", "static"):
        run(user / "build" / name, NSA_CUDA_DRIVER="/no/such/driver.so")
