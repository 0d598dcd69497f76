"""The files that a piece of a run depends on, and a hash of them: a result holds for as long as its hash does.

Imports are followed name by name, without running anything: `from sae_fast import ops` and `ops.decode(…)` lead to
sae_fast/ops/decode.py, through a package's `__init__.py` but not to the rest of the package.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ("tests/conftest.py", "tests/helpers.py", "tests/problems/bodies.py", "setup.py")  # as they stand
CUDA = ("csrc/cuda/**/*", "csrc/include/**/*")  # of what kernels/native.py launches
ALL = ("sae_fast/**/*.py", "kernels/*.py", *CUDA)


def of_test(path: Path) -> list[Path]:
    """Of a test file: what it imports, and each op whose name stands in it, as ops are called by name too."""
    ops = (op.stem for op in (ROOT / "sae_fast" / "ops").iterdir() if op.suffix in ("", ".py") and op.stem[0] != "_")
    text = path.read_text(encoding="utf-8")
    named = ((f"sae_fast.ops.{op}", None) for op in ops if re.search(rf"\b{op}\b", text))
    found = {path, *_follow([*_asked(path), *named])}
    native = CUDA if ROOT / "kernels" / "native.py" in found else ()
    return sorted({*found, *of(*SHARED, *native)})


def of(*patterns: str) -> list[Path]:
    """The files that match, such as "kernels/*.py"."""
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})


def digest(files: Iterable[Path], *more: str) -> str:
    """Of names and contents, and of what else a result depends on."""
    sum_of = hashlib.sha256("\0".join(more).encode())
    for path in files:
        sum_of.update(f"\0{os.path.relpath(path, ROOT)}\0".encode() + path.read_bytes())
    return sum_of.hexdigest()[:16]


Asked = tuple[str, str | None]  # a module, and a name in it; none for all of it


def _follow(asked: Iterable[Asked]) -> set[Path]:
    found: set[Path] = set()
    whole: set[str] = set()
    left = list(asked)
    while left:
        module, name = left.pop()
        path = _file_of(module)
        if path is None:
            continue
        found.add(path)
        package = path.name == "__init__.py"
        if package and name is not None:
            given = _exports(path).get(name)
            part = _part(*given) if given and given != (module, name) else _part(module, name)
            left += [part] if part else []
        elif module not in whole:
            whole.add(module)
            left += _asked(path)
    return found


def _part(module: str, name: str | None) -> Asked | None:
    """The module of this name, or the name itself where a file has it."""
    inner = _file_of(f"{module}.{name}")
    if inner is not None:
        return None if inner.name == "__init__.py" else (f"{module}.{name}", None)
    path = _file_of(module)
    if path is None:
        return None
    return (module, name) if path.name != "__init__.py" or name in _exports(path) else None


@cache
def _file_of(module: str) -> Path | None:
    path = module.removeprefix("sae_fast.") if f"{module}.".startswith("sae_fast.kernels.") else module
    for place in (ROOT, ROOT / "tests"):
        base = place / path.replace(".", "/")
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.exists():
                return file
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[tuple[str, str, str]]:
    """(own name, module, name) of each `from module import name`."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and _file_of(node.module):
            for it in node.names:
                yield it.asname or it.name, node.module, it.name


@cache
def _exports(path: Path) -> dict[str, Asked]:
    return {own: (module, name) for own, module, name in _imports(path)}


@cache
def _asked(path: Path) -> tuple[Asked, ...]:
    """What a file takes: names of modules, and of packages the attributes, or all where it takes the package itself."""
    packages: dict[str, str] = {}
    found: set[Asked] = set()
    for own, module, name in _imports(path):
        inner = _file_of(f"{module}.{name}")
        if inner is not None and inner.name == "__init__.py":
            packages[own] = f"{module}.{name}"
        else:
            found.add((module, name))
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            known = ((it.asname, it.name) for it in node.names if _file_of(it.name))
            packages |= {own or name.partition(".")[0]: name if own else name.partition(".")[0] for own, name in known}
    chained = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            found.add((packages[node.value.id], node.attr))
            chained.add(node.value)
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Name) and node.id in packages and node not in chained:
            found.add((packages[node.id], None))
    return tuple(found)
