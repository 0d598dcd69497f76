"""Builds ``sae_fast._C``: the CPU kernels, once per instruction set, behind one pybind11 module.

Metadata is in pyproject.toml.  No torch is needed to build: the kernels take raw pointers and sizes.
"""

import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall"]
# Every file in csrc/cpu is compiled once per row of this table, into a namespace of its own; which one runs is
# decided at run time (csrc/bindings.cpp), so one build serves every x86-64 machine.
X86 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2"]
ISAS = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = X86
    ISAS["avx512"] = [
        *X86, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
    ]  # fmt: skip


class BuildPerIsa(build_ext):
    def build_extension(self, ext):
        for isa, flags in ISAS.items():
            ext.extra_objects += self.compiler.compile(
                [str(p) for p in sorted((CSRC / "cpu").glob("*.cpp"))],
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("SAE_FAST_ISA", isa), (f"SAE_FAST_ISA_{isa.upper()}", "1")],
                include_dirs=ext.include_dirs,
                extra_postargs=[*FLAGS, *flags, "-fvisibility=hidden"],
                depends=[str(p) for p in (CSRC / "include" / "sae_fast").glob("*.hpp")],
            )
        super().build_extension(ext)


setup(
    packages=[
        "sae_fast", "sae_fast.ops", "sae_fast.nn", "sae_fast.train", "sae_fast.interop", "sae_fast.analysis",
        "sae_fast.kernels",
    ],
    package_dir={"sae_fast": "sae_fast", "sae_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "sae_fast._C",
            [str(CSRC / "bindings.cpp")],
            include_dirs=[str(CSRC / "include")],
            define_macros=[(f"SAE_FAST_HAS_{isa.upper()}", "1") for isa in ISAS],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            depends=[str(p) for p in CSRC.rglob("*.[ch]pp")],
        )
    ],
    cmdclass={"build_ext": BuildPerIsa},
)  # fmt: skip
