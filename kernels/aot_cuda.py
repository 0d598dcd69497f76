"""The CUDA kernels' part of the manifest (aot.py): csrc/cuda/*.cu, compiled for each generation where there is an nvcc.

A kernel's shared memory is its own and what it is launched with: the constant ``kShared`` of the struct that it takes,
where there is one; what hangs on sizes (verify's row, a unit row's sums) is not counted.  Registers differ from one release
of CUDA to the next, so an entry names its nvcc, and another's are held to the limits only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import triton

from sae_fast.kernels._generations import GENERATIONS

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cubin"
RESERVED = {it.target: it.reserved for it in GENERATIONS.values()}
FLAGS = ["-std=c++17", "-O3"]  # of setup.py
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PREFIX = "csrc/cuda/"  # of the entries' names
Needs = dict[str, int]
Manifest = dict[str, dict[str, Needs]]


@cache
def nvcc() -> str | None:
    """CUDA_HOME's, if that is set; else the one on the PATH, or in the usual place: as setup.py."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if (found := shutil.which(place))), None)


@cache
def version() -> str:
    found = re.search(r"\bV(\d+\.\d+\.\d+)", _run(str(nvcc()), "--version"))
    return found[1] if found else "unknown"


def _run(*command: str | Path, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def compile_all(csrc: Path = ROOT / "csrc", processes: int = 2) -> Manifest:
    """The needs of each kernel of csrc/cuda, by target."""
    places = [(source, target) for source in sorted((csrc / "cuda").glob("*.cu")) for target in RESERVED]
    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(lambda place: needs(*place, csrc / "include"), places))
    manifest: Manifest = {}
    for (source, target), found in zip(places, results, strict=True):
        for kernel, it in found.items():
            manifest.setdefault(f"{PREFIX}{source.name} {kernel}", {})[f"{target} nvcc={version()}"] = it
    return manifest


def needs(source: Path, target: str, include: Path) -> dict[str, Needs]:
    """The needs by kernel; what has been compiled before is not compiled again."""
    headers = sorted((include / "sae_fast" / "cuda").glob("*"))
    parts = [p.name.encode() + b"\0" + p.read_bytes() for p in (source, Path(__file__), *headers)]
    key = hashlib.sha256(b"\0".join([f"{version()} {target}".encode(), *parts])).hexdigest()[:24]
    known = CACHE / f"{source.stem}_{target}_{key}.json"
    if not known.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        cubin = known.with_suffix(f".{os.getpid()}.cubin")
        try:
            _run(str(nvcc()), *FLAGS, f"-I{include}", "-cubin", f"-arch={target}", source, "-o", cubin)
            found = _read(cubin)
            shared = launched_with(source, include, [arguments for _, arguments, _ in found])
        finally:
            cubin.unlink(missing_ok=True)
        for _, arguments, it in found:
            it["shared"] = max(0, it["shared"] - RESERVED[target]) + shared[arguments]
        part = cubin.with_suffix(".part")
        part.write_text(json.dumps({name: it for name, _, it in found}), encoding="utf-8")
        part.replace(known)
    return json.loads(known.read_text(encoding="utf-8"))


def _read(cubin: Path) -> list[tuple[str, str, Needs]]:
    """(kernel, its arguments' type, what the binary says it needs)."""
    usage = _run(TOOLS / "cuobjdump", "-res-usage", cubin)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = []
    for mangled, *numbers in re.findall(pattern, usage):
        registers, stack, shared, local = map(int, numbers)
        assembly = _run(TOOLS / "nvdisasm", "-c", cubin) if stack + local else ""  # slow; without stack there is no spill
        own = re.search(rf"\.text\.{re.escape(mangled)}:(.*?)(?:\n\.text\.|\Z)", assembly, re.DOTALL)
        spills = len(re.findall(r"\b(?:STL|LDL)\b", own[1] if own else ""))
        it = {"registers": registers, "shared": shared, "spills": spills, "stack": stack + local}
        found.append((*_names(mangled), it))
    if not found:
        raise RuntimeError(f"cuobjdump: got {usage!r}, want the resources of kernels")
    return found


def _names(mangled: str) -> tuple[str, str]:
    """``residuals_kernel<float, float16, 2>`` and ``sae_fast::gpu::Residuals<float, __half>``."""
    whole = _run("c++filt", given=mangled).strip()
    depth, at = 0, len(whole)
    for at in range(len(whole) - 1, -1, -1):  # the bracket that opens the arguments
        depth += {")": 1, "(": -1}.get(whole[at], 0)
        if depth == 0:
            break
    kernel = re.sub(r"^void |sae_fast::gpu::|\(anonymous namespace\)::", "", whole[:at])
    kernel = kernel.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", kernel), whole[at + 1 : -1]


PROBE = """
namespace probe {
template <class T, class = void> struct Ask { static constexpr unsigned long long value = 0; };
template <class T> struct Ask<T, decltype(void(T::kShared))> { static constexpr unsigned long long value = T::kShared; };
}
"""


def launched_with(source: Path, include: Path, types: list[str]) -> dict[str, int]:
    """``kShared`` of the types, 0 where there is none; as constants in PTX, which need no GPU to be read."""
    kinds = sorted(set(types))
    asked = [f"__device__ unsigned long long asked_{n} = probe::Ask<{kind}>::value;" for n, kind in enumerate(kinds)]
    text = "\n".join([f'#include "{source}"', PROBE, 'extern "C" {', *asked, "}"])
    ptx = _run(str(nvcc()), *FLAGS, f"-I{include}", "-ptx", "-arch=sm_80", "-x", "cu", "-", "-o", "/dev/stdout", given=text)
    found = {int(n): int(value or 0) for n, value in re.findall(r"\.u64 asked_(\d+)(?: = (\d+))?;", ptx)}
    return {kind: found[n] for n, kind in enumerate(kinds)}


def comparable(got: Manifest, want: Manifest) -> tuple[Manifest, Manifest]:
    """Both, without the needs where ``want`` is of another nvcc: then the kernels have to be the same, and no more."""
    if all(key.endswith(f"nvcc={version()}") for by_key in want.values() for key in by_key):
        return got, want
    return kernels_only(got), kernels_only(want)


def kernels_only(manifest: Manifest) -> Manifest:
    """Its kernels and targets: what another compiler has to have in common."""
    return {name: {key.split()[0]: {} for key in by_key} for name, by_key in manifest.items()}


def split(manifest: Manifest) -> tuple[Manifest, Manifest]:
    """(Triton's entries, CUDA's)."""
    parts: tuple[Manifest, Manifest] = {}, {}
    for name, by_key in manifest.items():
        parts[name.startswith(PREFIX)][name] = by_key
    return parts
