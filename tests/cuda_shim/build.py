"""Builds the CUDA kernels over the shim as a Python module: ``python build.py FOLDER [--address]``."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "_C_cuda_shim"
FLAGS = [
    "-std=c++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", "-ffp-contract=off", "-Wall", "-Werror",
    "-Wno-unknown-pragmas",
    "-DSAE_FAST_SHIM", f"-DSAE_FAST_CUDA_MODULE={NAME}", f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_path('include')}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{HERE}",
]  # fmt: skip
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]


def sources() -> list[Path]:
    return [ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def build(folder: Path, flags: list[str] | None = None) -> Path:
    """The module's file, made anew where a source is newer."""
    flags = FLAGS + (flags or [])
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc" / "include").rglob("*"), *HERE.glob("*"), Path(__file__)]
    newest = max(p.stat().st_mtime for p in headers)
    module = folder / f"{NAME}.so"

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run(["g++", *flags, "-c", "-x", "c++", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources()))
    if not module.exists() or module.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        subprocess.run(["g++", *flags, "-shared", *map(str, objects), "-o", str(module)], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), ADDRESS if "--address" in sys.argv else []))
