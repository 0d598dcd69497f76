"""A folder from the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePosixPath
from typing import Any

from sae_fast.extras import require
from sae_fast.interop import _foreign
from sae_fast.interop.formats import WEIGHTS

PLACE = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:/(?P<inside>[^@]+?))?/?(?:@(?P<revision>[^@]+))?")
WANTED = (*(f"*{suffix}" for suffix in WEIGHTS), "*.json")


def fetch(place: str) -> Path:
    """The local copy of "user/repo[/folder or file][@revision]"; only what an SAE is made of is downloaded."""
    found = PLACE.fullmatch(place)
    if found is None or place.startswith((".", "~", "/")):
        raise FileNotFoundError(
            f"path: there is no {place!r}, and it is no place on the Hub (user/repo/folder@revision) either"
        )
    repo, inside, revision = found["repo"], found["inside"] or "", found["revision"]
    hub = require("huggingface_hub", extra="hub")
    wanted, unwanted = _patterns(inside)
    try:
        root = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise FileNotFoundError(f"path: there is no {place!r} here, and the Hub gave no {repo!r}: {reason}") from error
    local = root / inside
    if local.is_file() or (local.is_dir() and any(p.suffix in WEIGHTS and p.is_file() for p in local.iterdir())):
        return local
    files = _listed(hub, repo, revision)
    here = [str(PurePosixPath(f).relative_to(inside)) for f in files if PurePosixPath(f).is_relative_to(inside)]
    if format := _foreign.of_files([PurePosixPath(inside).name] if here == ["."] else here):
        raise ValueError(f"path: {place}: {_foreign.said(format)}")
    folders = sorted({str(PurePosixPath(f).parent) for f in files if f.endswith(WEIGHTS)} - {"."})
    some = ", ".join(folders[:5]) + (" …" if len(folders) > 5 else "")
    instead = f"; there are weights in {some}: name one of them" if folders else ""
    raise FileNotFoundError(f"path: {repo} on the Hub holds no SAE in {inside or 'its root'!r}{instead}")


def _patterns(inside: str) -> tuple[list[str], list[str]]:
    """Patterns of what to fetch and what not: the files of a folder, not of the folders in it; of what may be a file also
    that, and the configs that go with it.  A * of the Hub's patterns goes across folders."""
    here = glob.escape(inside)
    below = f"{here}/" if here else ""
    wanted = [f"{below}{name}" for name in WANTED]
    if inside.endswith(".pt"):  # a folder's name may, too
        folders = [str(p) for p in list(PurePosixPath(here).parents)[:2]]
        wanted += [here, f"{here.removesuffix('.pt')}_cfg.json"]
        wanted += [f"{folder}/config.json".removeprefix("./") for folder in folders]
    return wanted, [f"{below}*/*", *(f"{below}{name}" for name in _foreign.LARGE)]


def _listed(hub: Any, repo: str, revision: str | None) -> list[str]:
    try:
        return hub.HfApi().list_repo_files(repo, revision=revision)
    except (hub.errors.HfHubHTTPError, OSError):
        return []
