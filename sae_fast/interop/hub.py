"""A folder or file from the Hugging Face Hub, through huggingface_hub: what an SAE is made of, and nothing else."""

from __future__ import annotations

import glob
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sae_fast.extras import require
from sae_fast.interop import _refused
from sae_fast.interop.formats import READERS, WEIGHTS

PLACE = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:/(?P<inside>[^@]+?))?/?(?:@(?P<revision>[^@]+))?")


def fetch(place: str) -> Path:
    """The local copy of "user/repo[/folder or file][@revision]"; only the weights of one SAE are downloaded, and what says
    how to read them."""
    found = PLACE.fullmatch(place)
    if found is None or place.startswith((".", "~", "/")) or ".." in place.split("/"):
        raise FileNotFoundError(
            f"path: there is no {place!r}, and it is no place on the Hub (user/repo/folder@revision) either"
        )
    repo, inside, revision = found["repo"], found["inside"] or "", found["revision"]
    hub = require("huggingface_hub", extra="hub")
    try:
        files = [file.rfilename for file in hub.HfApi().model_info(repo, revision=revision).siblings]
    except Exception as error:  # of whatever client huggingface_hub has; what was fetched before is here
        return _cached(hub, place, repo, inside, revision, error)
    wanted = [glob.escape(file) for file in needed(files, inside, place)]
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted)) / inside
    except OSError as error:
        raise FileNotFoundError(f"path: the Hub did not give {place!r}: {_reason(error)}") from error


def needed(files: list[str], inside: str, place: str) -> list[str]:
    """The files of a repository that the SAE ``inside`` it, a folder or a file, is made of.  ``ValueError`` for what is
    refused, and where there are several SAEs; ``FileNotFoundError`` where there is none."""
    below = {posixpath.relpath(file, inside or "."): file for file in files if _is_in(file, inside)}
    for file in below.values():
        _refused.check(place, file)
    weights = {inside} if inside in files else {below[name] for name in _weights(list(below))}
    if len(weights) > 1:
        some = ", ".join(sorted(weights)[:5]) + (" …" if len(weights) > 5 else "")
        raise ValueError(f"path: {place} holds {some}: name one of these files")
    if not weights:
        folders = sorted({str(PurePosixPath(f).parent) for f in files if f.endswith(WEIGHTS)} - {"."})
        some = ", ".join(folders[:5]) + (" …" if len(folders) > 5 else "")
        instead = f"; there are weights in {some}: name one of them" if folders else ""
        repo = "/".join(place.partition("@")[0].split("/")[:2])
        raise FileNotFoundError(f"path: {repo} on the Hub holds no SAE in {inside or 'its root'!r}{instead}")
    return [file for file in files if file in weights or any(_beside(file, w) for w in weights)]


def _is_in(file: str, inside: str) -> bool:
    return not inside or file == inside or file.startswith(f"{inside}/")


def _weights(names: list[str]) -> Iterator[str]:
    """Those of the paths below a folder that are weights of a format: of each format of the first of its patterns that any
    fits; where none does, all weights in the folder itself."""
    fitting = []
    for format in READERS.values():
        by_pattern = ([n for n in names if _fits(n, pattern)] for pattern in format.FILES)
        fitting += next((found for found in by_pattern if found), [])
    yield from fitting or [name for name in names if "/" not in name and name.endswith(WEIGHTS)]


def _beside(file: str, weights: str) -> bool:
    """True for what a format that may have these weights reads with them."""
    folder, name = posixpath.split(weights)
    formats = [f for f in READERS.values() if any(_fits(name, posixpath.basename(p)) for p in f.FILES)]
    return any(
        _fits(file, posixpath.normpath(posixpath.join(glob.escape(folder), pattern.format(stem=PurePosixPath(name).stem))))
        for format in formats or READERS.values()
        for pattern in format.BESIDE
    )


def _fits(path: str, pattern: str) -> bool:
    """True for a path as long as the pattern and fits it, part by part."""
    return path.count("/") == pattern.count("/") and PurePosixPath(path).match(pattern)


def _cached(hub: Any, place: str, repo: str, inside: str, revision: str | None, error: Exception) -> Path:
    """The place in the cache of what was fetched, where the Hub does not answer."""
    try:
        nothing = ["-"]  # that is missing, of what may be much
        local = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=nothing, local_files_only=True)) / inside
    except OSError:
        local = None
    if local is None or not local.exists():
        raise FileNotFoundError(
            f"path: there is no {place!r} here, and the Hub gave no {repo!r}: {_reason(error)}"
        ) from error
    return local


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
