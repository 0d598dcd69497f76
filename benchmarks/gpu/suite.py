"""The tests that a GPU has to run, a file a piece."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.gpu import environment, sources

ON_THE_HOST = ("test_cuda_build.py", "test_cuda_shim.py")
TESTS = sources.ROOT / "tests"


def is_of_kernels(name: str) -> bool:
    """Whether a file holds the kernels' own tests: on a GPU they run there instead of in the interpreter or the shim."""
    return name.startswith(("test_triton_", "test_cuda_", "test_device_")) and name not in ON_THE_HOST


def pieces() -> dict[str, str]:
    """The sources of each test file, by its path from the root: the widest come last, for what they find is found before
    by those of what they are made of."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        if is_of_kernels(path.name) or re.search(r"mark\.gpu|mark\.kernels|@bodies\.", path.read_text(encoding="utf-8")):
            found[path] = sources.of_test(path)
    by_width = sorted(found.items(), key=lambda item: len(item[1]))
    return {name_of(path): sources.digest(files, environment.versions()) for path, files in by_width}


def name_of(path: Path) -> str:
    return path.relative_to(TESTS.parent).as_posix()
