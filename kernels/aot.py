"""The manifest: what every kernel needs on the chip, compiled for every GPU generation on a machine without a GPU.

    python -m sae_fast.kernels.aot --check | --write

Every launcher is called on tensors without memory (aot_calls.py); what it would have launched is specialised by Triton's
own binder, as it would be at run time, and compiled.  A variant is compiled once, whatever the sizes it comes from.  A
kernel that uses the stack, spills, or asks for more shared memory than an SM has, does not ship, whatever the Triton; any
other change of its needs is a line in manifest.json, for the Triton that it names.  The CUDA kernels are in it too, where
there is an nvcc (aot_cuda.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from sae_fast.kernels import _launch, aot_calls, aot_cuda
from sae_fast.kernels._generations import GENERATIONS

MANIFEST = Path(__file__).with_name("manifest.json")
Needs = dict[str, int]  # registers and stack of a thread, spills (local loads and stores), shared memory of a program
Manifest = dict[str, dict[str, Needs]]  # by kernel and variant


# ---- Compilation ----------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A kernel, specialised: what Triton compiles and caches once."""

    fn: JITFunction
    target: GPUTarget
    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Target, what is unusual about the arguments, constexprs, options: unique for a kernel."""
        usual = ("*fp32", "*i32", "*i64", "i32", "fp32")  # and divisible by 16
        words = [f"sm_{self.target.arch}"]
        for n, (name, kind) in enumerate(self.source.signature.items()):
            aligned = bool(self.source.attrs.get((n,)))
            if kind == "constexpr":
                value = self.source.constants[n,]
                words.append(f"{name}={getattr(value, 'value', value)}")
            elif isinstance(kind, tuple) or kind not in usual:
                words.append(f"{name}:{kind}")
            if isinstance(kind, str) and kind[0] in "*i" and not aligned and kind != "i1":
                words.append(f"{name}:any")  # not divisible by 16
        shipped = {"warps": self.options["num_warps"], "stages": self.options["num_stages"]}
        if self.options["num_ctas"] != 1:
            shipped["ctas"] = self.options["num_ctas"]
        return " ".join([*words, *(f"{name}={value}" for name, value in shipped.items())])


def variant(launch: _launch.Launch, arch: int) -> Variant:
    """The specialisation that Triton's run-time launcher would make of this launch."""
    fn, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = CUDABackend(target)
    keywords = {**launch.options, "debug": False, "instrumentation_mode": ""}
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = binder(*launch.arguments, **keywords)
    pack = fn._pack_args if hasattr(fn, "_pack_args") else partial(_pack_args, fn)
    options, signature, constants, attributes = pack(backend, keywords, bound, specialization, options)
    return Variant(fn, target, ASTSource(fn, signature, constants, attributes), options.__dict__)


def _pack_args(fn: JITFunction, backend: CUDABackend, keywords: dict, bound: dict, specialization: list, _: Any) -> tuple:
    """Triton's own of a later release than 3.4, where it is a part of JITFunction.run."""
    kinds, details = zip(*specialization, strict=True)
    values, parsed = list(bound.values()), backend.parse_attr
    constants = {
        path: get_iterable_path(values, path) for path in find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    }
    attributes = find_paths_if(details, lambda _, detail: isinstance(detail, str))
    return (
        backend.parse_options(keywords), dict(zip((p.name for p in fn.params), kinds, strict=True)),
        constants,
        {path: parsed(get_iterable_path(details, path)) for path in attributes},
    )  # fmt: skip


