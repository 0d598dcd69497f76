"""Text to learn from: the English documentation inside Python's standard library, or the user's own file."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sae_fast.files import lfs_pointer

# Applications and tests that live beside the library's modules without being part of it.
NOT_LIBRARY = {"site-packages", "idlelib", "lib2to3", "turtledemo", "test", "tests"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_documentation() -> str:
    """The documentation of the running Python's standard library, as one text of about 2 MB.

    It joins the language reference's topics (`pydoc_data.topics`) and the public docstrings of the
    library's modules, which are read with `ast`, never imported. Each topic and each module is one
    document. Documents are ordered by a hash of their names, so that the last tenth of the text is a fair
    sample of all of it; the order is the same on every machine, the text itself differs a little from one
    Python version to the next.

    Raises FileNotFoundError if this Python was installed without the sources of its standard library.
    """
    from pydoc_data.topics import topics

    documents = {f"topic {name}": text.strip() for name, text in topics.items()}
    documents |= dict(_module_documents(Path(sysconfig.get_path("stdlib"))))
    return "\n\n".join(documents[name] for name in sorted(documents, key=_scatter))


def read_text_file(path: str | Path) -> str:
    """The UTF-8 text of a file. Raises FileNotFoundError or ValueError, naming the file and what is wrong
    with it.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"text file {str(path)!r} {problem}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {str(path)!r} is not UTF-8: byte {error.start} cannot be decoded") from None
    if said := lfs_pointer(path):
        raise ValueError(f"text file {str(path)!r} is {said}")
    if not text.strip():
        raise ValueError(f"text file {str(path)!r} is empty, want text to run the model over")
    return text


def _module_documents(library: Path) -> Iterator[tuple[str, str]]:
    """(name, docstrings) of each public module that has any."""
    sources = sorted(library.rglob("*.py"))
    if not sources:
        raise FileNotFoundError(f"no Python sources in {str(library)!r}, where this Python keeps its standard library")
    for source in sources:
        parts = source.relative_to(library).parts
        if not NOT_LIBRARY.isdisjoint(parts[:-1]) or not all(_is_public(part) for part in parts):
            continue
        docstrings = list(_docstrings(ast.parse(source.read_bytes())))
        if docstrings:
            yield "/".join(parts), "\n\n".join(docstrings)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Public docstrings at and below a node, in the order of the source; nothing from inside what is
    private.
    """
    if isinstance(node, DOCUMENTED):
        if not _is_public(getattr(node, "name", "module")):
            return
        if docstring := ast.get_docstring(node):
            yield docstring
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)


def _is_public(name: str) -> bool:
    return name == "__init__.py" or not name.startswith("_")


def _scatter(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
