"""The shim that runs CUDA kernels on a CPU: it sees what is wrong, in kernels of its own and in faulty copies of ours."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from cuda_shim.build import ADDRESS, FLAGS, HERE, ROOT, build, sources

SCHEDULES = ("ascending", "descending", "shuffled", "warps_ascending", "warps_descending")


def libasan() -> str | None:
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() else None


needs_libasan = pytest.mark.skipif(libasan() is None, reason="g++ has no libasan")


def with_asan() -> dict[str, str]:
    return {"LD_PRELOAD": str(libasan()), "ASAN_OPTIONS": "detect_leaks=0", "SAE_FAST_SHIM_ADDRESS": "1"}


# ---- Kernels of its own -----------------------------------------------------------------------------------------------


@cache
def trials(address: bool = False) -> Path:
    source = HERE / "trials.cpp"
    flags = [*FLAGS, "-O0", "-shared", *(ADDRESS if address else [])]
    return made(f"trials{address}", flags, source, lambda to: ["g++", *flags, str(source), "-o", to])


def made(name: str, flags: list[str], source: Path, command, *parts: bytes) -> Path:
    """The file that a command makes, kept by what it is made of."""
    given = [*map(str.encode, flags), source.read_bytes(), *parts]
    given += [p.read_bytes() for p in sorted([*(ROOT / "csrc/include/sae_fast/cuda").glob("*"), *HERE.glob("*.[hp]*")])]
    to = ROOT / "build" / "cuda_faults" / f"{name}_{hashlib.sha256(b'|'.join(given)).hexdigest()[:16]}.so"
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        for old in to.parent.glob(f"{name}_*"):
            old.unlink()
        part = to.with_suffix(f".{os.getpid()}")
        subprocess.run(command(str(part)), check=True)
        part.replace(to)
    return to


def trial(name: str, schedule: int = 0) -> tuple[str, torch.Tensor]:
    """(what the shim says, the result)."""
    library = ctypes.CDLL(str(trials()))
    library.trial.restype = ctypes.c_char_p
    given, out = torch.arange(128.0) * 1.5, torch.full((128,), -7.0)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (given, out))
    return library.trial(name.encode(), schedule, *pointers).decode(), out


INPUT = torch.arange(128.0) * 1.5
SOME = INPUT.view(4, 32)
VOTES = [float(sum(1 << k for k in range(32) if (32 * warp + k) % 3 == 0)) for warp in range(4)]
RIGHT = {
    "neighbours": INPUT.roll(-1),
    "reduction": SOME.sum(1, keepdim=True).expand(4, 32).flatten(),
    "votes": torch.tensor(VOTES).repeat_interleave(32),
    "some_lanes": torch.where(torch.arange(32) < 16, SOME[:, 3:4], -7.0).flatten(),
    "copied": torch.where(torch.arange(128) % 4 < 2, INPUT, 0.0),  # 8 bytes of 16, then zeros
}  # fmt: skip


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)), ids=SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_runs(name, schedule):
    said, out = trial(name, schedule)
    assert said == "" and torch.equal(out, RIGHT[name])


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("skipped_barrier", "returned before a barrier"),
        ("returned_before_barrier", "returned before a barrier"),
        ("different_barriers", "wait at different barriers"),
        ("deadlock", "deadlock"),
        ("lane_outside_the_mask", "reads a lane that does not take part"),
        ("lane_not_in_its_own_mask", "is not in the mask that it names"),
        ("divergent_shuffle", "waits for a lane that has returned"),
        ("shuffles_at_different_lines", "lanes of a warp meet at different lines"),
        ("misaligned_copy", "not of 16 aligned bytes"),
    ],
)
def test_what_waits_in_vain_or_copies_amiss_is_an_error(name, says, schedule):
    assert says in trial(name, schedule)[0]


def test_a_missing_barrier_shows_under_some_schedule():
    results = [trial("missing_barrier", k)[1] for k in range(len(SCHEDULES))]
    assert any(not torch.equal(r.nan_to_num(-1), results[0].nan_to_num(-1)) for r in results[1:])
    assert any(bool(r.isnan().any()) for r in results)
    assert any(bool(trial("another_s_copy", k)[1].isnan().any()) for k in range(len(SCHEDULES)))


@pytest.mark.parametrize("name", ["not_waited_for", "not_committed", "fresh_memory"])
def test_what_has_not_come_yet_is_nan(name):
    said, out = trial(name)
    assert said == "" and bool(out.isnan().all())


@pytest.mark.slow
@needs_libasan
def test_the_sanitizer_knows_where_shared_memory_ends():
    code = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).trial; f.restype = ctypes.c_char_p;"
        "b = (ctypes.c_float * 128)(); print(f(sys.argv[2].encode(), 0, b, b))"
    )
    for name in ("neighbours", "past_shared_memory"):
        command = [sys.executable, "-c", code, str(trials(True)), name]
        found = subprocess.run(command, env={**os.environ, **with_asan()}, capture_output=True, text=True)
        assert (found.returncode == 0) == (name == "neighbours"), found.stderr
        assert ("heap-buffer-overflow" in found.stderr) == (name != "neighbours")


# ---- Faulty copies of ours --------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """``pattern`` of a header (its ``nth`` match) replaced; the scenario sees ``says``, by the sanitizer if ``address``."""

    name: str
    scenario: str
    header: str
    pattern: str
    replacement: str
    says: str = ""
    nth: int = 0
    address: bool = False


BARRIER = r"__syncthreads\(\);"
FAULTS = [
    Fault("no barrier after staging", "decode_loss", "decode_loss", rf"(wait<0>\(\);\s*){BARRIER}", r"\1"),
    Fault("no barrier before staging again", "decode_loss", "decode_loss", rf"if \(first != begin\) {BARRIER}", ""),
    Fault("no barrier before reading again", "decode_loss", "decode_loss", rf"{BARRIER}(\s*stage\(first, n\);)", r"\1",
          nth=1),
    Fault("no barrier before the dots", "decode_loss", "decode_loss", rf"{BARRIER}(\s*if \(thread < V\))", r"\1"),
    Fault("no wait", "decode_loss", "decode_loss", r"wait<0>\(\);", "", "NaN"),
    Fault("waits for the group before", "decode_loss", "decode_loss", r"wait<0>", "wait<1>", "NaN"),
    Fault("no commit", "decode_loss", "decode_loss", r"\bcommit\(\);", "", "NaN"),
    Fault("some threads skip a barrier", "decode_loss", "decode_loss", rf"{BARRIER}(\s*if \(thread < V\))",
          r"if (inside) __syncthreads();\1", "deadlock"),
    Fault("some lanes skip a shuffle", "decode_loss", "decode_loss", r"warp_sum\(residual \* residual\)",
          "inside ? warp_sum(residual * residual) : 0.0f", "deadlock"),
    Fault("a row too many", "decode_loss", "decode_loss", r"j < n; \+\+j", "j <= n; ++j", "NaN"),
    Fault("a row too few", "decode_loss", "decode_loss", r"j < n; \+\+j", "j + 1 < n; ++j", "wrong"),
    Fault("half the columns staged", "decode_loss", "decode_loss", r"k < kColumns; k \+= kWarp \* kPacket",
          "k < kColumns / 2; k += kWarp * kPacket", "NaN"),
    Fault("a wrong lane in a tree", "decode_loss", "device", r"__shfl_xor_sync\(kAll, send, bit\)",
          "__shfl_xor_sync(kAll, send, bit / 2)", "wrong"),
    Fault("a lane too many writes", "decode_loss", "decode_loss", r"j < end; j \+= kWarp", "j < end + 1; j += kWarp",
          nth=1),
    Fault("columns past the row's end are written", "decode_loss", "decode_loss", r"if \(inside\) (a\.residuals)", r"\1"),
    Fault("columns past the buffer's end are written", "one_row", "decode_loss", r"if \(inside\) (a\.residuals)", r"\1",
          "heap-buffer-overflow", address=True),
    Fault("too little shared memory", "one_row", "decode_loss", r"\(2 \* kEntries \+ 2 \* kColumns \+ 8\)",
          "(2 * kEntries + 8)", "heap-buffer-overflow", address=True),
    Fault("no barrier before dots are read", "verify", "verify", BARRIER, "", nth=1),
    Fault("no barrier before counts are read", "verify", "verify", BARRIER, "", nth=2),
    Fault("the last warp's members are not counted", "verify", "verify", r"w < kWarps; \+\+w", "w + 1 < kWarps; ++w"),
    Fault("no barrier after clearing", "code_by_feature", "transpose", BARRIER, "", nth=0),
    Fault("no barrier after marking", "code_by_feature", "transpose", BARRIER, "", nth=1),
    Fault("counts itself among those before", "code_by_feature", "transpose", r"1u << row % kWarp\) - 1",
          "2u << row % kWarp) - 1"),
    Fault("no barrier in a sum over the block", "gradients", "weight_step", BARRIER, ""),
    Fault("one memory for two sums", "gradients", "weight_step", r"memory \+ 2 \* WeightStep<X>::kWarps", "memory"),
    Fault("the last entry of 32 is lost", "gradients", "gradient_row", r"lane < n\)", "lane + 1 < n)"),
    Fault("the value of another entry", "gradients", "gradient_row", r"value\[s\], j \+ q\)", "value[s], j)"),
    Fault("a run starts where the feature does", "gradients", "outer", r"\(p - a\.first\[f\]\) \* a\.run", "0"),
]  # fmt: skip


def planted(fault: Fault) -> Path:
    """The module with the fault: the one file that it concerns is compiled, the others are linked as they are."""
    header = ROOT / "csrc" / "include" / "sae_fast" / "cuda" / f"{fault.header}.cuh"
    text = header.read_text()
    places = list(re.finditer(fault.pattern, text))
    assert len(places) > fault.nth, f"{fault.name}: {fault.pattern} is nowhere in {header.name}: adapt the fault"
    at = places[fault.nth]
    faulty = text[: at.start()] + at.expand(fault.replacement) + text[at.end() :]
    assert faulty != text

    stem = {"device": "decode_loss", "gradient_row": "outer"}.get(fault.header, fault.header)
    base = ROOT / "build" / ("cuda_shim_address" if fault.address else "cuda_shim")
    name = re.sub(r"\W+", "_", fault.name)
    flags = [*FLAGS, "-O0", "-g0", "-Wno-error", *(ADDRESS if fault.address else [])]
    source = ROOT / "csrc" / "cuda" / f"{stem}.cu"

    def command(to: str) -> list[str]:
        overlay = ROOT / "build" / "cuda_faults" / f"include_{name}"
        (overlay / "sae_fast" / "cuda").mkdir(parents=True, exist_ok=True)
        (overlay / "sae_fast" / "cuda" / header.name).write_text(faulty)
        others = [str(base / f"{s.stem}.o") for s in sources() if s.stem != stem]
        # The faulty file first: of an inline function that several have, the linker takes the first.
        return ["g++", f"-I{overlay}", *flags, "-shared", "-x", "c++", str(source), "-x", "none", *others, "-o", to]

    return made(name, flags, source, command, faulty.encode())


@cache
def outcomes(address: bool) -> dict[str, str]:
    """What was seen, by the fault's name, and of the kernels as they are by the scenario's; "" of none."""
    good = build(ROOT / "build" / ("cuda_shim_address" if address else "cuda_shim"), ADDRESS if address else [])
    faults = [f for f in FAULTS if f.address == address]
    with ThreadPoolExecutor(2) as pool:
        bad = {f"{f.scenario}={path}": f.name for f, path in zip(faults, pool.map(planted, faults), strict=True)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **(with_asan() if address else {})}
    command = [sys.executable, "-m", "cuda_shim.scenarios", str(good), *bad]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return {bad.get(one, one): said for one, said in map(json.loads, found.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose kernels are not the shim's")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "_"))
def test_a_planted_fault_is_seen(fault):
    if fault.address and libasan() is None:
        pytest.skip("g++ has no libasan")
    found = outcomes(fault.address)
    assert found[fault.scenario] == "", "of the kernels as they are"
    assert found[fault.name] and fault.says in found[fault.name], found[fault.name]


# ---- All of them, under the sanitizers ----------------------------------------------------------------------------------


# Every kernel, at edges, gaps and odd addresses, of the tests that take seconds; all of them take minutes.
QUICK = "anywhere or gaps or a_row or longer or needs or nan or alignment or no_rows or without"


@pytest.mark.slow
@needs_libasan
@pytest.mark.skipif(
    torch.cuda.is_available() or "SAE_FAST_SHIM_ADDRESS" in os.environ, reason="there is a GPU, or this is that run"
)
def test_the_kernels_under_the_sanitizers():
    """The op tests again, in a process of their own: addresses, and undefined behaviour."""
    build(ROOT / "build" / "cuda_shim_address", ADDRESS)
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "ops").glob("test_cuda_*.py"))
    assert files
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", QUICK, *files]
    environment = {**os.environ, **with_asan(), "UBSAN_OPTIONS": "print_stacktrace=1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-6000:]
