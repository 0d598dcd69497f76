"""Where the run happens: an environment made of what is already installed, and a description of the machine.

The first half runs before sae_fast can be imported, so nothing here imports it at the top.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-gpu"

# Read by every Python of the environment: the packages that are installed beside the Python it was made from (which may be
# a virtual environment itself), this checkout, and the folder kernels/ under the name that setup.py gives it.
FINDER = """\
import importlib.util, sys

class Kernels:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sae_fast.kernels":
            return importlib.util.spec_from_file_location(
                name, {init!r}, submodule_search_locations=[{folder!r}]
            )

sys.meta_path.append(Kernels)
"""


def no_gpu() -> str | None:
    """Why nothing can be measured here, in a line, or None."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error}); set PYTHON to a Python that has"
    if not torch.cuda.is_available():
        return f"there is no NVIDIA GPU that torch {torch.__version__} can use here"
    return None


def installed() -> bool:
    """Whether this Python imports sae_fast, kernels included, from this checkout."""
    try:
        found = importlib.util.find_spec("sae_fast.kernels")
    except ImportError:
        return False
    return (
        found is not None and found.origin is not None and Path(found.origin).resolve() == ROOT / "kernels" / "__init__.py"
    )


def make(base: str = sys.executable, venv: Path = VENV) -> Path:
    """The Python of a virtual environment with this checkout in it, made from what is there: no pip, no network."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", "--without-pip", venv], check=True)
    paths = json.loads(_output(base, "-c", "import json, sys; print(json.dumps([p for p in sys.path if p]))"))
    packages = [path for path in paths if Path(path).name in ("site-packages", "dist-packages")]
    own = Path(_output(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    lines = [f"import site; site.addsitedir({path!r})" for path in packages]
    (own / "sae_fast_gpu.pth").write_text("\n".join([str(ROOT), "import _sae_fast_kernels", *lines, ""]))
    folder = ROOT / "kernels"
    (own / "_sae_fast_kernels.py").write_text(FINDER.format(init=str(folder / "__init__.py"), folder=str(folder)))
    return python


# pybind11 knows how to compile the files of an extension side by side; setup.py need not.
BUILD = """
import sys
from pybind11.setup_helpers import ParallelCompile
ParallelCompile(default=0).install()
sys.argv = ["setup.py", "build_ext", "--inplace"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__name__": "__main__", "__file__": "setup.py"})
"""
BUILD_CUDA = """
import runpy
from setuptools import setup
its = runpy.run_path("setup.py", run_name="sae_fast_setup")
setup(name="sae_fast", packages=[], ext_modules=its["cuda_extensions"](), cmdclass={"build_ext": its["Build"]},
      script_args=["build_ext", "--inplace"])
"""


def build(python: Path, seconds: float) -> dict[str, str | None]:
    """Builds the CPU engine ("_C") and the CUDA kernels ("_C_cuda") into the checkout, side by side, unless they are there
    and newer than their sources; why not, in a line, or None.  Nothing on the GPU needs either: Triton serves."""
    wanted = {"_C": (BUILD, "0"), "_C_cuda": (BUILD_CUDA, "1")}  # each without the other, so that neither takes it along
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: _build(python, name, *wanted[name], seconds), wanted)
        return dict(zip(wanted, found, strict=True))


def _build(python: Path, name: str, script: str, cuda: str, seconds: float) -> str | None:
    suffix = _output(str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
    engine = ROOT / "sae_fast" / f"{name}{suffix}"
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if engine.exists() and engine.stat().st_mtime > max(p.stat().st_mtime for p in sources):
        return None
    environment = {**os.environ, "SAE_FAST_CUDA": cuda}
    try:
        done = subprocess.run(
            [python, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"its build took more than {seconds:.0f} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "rror" in line or "nvcc" in line), "its build failed").strip()
    return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- The machine ----------------------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """What a figure depends on, as it was found; nothing is set."""
    import torch

    from benchmarks import machine

    about: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit().rstrip("+"),
        "dirty": machine.commit().endswith("+"),
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "cpu": machine.device(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "versions": versions(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
            "capability": f"{gpu.major}.{gpu.minor}",
            "nvidia_smi": _smi(),
        }
    return about


def versions() -> str:
    """What a figure hangs on, in a line."""
    from benchmarks import machine

    more = f"Triton {_version('triton')}", f"driver {(_smi() or {}).get('driver_version', 'none')}"
    return ", ".join((machine.versions(), *more))


def _version(module: str) -> str | None:
    return __import__(module).__version__ if importlib.util.find_spec(module) else None


def _smi() -> dict[str, str] | None:
    names = [
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "clocks.max.mem",
        "power.limit",
        "temperature.gpu",
    ]
    try:
        line = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    return dict(zip(names, (word.strip() for word in line.split(",")), strict=False))
