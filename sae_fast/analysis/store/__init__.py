"""A feature store: every activation of an SAE over many tokens, as Parquet, and questions to it.  docs/store.md has the
files, column by column, and the SQL.

    write_store("out/store", sae, activations)
    store = FeatureStore.open("out/store", sae)
    for context in store.top(7):
        print(context.activation, *context.text)
    store.sql("SELECT feature, maximum FROM features ORDER BY fires DESC LIMIT 10")
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sae_fast.analysis.store.contexts import Context, Contexts, shown, windows
from sae_fast.analysis.store.manifest import MANIFEST, check_free, read
from sae_fast.analysis.store.writer import write_store
from sae_fast.extras import require
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.identity import fingerprint

__all__ = ["Context", "Contexts", "FeatureStore", "check_free", "write_store"]

ENTRIES = 1 << 22  # that a bulk question reads at a time
SCALES = ("linear", "log")


class FeatureStore:
    """A store that :func:`write_store` made, asked with DuckDB.

    info: what its store.json says, among it ``sae`` (the SAE's fingerprint), ``d_sae``, ``n_tokens``, ``n_activations`` and
    ``context_length`` (None: every token is a context of its own).
    """

    def __init__(self, path: Path, info: dict[str, Any]):
        self.path, self.info = path, info
        self.d_sae, self.n_tokens, self.n_activations = (info[key] for key in ("d_sae", "n_tokens", "n_activations"))
        self.context_length: int | None = info["context_length"]
        self.has_text = "tokens.parquet" in info["files"]
        self._duckdb = require("duckdb", extra="store")
        self._connection = self._duckdb.connect()
        self._connection.execute("SET parquet_metadata_cache = true; SET preserve_insertion_order = true")
        self._parts = sorted(file for file in info["files"] if file.startswith("activations/"))
        self._begins = np.array([int(Path(file).stem) for file in self._parts])  # the first feature of each
        tables = {"activations": self._parts, "features": ["features.parquet"]}
        for name, files in (tables | ({"tokens": ["tokens.parquet"]} if self.has_text else {})).items():
            self._ask(f"CREATE VIEW {name} AS SELECT * FROM {self._read(files)}")

    @classmethod
    def open(cls, path: str | os.PathLike, sae: SparseAutoencoder | None = None) -> FeatureStore:
        """The store in a folder; with ``sae``, only if it is that SAE's.

        ``FileNotFoundError`` when there is none, ``ValueError`` when it is another SAE's, of another version, or damaged,
        ``MissingExtra`` without DuckDB.
        """
        require("duckdb", extra="store")
        path = Path(path)
        info = read(path)
        if sae is not None and (got := fingerprint(sae)) != info["sae"]:
            of = f"a {info.get('sae_class')} of {info['d_sae']} features with fingerprint {info['sae']}"
            raise ValueError(f"sae: {path} is the store of {of}, not of this {type(sae).__name__}, whose is {got}")
        for name, size in info["files"].items():
            if not (path / name).is_file():
                raise ValueError(f"{path}: damaged: {name} is missing; write the store again")
            if (found := (path / name).stat().st_size) != size:
                raise ValueError(f"{path}: damaged: {name} has {found} bytes, want {size}; write the store again")
        store = cls(path, info)
        store._check_counts()
        return store

    def sql(self, query: str, parameters: Sequence[Any] | None = None) -> Any:
        """DuckDB's answer, a relation: print it, or take ``.fetchall()``, ``.df()``, ``.fetchnumpy()``, ``.arrow()``.

        Tables: ``activations`` (token, feature, activation), ``features`` (feature, fires, density, maximum, mean, minimum)
        and, where the text is known, ``tokens`` (token, context, position, text, gap).  ``?`` in the query stands for one
        of ``parameters``.  ValueError for a query that DuckDB refuses.
        """
        try:
            return self._connection.sql(query, params=parameters)
        except (self._duckdb.ProgrammingError, self._duckdb.NotSupportedError) as error:
            no_text = "" if self.has_text or "tokens" not in query else " (this store has no text, so no table tokens)"
            raise ValueError(f"query: {' '.join(str(error).split())}{no_text}") from error
        except self._duckdb.Error as error:
            raise self._damaged(error) from error

    # ---- Numbers of features ----------------------------------------------------------------------------------------

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Arrays by name [F]: fires (tokens, int64), density (float64), maximum, mean and minimum of the activations above
        0 (float32; 0 of a feature that never fires)."""
        columns = self._numpy("SELECT * EXCLUDE feature FROM features ORDER BY feature")
        if len(columns["fires"]) != self.d_sae:
            raise ValueError(f"{self.path}: damaged: {len(columns['fires'])} features, want {self.d_sae}")
        return columns

    def density(self) -> np.ndarray:
        """[F] float64: the fraction of tokens on which each feature fires."""
        return self.features["density"]

    def histogram(
        self, features: int | Sequence[int] | None = None, bins: int = 30, scale: str = "linear"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(counts [n, bins] int64, edges [n, bins + 1] float64) of the activations above 0 of each feature, by default all.

        scale: "linear", from 0 to the feature's maximum, or "log", from its minimum to its maximum by equal factors.
        """
        asked = self._checked(features)
        if bins < 1:
            raise ValueError(f"bins: got {bins}, want at least 1")
        if scale not in SCALES:
            raise ValueError(f"scale: got {scale!r}, want one of {SCALES}")
        low, high = (self.features[name][asked].astype(np.float64) for name in ("minimum", "maximum"))
        if scale == "linear":
            low = np.zeros_like(low)
        log = "ln(activation::DOUBLE / minimum) / ln(maximum::DOUBLE / minimum)"
        fraction = {
            "linear": "activation::DOUBLE / maximum",
            "log": f"CASE WHEN maximum > minimum THEN {log} ELSE 1 END",
        }[scale]
        found = self._numpy(
            f"SELECT feature, greatest(0, least(?, floor({fraction} * ?)))::INTEGER AS bin, count(*) AS n "
            f"FROM activations JOIN features USING (feature) WHERE {_among(np.unique(asked))} GROUP BY ALL",
            [bins - 1, bins],
        )
        counts = np.zeros((self.d_sae, bins), dtype=np.int64)
        counts[found["feature"], found["bin"]] = found["n"]
        steps = np.arange(bins + 1) / bins
        with np.errstate(divide="ignore", invalid="ignore"):
            edges = low[:, None] * (high / low)[:, None] ** steps if scale == "log" else high[:, None] * steps
        edges[high == 0] = 0
        return counts[asked], edges

    # ---- Contexts ---------------------------------------------------------------------------------------------------

    def top(self, feature: int, k: int = 20, before: int = 12, after: int = 8) -> Contexts:
        """The k contexts with the highest activations of a feature, best first, fewer if there are no more.

        No two are from one context or read the same.  before, after: how many tokens of the context are shown either side.
        """
        if k < 1:
            raise ValueError(f"k: got {k}, want at least 1")
        return self.contexts([feature], top=k, before=before, after=after)

    def stratified(self, feature: int, bins: int = 5, per_bin: int = 4, before: int = 12, after: int = 8) -> Contexts:
        """``per_bin`` contexts from each of ``bins`` quantiles of a feature's activations above 0, the highest first.

        Quantile s of the n activations is those ranked n(s − 1)/bins to ns/bins.  Of a quantile's, which are shown does not
        depend on their activation, and is the same every time; no two of all are from one context or read the same.
        """
        for name, value in (("bins", bins), ("per_bin", per_bin)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1")
        return self.contexts([feature], top=0, bins=bins, per_bin=per_bin, before=before, after=after)

    def contexts(
        self,
        features: Sequence[int] | None = None,
        top: int = 20,
        bins: int = 0,
        per_bin: int = 0,
        before: int = 12,
        after: int = 8,
        progress: bool = False,
    ) -> Contexts:
        """The ``top`` contexts of each feature (by default of all) and ``per_bin`` from each of ``bins`` quantiles, as
        :meth:`top` and :meth:`stratified` give; of all that are shown of one feature no two are from one context or read
        the same.  All activations are read once, feature by feature."""
        asked = self._checked(features)
        for name, value in dict(top=top, bins=bins, per_bin=per_bin, before=before, after=after).items():
            if value < 0:
                raise ValueError(f"{name}: got {value}, want at least 0")
        chosen: dict[int, tuple[np.ndarray, ...]] = {}
        for feature, tokens, values in tqdm(
            self._by_feature(np.unique(asked)), "contexts", len(np.unique(asked)), disable=not progress, dynamic_ncols=True
        ):
            at, strata = shown(self, tokens, values, top, bins, per_bin, before, after)
            first, length, around = windows(self, tokens, values, at, before, after)
            chosen[feature] = (np.full(len(at), feature, np.int32), strata, tokens[at], values[at], first, length, around)
        return Contexts(self, *map(np.concatenate, zip(*(chosen[feature] for feature in asked.tolist()), strict=True)))

    @cached_property
    def pieces(self) -> tuple[np.ndarray, list[str]]:
        """(ids [n_tokens] int32, strings): token i, with what stands before it in the source, is ``strings[ids[i]]``.
        ValueError in a store without text."""
        if not self.has_text:
            raise ValueError(f"{self.path}: this store has no text")
        table = self.sql("SELECT gap || text AS piece FROM tokens ORDER BY token").to_arrow_table()
        column = table["piece"].combine_chunks().dictionary_encode()
        if len(column) != self.n_tokens:
            raise ValueError(f"{self.path}: damaged: the text of {len(column)} tokens, want {self.n_tokens}")
        return column.indices.to_numpy(zero_copy_only=False), column.dictionary.to_pylist()

    def pieces_of(self, first: int, end: int) -> list[str]:
        """The text of tokens first to end − 1, each with what stands before it, the first without; empty strings in a store
        without text."""
        if not self.has_text:
            return [""] * (end - first)
        ids, strings = self.pieces
        found = [strings[i] for i in ids[first:end].tolist()]
        return [found[0].lstrip() or found[0], *found[1:]]

    def _by_feature(self, features: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(feature, tokens ascending [n] int64, activations [n] float32) of ascending features, ENTRIES read at a time."""
        ends = np.cumsum(self.features["fires"][features])
        begin = 0
        while begin < len(features):
            before = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + ENTRIES, side="right")))
            part = features[begin:end]
            # Of those files alone: a view over all would look into each.
            first, last = np.searchsorted(self._begins, part[[0, -1]], side="right")
            files = self._read(self._parts[first - 1 : last])
            found = self._numpy(f"SELECT token, feature, activation FROM {files} WHERE {_among(part)}")
            feature, token, activation = (found[name] for name in ("feature", "token", "activation"))
            key = feature * np.int64(self.n_tokens) + token
            if np.any(key[1:] <= key[:-1]):  # of a list of features DuckDB does not keep the order
                order = np.argsort(key)
                feature, token, activation = feature[order], token[order], activation[order]
            left, right = (np.searchsorted(feature, part, side=side) for side in ("left", "right"))
            if not np.array_equal(right - left, self.features["fires"][part]):
                raise ValueError(f"{self.path}: damaged: activations and features.parquet disagree; write the store again")
            for i, a, b in zip(part.tolist(), left.tolist(), right.tolist(), strict=True):
                yield i, token[a:b], activation[a:b]
            begin = end

    def _check_counts(self) -> None:
        """``ValueError`` unless the manifest counts what the files hold: arrays are made of these sizes."""
        query = "SELECT count(*), coalesce(sum(fires), 0), max(fires), arg_max(density, fires) FROM features"
        [(d_sae, n_activations, fires, density)] = self._ask(query).fetchall()
        counts = dict(d_sae=d_sae, n_activations=int(n_activations))
        if self.has_text:
            counts["n_tokens"] = self._ask("SELECT count(*) FROM tokens").fetchall()[0][0]
        elif fires and density:  # of a store in which nothing fires, nothing says it
            counts["n_tokens"] = round(fires / density)
        for name, count in counts.items():
            if self.info[name] != count:
                said = f"{name}: got {self.info[name]}, but its files hold {count}"
                raise ValueError(f"{self.path / MANIFEST}: damaged: {said}; write the store again")

    def _checked(self, features: int | Sequence[int] | None) -> np.ndarray:
        """[n] int64, or ValueError for one that does not exist."""
        if features is None:
            return np.arange(self.d_sae)
        asked = np.atleast_1d(np.asarray(features))
        if asked.size == 0 or asked.ndim != 1 or asked.dtype.kind not in "iu":
            raise ValueError(f"features: got {features!r}, want an int or a sequence of them")
        if len(wrong := asked[(asked < 0) | (asked >= self.d_sae)]):
            raise ValueError(f"features: got {wrong[0]}, want 0 to {self.d_sae - 1}")
        return asked.astype(np.int64)

    def _read(self, files: Sequence[str]) -> str:
        """SQL for the rows of some of the store's files, in order."""
        literal = (re.sub(r"[*?[]", r"[\g<0>]", str(self.path / file)).replace("'", "''") for file in files)  # no globs
        paths = ", ".join(f"'{path}'" for path in literal)
        return f"read_parquet([{paths}], hive_partitioning = false)"  # a folder a=b is no column

    def _numpy(self, query: str, parameters: Sequence[Any] | None = None) -> dict[str, np.ndarray]:
        return {name: np.asarray(column) for name, column in self._ask(query, parameters).fetchnumpy().items()}

    def _ask(self, query: str, parameters: Sequence[Any] | None = None) -> Any:
        try:
            return self._connection.execute(query, parameters)
        except self._duckdb.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: damaged, or changed since it was opened: {' '.join(str(error).split())}")


def _among(features: np.ndarray) -> str:
    """SQL for: one of these ascending features.  As a range where it is one: that skips most of a file."""
    low, high = int(features[0]), int(features[-1])
    if len(features) == 1:
        return f"feature = {low}"
    whole = f"feature BETWEEN {low} AND {high}"
    return (
        whole if high - low + 1 == len(features) else f"{whole} AND feature IN ({', '.join(map(str, features.tolist()))})"
    )
