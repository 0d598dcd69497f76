"""The CUDA kernels on a CPU."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType

from cuda_shim.build import ADDRESS, NAME, ROOT, build


@cache
def load() -> ModuleType:
    """The kernels over the shim as a module; with SAE_FAST_SHIM_ADDRESS=1, built for AddressSanitizer."""
    address = os.environ.get("SAE_FAST_SHIM_ADDRESS") == "1"
    folder = ROOT / "build" / ("cuda_shim_address" if address else "cuda_shim")
    return load_file(build(folder, ADDRESS if address else []))


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
