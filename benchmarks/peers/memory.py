"""Peak memory, as `benchmarks.memory` measures it, in a process that knows the peers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import benchmarks.peers  # noqa: F401  (registers them)
from benchmarks.data import Shape
from benchmarks.memory import _measure


def peak_bytes(case: str, provider: str, shape: Shape) -> list[int]:
    """One peak a step; ``RuntimeError`` says why where it cannot be measured."""
    command = [sys.executable, "-m", "benchmarks.peers.memory", case, provider, json.dumps(asdict(shape))]
    child = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError((child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1])
    return json.loads(child.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
