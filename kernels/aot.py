"""The manifest: what every kernel needs on the chip, compiled for sm_80 and sm_90 on a machine that need not have a GPU.

    python -m sae_fast.kernels.aot --check | --write

Every launcher is called on tensors without memory, at real sizes and for each storage dtype; what it would have launched
is specialised by Triton's own binder, as it would be at run time, and compiled.  A variant is compiled once, whatever the
sizes it comes from.  A kernel that uses the stack, spills, or asks for more shared memory than an SM has, does not ship,
whatever the Triton; any other change of its needs is a line in manifest.json, for the Triton that it names.  The CUDA
kernels are in it too, where there is an nvcc (aot_cuda.py).

To add an op: one function beside those in CALLS.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from sae_fast.kernels import _config, _launch, aot_cuda

HERE = Path(__file__).parent
MANIFEST = HERE / "manifest.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program can have
Needs = dict[str, int]  # registers and stack of a thread, spills (local loads and stores), shared memory of a program
Manifest = dict[str, dict[str, Needs]]  # by kernel and variant


@dataclass(frozen=True)
class Size:
    """B examples of width d, F features, entries (capacity) of a code; dtype: of x and of the weights' storage."""

    B: int
    d: int
    F: int
    entries: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"B={self.B} d={self.d} F={self.F} {self.dtype}"

    def of(self, *shape: int) -> Tensor:
        return meta(*shape, dtype=self.dtype)

    def x(self) -> Tensor:
        return self.of(self.B, self.d)

    def W(self) -> Tensor:
        return self.of(self.F, self.d)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """begin, end, indices of a code."""
        return integers(self.B), integers(self.B), integers(self.entries, dtype=torch.int32)

    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """colptr, rows, perm of a transposed code."""
        return integers(self.F + 1), integers(self.entries, dtype=torch.int32), integers(self.entries)


