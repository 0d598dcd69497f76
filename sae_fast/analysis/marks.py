"""Marks: which features of an SAE a reader found relevant to a task, and which not.  The page exports, SHIFT reads them.

    {"format": "sae_fast.marks", "version": 1, "sae": "<fingerprint>", "d_sae": 24576,
     "marks": {"12": "irrelevant", "40": "relevant"}, "notes": {"12": "gendered pronouns"}}

One file is of one SAE, known by its fingerprint.  Features that are not listed are unmarked; ``notes`` may be left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_fast.files import lfs_pointer, write_text
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.identity import fingerprint

FORMAT, VERSION = "sae_fast.marks", 1
IRRELEVANT, RELEVANT = "irrelevant", "relevant"


@dataclass(frozen=True)
class Marks:
    """Judgements on the features of one SAE.

    sae      its fingerprint: 16 hex digits, of its weights
    d_sae    how many features it has
    marks    feature → "irrelevant" (to the task: SHIFT ablates it) or "relevant"
    notes    feature → free text
    """

    sae: str
    d_sae: int
    marks: Mapping[int, str]
    notes: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, found in (("marks", self.marks), ("notes", self.notes)):
            for feature, value in found.items():
                if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < self.d_sae:
                    raise ValueError(f"{name}: got feature {feature!r}, want 0 to {self.d_sae - 1}, those of this SAE")
                if name == "marks" and value not in (IRRELEVANT, RELEVANT):
                    raise ValueError(f"marks: got {value!r} for feature {feature}, want {IRRELEVANT!r} or {RELEVANT!r}")
                if not isinstance(value, str):
                    raise ValueError(f"notes: got a {type(value).__name__} for feature {feature}, want text")

    @classmethod
    def of(cls, sae: SparseAutoencoder, marks: Mapping[int, str], notes: Mapping[int, str] | None = None) -> Marks:
        """Marks of an SAE's features.  ValueError for a feature it has not, or a mark that is neither of the two."""
        return cls(fingerprint(sae), sae.d_sae, dict(marks), dict(notes or {}))

    @property
    def irrelevant(self) -> list[int]:
        """The features marked irrelevant, ascending."""
        return sorted(feature for feature, mark in self.marks.items() if mark == IRRELEVANT)

    @property
    def relevant(self) -> list[int]:
        """The features marked relevant, ascending."""
        return sorted(feature for feature, mark in self.marks.items() if mark == RELEVANT)

    def check(self, sae: SparseAutoencoder, name: str = "marks") -> Marks:
        """Itself; ValueError unless it is of this SAE.  ``name`` is what the error calls it."""
        found = fingerprint(sae)
        if (self.sae, self.d_sae) != (found, sae.d_sae):
            got, want = f"SAE {self.sae} of {self.d_sae} features", f"{found} of {sae.d_sae}"
            raise ValueError(f"{name}: got marks of {got}, want those of the SAE in use, {want}: they are another's")
        return self

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file; what was there stays until the new one is whole."""
        path = Path(path)
        value = {"format": FORMAT, "version": VERSION, "sae": self.sae, "d_sae": self.d_sae}
        value |= {"marks": {str(k): self.marks[k] for k in sorted(self.marks)}}
        value |= {"notes": {str(k): self.notes[k] for k in sorted(self.notes)}} if self.notes else {}
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str], sae: SparseAutoencoder | None = None) -> Marks:
        """The marks in a file.  ValueError, with the path, for a file that is none, of another version, with features the
        SAE has not or marks that are neither of the two; and, if ``sae`` is given, for marks of another SAE."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            said = lfs_pointer(Path(path)) or f"no JSON ({error}), want a file of marks"
            raise ValueError(f"{path}: it is {said}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            got = value.get("format") if isinstance(value, dict) else f"a {type(value).__name__}"
            raise ValueError(f"{path}: got format {got!r}, want {FORMAT!r}, which the page exports")
        if value.get("version") != VERSION:
            raise ValueError(f"{path}: got version {value.get('version')!r}, want {VERSION}")
        d_sae, of, notes = value.get("d_sae"), value.get("sae"), value.get("notes")
        if not isinstance(of, str) or isinstance(d_sae, bool) or not isinstance(d_sae, int):
            raise ValueError(f"{path}: got sae {of!r} and d_sae {d_sae!r}, want a fingerprint and a number of features")
        try:
            found = cls(of, d_sae, _by_feature("marks", value.get("marks")), _by_feature("notes", notes or {}))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return found if sae is None else found.check(sae, str(path))


def _by_feature(name: str, found: Any) -> dict[int, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{name}: got {found!r}, want an object from feature numbers")
    for key in found:
        if not (key.isascii() and key.isdigit()) or str(int(key)) != key:
            raise ValueError(f"{name}: got feature {key!r}, want a number such as 12")
    return {int(key): value for key, value in found.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"got {twice!r} twice, want each once")
    return found
