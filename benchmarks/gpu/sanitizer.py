"""The CUDA kernels on small cases under NVIDIA's compute-sanitizer, where it is installed, into OUT/sanitizer.txt.

`python -m benchmarks.gpu.sanitizer --out DIR --known DIR --seconds N`; with --ops it is what the sanitizer runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import environment, sources
from benchmarks.gpu.record import DONE, Record

TOOLS = ("memcheck", "racecheck")


def find() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = ("compute-sanitizer", f"{home}/bin/compute-sanitizer")
    return next((found for place in places if (found := shutil.which(place))), None)


def small_ops(device: str = "cuda") -> None:
    """Every op with a CUDA body: rows of three stagings, ragged ends, empty rows."""
    import torch

    import sae_fast as sf
    from sae_fast.kernels import native

    torch.manual_seed(0)
    native.FASTER.update({generation: frozenset(_ops()) for generation in native.FASTER})
    for d, F in ((132, 300), (63, 97)):
        sae = sf.GatedSAE(d, F, device=device)
        trainer = sf.Trainer(sae, lr=1e-3, l1_coefficient=0.1)
        with torch.no_grad():
            sae.b_gate.fill_(-2.0)
            sae.b_gate[:3] = 10.0  # features that every example has
        for rows in (300, 3):
            x = torch.randn(rows, d, device=device)
            trainer.step(x)
            with torch.no_grad():
                code = sae.encode_sparse(x)
                csc = sf.ops.transpose(code)
                out = sf.ops.decode_loss(code, sae.W_dec, sae.b_dec, x, torch.ones(F, device=device), rows)
                sf.ops.outer(csc, [out.grads[0].contiguous()], [x])
    print("ran", "cuda" if native.module else "triton", flush=True)


def pieces() -> dict[str, str]:
    return dict.fromkeys(TOOLS, sources.digest(sources.of(*sources.CUDA, "kernels/native.py"), environment.versions()))


def _ops() -> list[str]:
    from benchmarks.gpu.goals import TWINS

    return list(TWINS.values())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--known", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--ops", action="store_true")
    given = parser.parse_args()
    if given.ops:
        small_ops()
        return 0
    report, record, of = given.out / "sanitizer.txt", Record(given.out, given.known), pieces()
    tool = find()
    if tool is None:
        report.write_text("no compute-sanitizer is installed here\n", encoding="utf-8")
        return 0
    end, text, bad = time.monotonic() + given.seconds, "", False
    left = record.left("sanitizer", of)
    for n, kind in enumerate(left):
        # Our own kernels only: torch's would take the time.
        command = [tool, "--tool", kind, "--kernel-name", "kernel_substring=sae_fast", "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.gpu.sanitizer", "--ops"]
        try:
            seconds = max(1.0, (end - time.monotonic()) / (len(left) - n))
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
            said, bad = done.stdout[-20000:], bad or done.returncode != 0
            state = f"exit code {done.returncode}" if done.returncode else DONE
        except subprocess.TimeoutExpired:
            said = state = f"no result within {seconds:.0f} s"
        record.note("sanitizer", kind, of[kind], state)
        text += f"==== {kind}\n{said}\n"
        report.write_text(text, encoding="utf-8")
    print(text, flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