SHAPES = ((4096, 768, 24576, 4096 * 64), (8192, 2304, 65536, 8192 * 128), (8192, 4096, 131072, 8192 * 128))
SIZES = [Size(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return meta(*shape, dtype=dtype)


# ---- The calls ------------------------------------------------------------------------------------------------------


def encode(s: Size) -> None:
    from sae_fast.kernels import compact, encode, screen
    from sae_fast.kernels.round import compare_rows, rounded

    x, W, of_feature = s.x(), s.W(), s.of(s.F)
    shadow, flag = rounded(W), integers(dtype=torch.int32)
    gated = encode.Layer(W, *shadow, of_feature, "gated", scale=of_feature, b_mag=of_feature)
    relu = encode.Layer(W, *shadow, of_feature, "relu")
    jumprelu = encode.Layer(W, *shadow, of_feature, "jumprelu", threshold=of_feature, cut=of_feature)
    for flags in (flag, integers(s.F, dtype=torch.int32)):
        compare_rows(W, *shadow, flags)
    encode.candidates(x, gated, True, s.of(s.d), s.x(), flag)  # as a Trainer does
    for layer, exact in ((gated, True), (gated, False), (relu, True), (jumprelu, True)):
        encode.members(x, layer, encode.candidates(x, layer, exact), s.entries, flag, exact)
    begin, end, indices = s.rows()
    values = s.of(2, s.entries)
    packed = integers(s.B + 1), indices, values[0], values, indices, values[0], values  # pack itself waits for their number
    _launch.launch(compact._pack, (s.B,), begin, end, *packed, s.entries, s.entries - 16, V=2, BLOCK=128, num_warps=1)
    mask, terms = integers(s.B, screen.words(s.F), dtype=torch.int32), (meta(3, s.B), meta(3, s.F))
    screen.scan(meta(1024, s.F), 0, *terms, mask)
    if _config.generation() >= 90:
        screen.screen(meta(s.B, shadow[0].shape[1], dtype=torch.float16), shadow[0], *terms, mask, persistent=True)


def decode(s: Size) -> None:
    from sae_fast.kernels.decode import decode

    for V in (1, 2):  # magnitudes; with gates
        decode(*s.rows(), s.of(V, s.entries), s.W(), None, s.of(V, 1, s.B, s.d))
    decode(*s.rows(), s.of(1, s.entries), s.W(), integers(5), s.of(1, 4, s.B, s.d))  # groups: Matryoshka prefixes


def decode_loss(s: Size) -> None:
    from sae_fast.kernels.decode_loss import StepOutputs, decode_loss, scratch

    entries, weight = s.of(s.entries), s.of(s.F)
    for V, scale in ((1, None), (2, weight)):
        step = StepOutputs(entries, scale, entries, meta(s.entries, 4), entries)
        for outputs in (None, step) if s.dtype == torch.float32 else (None,):  # a Trainer's weights are float32
            decode_loss(
                *s.rows(), s.of(V, s.entries), s.W(), s.of(s.d), s.x(), weight, float(s.B), s.of(V, s.B, s.d),
                *scratch(V, s.B, s.d, s.entries, "meta"), meta(s.B, 3), s.of(V, s.entries), outputs,
            )  # fmt: skip


def sampled_dots(s: Size) -> None:
    from sae_fast.kernels.sampled_dots import sampled_dots

    sampled_dots(*s.rows(), s.x(), s.W(), s.of(s.entries))


def transpose(s: Size) -> None:
    from sae_fast.kernels.transpose import scratch, transpose

    transpose(*s.rows(), s.F, *s.by_feature(), *scratch(s.B, s.F, "meta"))


def outer(s: Size) -> None:
    from sae_fast.kernels.outer import outer

    value, A = s.of(s.entries), s.x()
    for sources in (1, 2):
        for accumulate in (False, True):
            outer(*s.by_feature(), [value] * sources, [A] * sources, None, 0, s.W(), accumulate=accumulate)
    outer(*s.by_feature(), [value], [A], integers(4096), 0, s.of(4096, s.d), accumulate=False)  # touched rows
    if s.dtype == torch.float32:  # a Trainer's sums of entries
        colptr, rows, perm = s.by_feature()
        outer(colptr, rows, perm, [value], [meta(s.entries, 4)], None, 0, meta(s.F, 4), accumulate=False)


def grad_sqnorm(s: Size) -> None:
    from sae_fast.kernels.grad_sqnorm import grad_sqnorm, slices

    for projects, own in ((False, None), (True, None), (False, s.of(s.F))):
        out = meta(s.F, slices(s.d, projects), dtype=torch.float64)
        grad_sqnorm(*s.by_feature(), [s.of(s.entries)], [s.x()], own, 0, s.W(), projects, out)


def weight_step(s: Size) -> None:
    from sae_fast.kernels.round import rounded
    from sae_fast.kernels.weight_step import new_adam, row_step, set_adam, weight_step

    if s.dtype != torch.float32:
        return
    adam, W, last_step, skip = new_adam("meta"), s.W(), integers(s.F), integers(dtype=torch.int32)
    set_adam(adam, 1000, 3e-4, 0.999, 1e-8)
    state, value, vector = (W, s.W(), last_step), meta(s.entries), (meta(s.F, 1), meta(s.F, 1), last_step)
    for unit_rows, shadow in ((True, None), (False, rounded(W)), (False, None)):
        weight_step(*state, *s.by_feature(), [value], [s.x()], None, 0, adam, unit_rows, meta(), skip, shadow)
        weight_step(*state, *s.by_feature(), [value], [s.x()], None, 0, adam, unit_rows, None, skip, shadow)
        row_step(*state, s.W(), adam, unit_rows, None, skip, shadow)
    own = meta(s.F)  # of the saelens dialect
    weight_step(*state, *s.by_feature(), [value] * 2, [s.x()] * 2, own, 0, adam, False, None, skip)
    row_step(*vector, meta(s.F, 1), adam, False, None, skip, colptr=s.by_feature()[0])


CALLS: list[Callable[[Size], None]] = [
    encode, decode, decode_loss, sampled_dots, transpose, outer, grad_sqnorm, weight_step,
]  # fmt: skip


def calls(target: int) -> Iterator[_launch.Launch]:
    """What the launchers launch on a GPU of that generation, 80 or 90."""
    outer, _config._target = _config._target, target
    try:
        for size in SIZES:
            for call in CALLS:
                with _launch.recording() as launches:
                    call(size)
                yield from launches
    finally:
        _config._target = outer


def launched_nowhere(modules: list[ModuleType], launched: set[JITFunction]) -> list[str]:
    """Kernels defined in these modules that are in no call, neither by themselves nor as a part of one that is."""
    known, todo = set(), list(launched)
    while todo:
        fn = todo.pop()
        if fn in known:
            continue
        known.add(fn)
        names = {node.id for node in ast.walk(fn.parse()) if isinstance(node, ast.Name)}
        todo += [value for name in names if isinstance(value := fn.__globals__.get(name), JITFunction)]
    defined = [
        fn for m in modules for fn in vars(m).values() if isinstance(fn, JITFunction) and fn.__module__ == m.__name__
    ]
    return sorted(f"{fn.__module__}.{fn.__name__}" for fn in defined if fn not in known)


def all_modules() -> list[ModuleType]:
    """Every module beside this one."""
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "aot", "aot_cuda"))
    return [importlib.import_module(f"{__package__}.{name}") for name in names]


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
        usage = _tool("cuobjdump", "-res-usage", file.name)
        found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if len(found) != 1:
            raise RuntimeError(f"cuobjdump: got {usage!r}, want the resources of one kernel")
        registers, stack, local = map(int, found[0])
        # Disassembly is slow, and what has no stack has nowhere to spill to.
        assembly = _tool("nvdisasm", "-c", file.name) if stack + local else ""
    spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return {"registers": registers, "shared": compiled.metadata.shared, "spills": spills, "stack": stack + local}


def _tool(name: str, *arguments: str) -> str:
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
    """What must not ship."""
    found = []
    for name, by_key in manifest.items():
        for key, it in by_key.items():
            limit = SHARED_LIMIT[int(key[3:5])]
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

    launches = {arch: list(calls(arch)) for arch in SHARED_LIMIT}
    bad = [
        f"{name}: is in no call of aot.CALLS"
        for name in launched_nowhere(all_modules(), {launch.kernel for of in launches.values() for launch in of})
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
