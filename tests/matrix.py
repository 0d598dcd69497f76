"""A core of the tests on each torch and Triton that is supported, each in an environment of its own (make matrix).

    python tests/matrix.py [--kernels] [NAME ...]

The package is built once, as a wheel: its native code knows no torch.  What is tested is what the wheel installs.  With
--kernels its kernels are compiled, of which none may use the stack, and nothing else is tested.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
HOME = ROOT / ".venv-matrix"
# By name: torch, which brings the Triton that it asks for, and what replaces that.
ENVIRONMENTS = {
    "torch-2.8": ("torch==2.8.0", None),  # the oldest that pyproject.toml takes
    "torch-2.13": ("torch==2.13.0", "triton==3.6.0"),
    "torch-2.14": ("torch==2.14.1", None),
    "triton-3.9": ("torch==2.14.1", "triton==3.9.0"),  # which torch 2.15 asks for
}
TOOLS = (
    "numpy<2.4", "safetensors>=0.4.3", "tqdm>=4.66", "typer>=0.15.4", "rich>=13",  # the package's
    "pytest>=8,<10", "pytest-xdist>=3.6", "hypothesis>=6.100", "pybind11>=2.13",  # the tests', of which some build
)  # fmt: skip
CORE = (
    "dispatch", "encode", "screen", "topk", "shadow", "decode_loss", "weight_step", "nn", "citizens", "functional",
    "trainer", "checkpoint", "device_runner", "triton_encode",
)  # fmt: skip


def run(*command: str | Path, at: Path = ROOT, **options) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), cwd=at, **options)


def wheel() -> Path:
    """Built by the environment of this Python, which has what that takes."""
    target = HOME / "dist"
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target, ".")
    run(*pip, check=True)
    return max(target.glob("sae_fast-*.whl"), key=lambda path: path.stat().st_mtime)


def install(name: str, package: Path) -> Path:
    """The Python of the environment, which is made or brought up to date."""
    python = HOME / name / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", HOME / name, check=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    torch, triton = ENVIRONMENTS[name]
    run(*pip, torch, check=True)  # alone, or another requirement could bring in a bigger build
    run(*pip, torch, *TOOLS, check=True)
    if triton:
        run(*pip, "--no-deps", triton, check=True)
    run(*pip, "--no-deps", "--force-reinstall", package, check=True)
    return python


def test(python: Path, all_of_it: bool) -> tuple[bool, str]:
    """(whether all is well, what was found in a line)."""
    # Away from the checkout, and without nvcc, whose kernels are the same.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SAE_FAST_TUNING", "TRITON_INTERPRET")}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_HOME": str(HOME)}
    code = "import torch, triton; print('torch', torch.__version__, 'Triton', triton.__version__)"
    versions = run(python, "-c", code, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    print(f"== {versions}", flush=True)
    start = time.monotonic()
    well, counts = run_core(python, environment) if all_of_it else (True, ["no tests"])
    kernels = run(python, "-m", "sae_fast.kernels.aot", "--check", env=environment, at=HOME)
    verdict = f"{', '.join(counts)}; kernels {'fit' if kernels.returncode == 0 else 'DO NOT FIT'}"
    return well and kernels.returncode == 0, f"{versions}: {verdict}; {time.monotonic() - start:.0f} s"


def run_core(python: Path, environment: dict[str, str]) -> tuple[bool, list[str]]:
    """(whether all passed, how many of each kind)."""
    options = ("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal", "-m", "not slow", "-p", "no:cacheprovider")
    command = (python.parent / "pytest", "-o", "addopts=-q --strict-markers", *options)  # -m pytest would see the checkout
    tests = run(
        *command,
        *(next(HERE.glob(f"*/test_{name}.py")) for name in CORE),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(tests.stdout, flush=True)
    return tests.returncode == 0, re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", tests.stdout)


def main(names: list[str]) -> int:
    all_of_it = "--kernels" not in names
    names = [name for name in names if name != "--kernels"]
    unknown = set(names) - set(ENVIRONMENTS)
    if unknown:
        raise SystemExit(f"got {sorted(unknown)}, want some of {list(ENVIRONMENTS)}")
    package, results = wheel(), {}
    for name in names or ENVIRONMENTS:
        results[name] = test(install(name, package), all_of_it)
    for name, (well, line) in results.items():
        print(f"{'passed' if well else 'FAILED'}  {name}: {line}")
    return int(not all(well for well, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
