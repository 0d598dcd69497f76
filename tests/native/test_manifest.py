"""The manifest: what the kernels need on the chip, compiled for sm_80 and sm_90; and that what must not ship is seen."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton has no CUDA compiler here")

from sae_fast.kernels import aot, aot_cuda

PLANTED = """
import sys
import torch, triton, triton.language as tl
from sae_fast.kernels import _launch, aot
from sae_fast.kernels.aot_calls import launched_nowhere, meta

@triton.jit
def helper(x):
    return x + 1

@triton.jit
def fine(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, helper(tl.load(x_ptr + at, mask=at < n)), mask=at < n)

@triton.jit
def spills(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x / tl.sum(x))

@triton.jit
def greedy(a_ptr, b_ptr, out_ptr, K, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    total = tl.zeros((M, N), tl.float32)
    for j in range(0, K, D):
        total += tl.dot(tl.load(a_ptr + m[:, None] * K + j + k[None, :]), tl.load(b_ptr + n[None, :] * K + j + k[:, None]))
    tl.store(out_ptr + m[:, None] * N + n[None, :], total)

@triton.jit
def forgotten(x_ptr):
    tl.store(x_ptr, 0.0)

if __name__ == "__main__":
    half = meta(4096, 4096, dtype=torch.float16)
    with _launch.recording() as launches:
        _launch.launch(fine, (1,), meta(64), 50, BLOCK=64, num_warps=1)
        _launch.launch(spills, (1,), meta(16384), BLOCK=16384, num_warps=1)
        _launch.launch(greedy, (1,), half, half, meta(128, 128), 4096, M=128, N=128, D=128, num_warps=8, num_stages=5)
    kernels = {launch.kernel for launch in launches}
    print(*launched_nowhere([sys.modules["__main__"]], kernels), sep="\\n")
    print(*aot.faults(aot.compile_all(aot.variants({80: launches, 90: launches}))), sep="\\n")
"""


def compiled(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Python on these arguments, with Triton as a compiler: in the tests' own process it may be an interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SAE_FAST_TUNING")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=2 * PATIENCE
    )


@pytest.mark.slow
def test_the_kernels_need_what_the_manifest_says():
    found = compiled("-m", "sae_fast.kernels.aot", "--check")
    assert found.returncode == 0, f"{found.stdout}{found.stderr}\nif this is meant: python -m sae_fast.kernels.aot --write"


@pytest.mark.slow
def test_stack_shared_memory_and_forgotten_kernels_are_seen(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    found = compiled(tmp_path / "planted.py")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0] == "__main__.forgotten"
    assert len(lines) == 5, lines
    for target in ("sm_80", "sm_90"):
        assert any(f"greedy {target}" in line and "shared memory is" in line for line in lines), lines
        assert any(f"spills {target}" in line and "uses the stack" in line for line in lines), lines


def test_a_difference_is_shown_line_by_line():
    version, want = aot.read(aot.MANIFEST)
    assert aot.text(want, version) == aot.MANIFEST.read_text()
    assert not aot.differences(want, want)
    got = copy.deepcopy(want)
    name, key = next((n, k) for n, by_key in want.items() for k in by_key)
    got[name][key]["registers"] += 1
    got["new._kernel"] = {"sm_80": want[name][key]}
    lines = aot.differences(got, want)
    assert [line[0] for line in lines] == ["-", "+", "+"]
    assert name in lines[0] and key in lines[0] and "new._kernel" in lines[2]


def test_another_triton_is_held_to_the_limits_only():
    version, want = aot.read(aot.MANIFEST)
    got = {name: {f"{key} new": {**it, "registers": 1} for key, it in by_key.items()} for name, by_key in want.items()}
    assert aot.differences(*aot.comparable(got, want, aot.triton.__version__))
    assert not aot.differences(*aot.comparable(got, want, version + ".1"))
    first = next(iter(got))
    del got[first]
    assert [line[:1] for line in aot.differences(*aot.comparable(got, want, version + ".1"))] == ["-", "-"]


def test_every_limit_is_a_fault():
    fine = {"registers": 255, "shared": 163 * 1024, "spills": 0, "stack": 0}
    assert not aot.faults({"k": {"sm_80": fine, "sm_90": {**fine, "shared": 227 * 1024}}})
    for wrong in ({"shared": 163 * 1024 + 1}, {"spills": 1}, {"stack": 8}):
        assert len(aot.faults({"k": {"sm_80": {**fine, **wrong}}})) == 1


def test_interpreted_kernels_are_refused():
    command = [sys.executable, "-m", "sae_fast.kernels.aot", "--check"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert found.returncode == 2
    assert "TRITON_INTERPRET" in found.stderr


# ---- The CUDA kernels -----------------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(aot_cuda.nvcc() is None, reason="there is no nvcc")

PLANTED_CUDA = """
#include "sae_fast/cuda/device.cuh"
namespace sae_fast { namespace gpu {
struct Some { float* x; int n; static constexpr size_t kShared = 170000; };
template <class T> struct Small { T* x; int n; };

template <class T> __global__ void fine_kernel(Small<T> a) { a.x[threadIdx.x] = from_float<T>(a.n); }
template __global__ void fine_kernel<Half>(Small<Half>);
__global__ void greedy_kernel(const Some a) { a.x[threadIdx.x] = reinterpret_cast<float*>(shared())[a.n]; }
template <bool B> __global__ void stack_kernel(const Small<float> a) {
  float array[32] = {};  // of places that are known at run time only: in memory, not in registers
  for (int k = 0; k < a.n; ++k) array[k * 7 & 31] += a.x[k];
  for (int k = 0; k < 32; ++k) a.x[k] = array[k];
}
template __global__ void stack_kernel<true>(const Small<float>);
} }
"""


@needs_nvcc
def test_stack_and_shared_memory_of_cuda_kernels_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_cuda, "CACHE", tmp_path / "cache")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "planted.cu").write_text(PLANTED_CUDA)
    (tmp_path / "include").symlink_to(aot_cuda.ROOT / "csrc" / "include")
    found = aot_cuda.compile_all(tmp_path)
    name = "csrc/cuda/planted.cu"
    assert set(found) == {f"{name} fine_kernel<float16>", f"{name} greedy_kernel", f"{name} stack_kernel<true>"}
    keys = {f"{target} nvcc={aot_cuda.version()}" for target in ("sm_80", "sm_90a")}
    assert all(set(by_key) == keys for by_key in found.values())
    assert {it["shared"] for it in found[f"{name} greedy_kernel"].values()} == {170000}
    assert {it["shared"] for it in found[f"{name} fine_kernel<float16>"].values()} == {0}
    lines = aot.faults(found)
    assert len(lines) == 3, lines
    assert sum("stack_kernel<true> sm_" in line and "uses the stack: 128 bytes, " in line for line in lines) == 2
    assert sum("greedy_kernel sm_80" in line and "shared memory is 170000" in line for line in lines) == 1
    monkeypatch.setattr(aot_cuda, "_read", None)  # a second time nothing is compiled
    assert aot_cuda.compile_all(tmp_path) == found


@needs_nvcc
def test_a_cuda_source_that_does_not_compile_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_cuda, "CACHE", tmp_path / "cache")
    (tmp_path / "broken.cu").write_text("__global__ void f() { nothing(); }")
    with pytest.raises(RuntimeError, match=r"nvcc: .*broken.cu.*nothing"):
        aot_cuda.needs(tmp_path / "broken.cu", "sm_80", tmp_path)


def test_another_release_of_cuda_is_held_to_the_limits_only(monkeypatch):
    monkeypatch.setattr(aot_cuda, "version", lambda: "13.0.88")
    it = {"registers": 40, "shared": 0, "spills": 0, "stack": 0}
    got = {"csrc/cuda/a.cu k": {"sm_80 nvcc=13.0.88": it, "sm_90a nvcc=13.0.88": it}}
    same = {"csrc/cuda/a.cu k": {key: {**it, "registers": 41} for key in got["csrc/cuda/a.cu k"]}}
    other = {"csrc/cuda/a.cu k": {key.replace("13.0", "12.4"): {**it, "registers": 41} for key in same["csrc/cuda/a.cu k"]}}
    assert len(aot.differences(*aot_cuda.comparable(got, same))) == 4
    assert not aot.differences(*aot_cuda.comparable(got, other))
    assert len(aot.differences(*aot_cuda.comparable({**got, "csrc/cuda/a.cu l": {"sm_80 nvcc=13.0.88": it}}, other))) == 1
    assert aot_cuda.split({"round._round": {"sm_80": it}, **got}) == ({"round._round": {"sm_80": it}}, got)


def test_without_nvcc_nothing_is_dropped_from_the_manifest(tmp_path):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(aot.text({"csrc/cuda/a.cu k": {"sm_80 nvcc=1": {"registers": 1}}}, "3.6.0"))
    before = manifest.read_text()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "sae_fast.kernels.aot", "--write", "--manifest", manifest]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 2 and "no nvcc: writing would drop the 1 CUDA kernels" in found.stderr
    assert manifest.read_text() == before
