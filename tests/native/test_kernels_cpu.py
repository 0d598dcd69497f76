"""Build hygiene of the C++ engine: no weak symbols, no torch in the kernels, and the choice of an instruction set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import grid, random_code

from sae_fast import ops
from sae_fast.ops.dispatch import _C

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cpu").glob("*.cpp"))
built = pytest.mark.skipif(_C is None, reason="the extension sae_fast._C is not built")
checkout = pytest.mark.skipif(not SOURCES, reason="csrc/ is not next to tests/")


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, list[str]]:
    """The symbols of each kernel file, compiled as setup.py does for the plain instruction set."""
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("objects")

    def symbols(source: Path) -> list[str]:
        target = folder / f"{source.stem}.o"
        flags = ["-O3", "-fopenmp", "-std=c++17", f"-I{CSRC / 'include'}", "-DSAE_FAST_ISA=plain"]
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return subprocess.run(["nm", str(target)], check=True, capture_output=True, text=True).stdout.splitlines()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((s.stem for s in SOURCES), pool.map(symbols, SOURCES), strict=True))


@checkout
def test_kernels_define_no_weak_symbols(objects):
    """One compiled for AVX-512 could be the copy that the linker keeps for every machine (the rule in cpu.hpp)."""
    assert len(objects) >= 9
    weak = {name: [line for line in lines if re.search(r" [WVu] ", line)] for name, lines in objects.items()}
    assert not any(weak.values()), weak


@checkout
def test_kernels_define_only_their_own_namespace(objects):
    """A strong symbol outside sae_fast::plain would clash between instruction sets."""
    for name, lines in objects.items():
        defined = [line.split()[-1] for line in lines if re.search(r" [TDBRC] ", line)]
        assert defined, name
        assert all("8sae_fast5plain" in symbol for symbol in defined), (name, defined)


@checkout
def test_kernels_and_headers_know_no_torch():
    files = [*SOURCES, *(CSRC / "include").rglob("*.hpp"), *(CSRC / "host").rglob("*.hpp")]
    includes = {f.name: re.findall(r'#include\s*[<"]([^>"]+)', f.read_text()) for f in files}
    assert sum(map(len, includes.values())) > 10
    offenders = {n: bad for n, lines in includes.items()
                 if (bad := [i for i in lines if i.startswith(("torch", "ATen", "c10", "pybind11"))])}  # fmt: skip
    assert not offenders


@checkout
def test_kernel_files_include_no_standard_containers():
    """Inline library code is what makes weak symbols; the compactor, which needs it, is compiled with the bindings."""
    for source in SOURCES:
        includes = re.findall(r"#include\s*<([^>]+)>", source.read_text())
        assert not {"vector", "string", "map", "algorithm", "memory", "functional"} & set(includes), source.name


# ---- Arguments -------------------------------------------------------------------------------------------------------


@built
def test_arguments_are_taken_by_name_in_the_order_of_the_list_and_by_dtype():
    A, rows, norms = torch.ones(3, 5), torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(3, 2, dtype=torch.float64)
    given = {"A": A, "n": 3, "d": 5, "K": 5, "out": rows, "norms": norms, "threads": 1}
    _C.round_rows(**given)
    assert torch.equal(rows.float(), A)

    def refused(error: type[Exception], says: str, **changed: object) -> None:
        with pytest.raises(error, match=says):
            _C.round_rows(**{**given, **changed})

    refused(TypeError, "A: got torch.float64, want torch.float32", A=A.double())
    refused(TypeError, "norms: got torch.float32, want torch.float64", norms=norms.float())
    refused(RuntimeError, "contiguous tensors only: A", A=A.T)
    refused(TypeError, "got more, want an end", more=1)
    for keywords in (dict(reversed(given.items())), {**{"A": A}, "n": 3}):
        with pytest.raises(TypeError, match=r"round_rows: got (threads, want A|an end, want d) here"):
            _C.round_rows(**keywords)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.round_rows(*given.values())


# ---- The instruction set ---------------------------------------------------------------------------------------------

PRINT_ISA = "import torch\nfrom sae_fast import _C\nprint(_C.isa())"


def run(code: str, isa: str | None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "SAE_FAST_CPU_ISA"}
    if isa is not None:
        environment["SAE_FAST_CPU_ISA"] = isa
    root = str(CSRC.parent)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)


# The extension alone, without the package and torch: a process starts in no time.
LOAD = (
    "import importlib.util as u, sys\n"
    f"spec = u.spec_from_file_location('_C', {getattr(_C, '__file__', '')!r})\n"
    "_C = u.module_from_spec(spec); spec.loader.exec_module(_C)\n"
    "print(_C.isa())"
)


@built
def test_the_environment_chooses_the_instruction_set():
    for isa in _C.supported_isas():
        assert run(LOAD, isa).stdout.strip() == isa
    widest = _C.supported_isas()[0]
    assert run(LOAD, None).stdout.strip() == run(LOAD, "").stdout.strip() == widest


@built
def test_an_unknown_instruction_set_is_an_error_that_names_the_variable():
    done = run(LOAD, "avx1024")
    assert done.returncode != 0
    assert "SAE_FAST_CPU_ISA" in done.stderr and "avx1024" in done.stderr and "plain" in done.stderr


@built
def test_the_package_says_so_instead_of_running_slowly():
    """An unknown value must not look like an unbuilt engine, for which the reference would silently serve."""
    done = run("import sae_fast", "avx1024")
    assert done.returncode != 0 and "SAE_FAST_CPU_ISA" in done.stderr


@built
def test_set_isa_switches_and_rejects():
    before = _C.isa()
    for isa in _C.supported_isas():
        _C.set_isa(isa)
        assert _C.isa() == isa
    with pytest.raises(ValueError, match=r"SAE_FAST_CPU_ISA.*got 'sse', this machine has: .*plain"):
        _C.set_isa("sse")
    assert _C.isa() == isa, "a rejected name changes nothing"
    _C.set_isa(before)
    assert _C.supported_isas()[-1] == "plain"


@built
def test_instruction_sets_agree_bit_for_bit_where_arithmetic_is_exact():
    code, W = random_code(57, 100), grid(100, 63, step=0.5, reach=4, seed=1)
    values, A = (code.values > 0.5).float(), grid(57, 63, step=0.5, reach=4, seed=2)
    results = []
    for isa in _C.supported_isas():
        _C.set_isa(isa)
        results.append([ops.decode(code, W, values), ops.sampled_dots(code, A, W),
                        ops.outer(ops.transpose(code), list(values), [A, A])])  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
