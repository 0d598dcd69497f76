"""Builds the CUDA kernels over the shim as a Python module: ``python build.py FOLDER [--address]``."""

from __future__ import annotations

import fcntl
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
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-ffp-contract=off", "-Wall", "-Werror",
    "-Wno-unknown-pragmas",
    "-DSAE_FAST_SHIM", f"-DSAE_FAST_CUDA_MODULE={NAME}", f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_path('include')}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{HERE}",
]  # fmt: skip
# Unoptimised: to compile them takes longer than to run them.
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-O0"]


def sources() -> list[Path]:
    return [ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def build(folder: Path, flags: list[str] | None = None) -> Path:
    """The module's file, made anew where a source is newer; one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder, FLAGS + (flags or []))


def _build(folder: Path, flags: list[str]) -> Path:
    headers = [*(ROOT / "csrc" / "include").rglob("*"), *HERE.glob("*"), Path(__file__)]
    newest = max(p.stat().st_mtime for p in headers)
    module = folder / f"{NAME}.so"

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            own = ["-O0", "-g0"] if source.suffix == ".cpp" else []  # the bindings: most of the time, none of the work
            part = target.with_suffix(".part")  # an interrupted build leaves nothing that looks done
            subprocess.run(["g++", *flags, *own, "-c", "-x", "c++", str(source), "-o", str(part)], check=True)
            part.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources()))
    if not module.exists() or module.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        subprocess.run(["g++", *flags, "-shared", *map(str, objects), "-o", str(module)], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), ADDRESS if "--address" in sys.argv else []))
