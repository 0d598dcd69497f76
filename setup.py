"""Builds ``sae_fast._C``: the CPU kernels, once per instruction set, behind one pybind11 module; and, where it is asked for
or a GPU is there, ``sae_fast._C_cuda``: the CUDA kernels.

Metadata is in pyproject.toml.  No torch is needed to build: the kernels take raw pointers and sizes.
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall"]
# Every file in csrc/cpu is compiled once per row of this table, into a namespace of its own; which one runs is
# decided at run time (csrc/bindings.cpp), so one build serves every x86-64 machine.  The compiler says which rows it can
# build: it may be for another machine than this one.
X86 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2"]
ISAS = {
    "plain": [],
    "avx2": X86,
    "avx512": [*X86, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
WANTED = (
    "want a C++17 compiler and Python's headers (Debian, Ubuntu: apt install g++ python3-dev; Fedora: dnf install gcc-c++ "
    "python3-devel; macOS: xcode-select --install); CXX names another compiler"
)

# ---- CUDA: releases 12 and 13.  SAE_FAST_CUDA=1 asks for it, SAE_FAST_CUDA=0 forbids it. -------------------------------

NVCC_FLAGS = [
    "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CSRC / 'include'}",
    f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
]  # fmt: skip
# The runtime goes into the module, out of sight of torch's own: any torch, or none, may be in the process.
NVCC_LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]


def gencode():
    generations = runpy.run_path("kernels/_generations.py")["GENERATIONS"]
    return [word for it in generations.values() for code in it.code for word in ("-gencode", code)]


def find_nvcc():
    """CUDA_HOME's, if that is set; else the one on the PATH, or in the usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if (found := shutil.which(place))), None)


def has_gpu():
    if Path("/dev/nvidia0").exists():
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and bool(listed.stdout.strip())


def cuda_extensions():
    wish = os.environ.get("SAE_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SAE_FAST_CUDA: got {wish!r}, want 0, 1 or nothing")
    if wish == "0" or (not wish and not has_gpu()):
        return []
    if find_nvcc() is None:
        if wish:
            raise SystemExit("SAE_FAST_CUDA=1: no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda")
        print("no nvcc: the GPU ops run on their Triton kernels", file=sys.stderr)
        return []
    sources = [CSRC / "bindings_cuda.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    headers = [*(CSRC / "include").rglob("*.*"), Path("setup.py"), Path("kernels/_generations.py")]
    return [Extension("sae_fast._C_cuda", list(map(str, sources)), depends=list(map(str, headers)))]


class ExtensionsFirst(build):
    """What fails for want of a compiler says so before anything is copied."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class Build(build_ext):
    def build_extension(self, ext):
        if ext.name == "sae_fast._C_cuda":
            return self.build_cuda(ext)
        openmp, isas = self.choose()
        ext.define_macros = [(f"SAE_FAST_HAS_{isa.upper()}", "1") for isa in isas]
        ext.extra_compile_args += [*FLAGS, *openmp]
        ext.extra_link_args += openmp
        for isa in isas:
            ext.extra_objects += self.compiler.compile(
                [str(p) for p in sorted((CSRC / "cpu").glob("*.cpp"))],
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("SAE_FAST_ISA", isa), (f"SAE_FAST_ISA_{isa.upper()}", "1")],
                include_dirs=ext.include_dirs,
                extra_postargs=[*FLAGS, *openmp, *ISAS[isa], "-fvisibility=hidden"],
                depends=[str(p) for p in (CSRC / "include" / "sae_fast").glob("*.[hd]*")],
            )
        super().build_extension(ext)

    def choose(self):
        """The flag for OpenMP and the instruction sets that the compiler can build."""
        complaint = self.complaint("#include <vector>\n#include <Python.h>", *FLAGS)
        if complaint:
            raise SystemExit(f"error: the CPU kernels cannot be built: {complaint}; {WANTED}")
        openmp = ["-fopenmp"]
        if self.complaint("#include <omp.h>", *openmp):
            openmp = [flag for flag in ["-fopenmp-simd"] if not self.complaint("", flag)]
            print("this compiler has no OpenMP: the CPU kernels will run on one thread", file=sys.stderr)
        isas = [isa for isa, flags in ISAS.items() if not (flags and self.complaint("#include <immintrin.h>", *flags))]
        return openmp, isas

    def complaint(self, source, *flags):
        """What the compiler says against this source, in a line, or None."""
        command = getattr(self.compiler, "compiler_so_cxx", None)
        if command is None:
            return f"got the compiler {self.compiler.compiler_type}, want g++ or clang++"
        command = [*command, *(f"-I{folder}" for folder in self.include_dirs), *flags, "-fsyntax-only", "-x", "c++", "-"]
        try:
            done = subprocess.run(command, input=source, capture_output=True, text=True)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [command[0]]
        return lines[0].strip() if done.returncode else None

    def build_cuda(self, ext):
        """With nvcc alone, file beside file; what is newer than its sources stays."""
        nvcc, folder = find_nvcc(), Path(self.build_temp) / "cuda"
        target = Path(self.get_ext_fullpath(ext.name))
        for parent in (folder, target.parent):
            parent.mkdir(parents=True, exist_ok=True)
        changed, targets = max(os.path.getmtime(p) for p in ext.depends), gencode()

        def run(*command):
            print(" ".join(command), flush=True)  # one piece: others print too
            if subprocess.run(command).returncode:
                raise SystemExit(f"nvcc failed on {command[-1]}")

        def compile(source):
            to = folder / f"{Path(source).stem}.o"
            if self.force or not to.exists() or to.stat().st_mtime < max(changed, os.path.getmtime(source)):
                # A name of its own until it is whole: an interrupted build leaves nothing that looks done.
                run(nvcc, *targets, *NVCC_FLAGS, "-o", f"{to}.part", "-c", source)
                os.replace(f"{to}.part", to)
            return str(to)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile, ext.sources))
        run(nvcc, *targets, *NVCC_LINK, *objects, "-o", str(target))


if __name__ == "__main__":
    setup(
        packages=sorted({*find_packages(include=["sae_fast", "sae_fast.*"]), "sae_fast.kernels"}),
        package_dir={"sae_fast": "sae_fast", "sae_fast.kernels": "kernels"},
        package_data={"": ["py.typed", "*.json", "web/*"]},
        ext_modules=[
            Pybind11Extension(
                "sae_fast._C",
                [str(CSRC / "bindings.cpp")],
                include_dirs=[str(CSRC / "include")],
                depends=[str(p) for p in CSRC.rglob("*.*")],
            ),
            *cuda_extensions(),
        ],
        cmdclass={"build": ExtensionsFirst, "build_ext": Build},
    )