def needs(it: Variant) -> Needs:
    """Compiles, or finds it in Triton's cache; what the binary itself says."""
    compiled = triton.compile(it.source, target=it.target, options=it.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if len(found) != 1:
            raise RuntimeError(f"cuobjdump: got {usage!r}, want the resources of one kernel")
        registers, stack, local = map(int, found[0])
        # Disassembly is slow, and what has no stack has nowhere to spill to.
        assembly = tool("nvdisasm", "-c", file.name) if stack + local else ""
    spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return {"registers": registers, "shared": compiled.metadata.shared, "spills": spills, "stack": stack + local}


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def variants(launches: dict[int, list[_launch.Launch]]) -> dict[tuple[str, str], Variant]:
    """The distinct variants of launches by target, by kernel and key."""
    found: dict[tuple[str, str], Variant] = {}
    for arch, of_target in launches.items():
        for launch in of_target:
            new = variant(launch, arch)
            place = f"{new.fn.__module__.rpartition('.')[2]}.{new.fn.__name__}", new.key
            old = found.setdefault(place, new)
            if old.source.hash() != new.source.hash():
                raise RuntimeError(f"{place}: got two variants with one key, want a key that tells them apart")
    return found


_work: list[Variant] = []  # of the workers, who inherit it: kernels cannot be pickled


def _needs(index: int) -> Needs:
    return needs(_work[index])


def compile_all(found: dict[tuple[str, str], Variant], processes: int = 2) -> Manifest:
    _work[:] = found.values()
    with get_context("fork").Pool(processes) as pool:
        results = pool.map(_needs, range(len(_work)), chunksize=1)
    manifest: Manifest = {}
    for (name, key), result in sorted(zip(found, results, strict=True), key=lambda item: item[0]):
        manifest.setdefault(name, {})[key] = result
    return manifest


# ---- The check ------------------------------------------------------------------------------------------------------


def faults(manifest: Manifest) -> list[str]:
    """The kernels that must not ship, and why."""
    found = []
    for name, by_key in manifest.items():
        for key, it in by_key.items():
            limit = GENERATIONS[int(re.match(r"sm_(\d+)", key)[1])].shared
            if it["stack"] or it["spills"]:
                found.append(f"{name} {key}: uses the stack: {it['stack']} bytes, {it['spills']} instructions")
            if it["shared"] > limit:
                found.append(f"{name} {key}: shared memory is {it['shared']}, want at most {limit} bytes")
    return found


def differences(got: Manifest, want: Manifest) -> list[str]:
    """Line by line, as a diff."""
    lines = []
    flat = [{(name, key): it for name, by_key in m.items() for key, it in by_key.items()} for m in (want, got)]
    for place in sorted(flat[0].keys() | flat[1].keys()):
        old, new = (side.get(place) for side in flat)
        if old != new:
            lines += [f"{sign} {' '.join(place)}: {it}" for sign, it in (("-", old), ("+", new)) if it is not None]
    return lines


def read(path: Path) -> tuple[str, Manifest]:
    """The Triton that a manifest was written with, and the manifest."""
    known = json.loads(path.read_text(encoding="utf-8"))
    return known.pop("triton"), known


def comparable(got: Manifest, want: Manifest, version: str) -> tuple[Manifest, Manifest]:
    """Both, without the needs where ``want`` is of another Triton: then the kernels have to be the same, and no more."""
    if version == triton.__version__:
        return got, want
    return aot_cuda.kernels_only(got), aot_cuda.kernels_only(want)


def text(manifest: Manifest, version: str) -> str:
    """JSON, a line a variant."""
    lines = [f'  "triton": {json.dumps(version)}']
    for name, by_key in sorted(manifest.items()):
        inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(it)}" for key, it in sorted(by_key.items()))
        lines.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sae_fast.kernels.aot", description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help=f"write {MANIFEST.name}")
    action.add_argument("--check", action="store_true", help="compare with it; exit 1 on any difference")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="another file")
    given = parser.parse_args(arguments)
    if _launch.INTERPRETED:
        print("TRITON_INTERPRET: got 1, want it unset: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    os.environ.pop("SAE_FAST_TUNING", None)  # what ships is checked
    version, known = read(given.manifest) if given.manifest.exists() else (triton.__version__, {})
    want, cuda_want = aot_cuda.split(known)
    if aot_cuda.nvcc() is None:
        if given.write and cuda_want:
            print(
                f"no nvcc: writing would drop the {len(cuda_want)} CUDA kernels of {given.manifest.name}", file=sys.stderr
            )
            return 2
        print("no nvcc: the CUDA kernels are left out")

    launches = {arch: list(aot_calls.calls(arch)) for arch in GENERATIONS}
    bad = [
        f"{name}: is in no call of aot_calls.CALLS"
        for name in aot_calls.launched_nowhere(
            aot_calls.all_modules(), {launch.kernel for of in launches.values() for launch in of}
        )
    ]
    got = compile_all(variants(launches))
    cuda = aot_cuda.compile_all() if aot_cuda.nvcc() else {}
    bad += faults(got | cuda)
    if given.write:
        given.manifest.write_text(text(got | cuda, triton.__version__), encoding="utf-8")
    else:
        if version != triton.__version__:
            print(f"{given.manifest.name} is of Triton {version}, this is {triton.__version__}: held to the limits only")
        bad += differences(*comparable(got, want, version))
        bad += differences(*aot_cuda.comparable(cuda, cuda_want)) if aot_cuda.nvcc() else []
    count = sum(map(len, (got | cuda).values()))
    print("\n".join([*bad, f"{count} variants of {len(got | cuda)} kernels, {len(bad)} lines of complaint"]))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
