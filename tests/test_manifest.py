"""The manifest: what the kernels need on the chip, compiled for sm_80 and sm_90; and that what must not ship is seen."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton has no CUDA compiler here")

from sae_fast.kernels import aot

PLANTED = """
import sys
import torch, triton, triton.language as tl
from sae_fast.kernels import _launch, aot

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
    half = aot.meta(4096, 4096, dtype=torch.float16)
    with _launch.recording() as launches:
        _launch.launch(fine, (1,), aot.meta(64), 50, BLOCK=64, num_warps=1)
        _launch.launch(spills, (1,), aot.meta(16384), BLOCK=16384, num_warps=1)
        _launch.launch(greedy, (1,), half, half, aot.meta(128, 128), 4096, M=128, N=128, D=128, num_warps=8, num_stages=5)
    kernels = {launch.kernel for launch in launches}
    print(*aot.launched_nowhere([sys.modules["__main__"]], kernels), sep="\\n")
    print(*aot.faults(aot.compile_all(aot.variants({80: launches, 90: launches}))), sep="\\n")
"""


def compiled(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Python on these arguments, with Triton as a compiler: in the tests' own process it may be an interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SAE_FAST_TUNING")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=900)


def test_the_kernels_need_what_the_manifest_says():
    found = compiled("-m", "sae_fast.kernels.aot", "--check")
    assert found.returncode == 0, f"{found.stdout}{found.stderr}\nif this is meant: python -m sae_fast.kernels.aot --write"


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
    want = json.loads(aot.MANIFEST.read_text())
    assert aot.text(want) == aot.MANIFEST.read_text()
    assert not aot.differences(want, want)
    got = copy.deepcopy(want)
    name, key = next((n, k) for n, by_key in want.items() for k in by_key)
    got[name][key]["registers"] += 1
    got["new._kernel"] = {"sm_80": want[name][key]}
    lines = aot.differences(got, want)
    assert [line[0] for line in lines] == ["-", "+", "+"]
    assert name in lines[0] and key in lines[0] and "new._kernel" in lines[2]


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
