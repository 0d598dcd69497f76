"""Writing a feature store: encode, sort by feature, Parquet.

Activations are made token by token and asked for feature by feature, so they are sorted on the way.  Batches gather into
runs of about RUN entries; a run is sorted by :func:`sae_fast.ops.transpose` and put on the disk; in the end each range of
features is merged from all runs into one Parquet file, named after the first of them.  Memory stays at a few runs, whatever
the number of tokens.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_fast.analysis.store import manifest
from sae_fast.analysis.store._sorting import Sorted, Source, count, sorted_runs
from sae_fast.data.activations import ActivationStore
from sae_fast.extras import require
from sae_fast.files import appear
from sae_fast.nn import SparseAutoencoder

BATCH = 4096  # tokens encoded at a time
FILE = 1 << 21  # entries in a file, about
ROW_GROUP = 1 << 16  # entries that a query reads at least: smaller groups cost more to find than they save
TOKENS = 1 << 20  # whose text is written at a time


def write_store(
    path: str | os.PathLike,
    sae: SparseAutoencoder,
    activations: Source,
    *,
    texts: Sequence[str] | None = None,
    context_length: int | None = None,
    batch_size: int = BATCH,
    overwrite: bool = False,
    progress: bool = False,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Encodes activations and writes every one above 0 into the folder ``path``; returns what its store.json says.

    activations: an ActivationStore, whose text and contexts go along; or [N, d_in], a tensor or an array (a memory map is
    read a batch at a time); or an iterable of [n, d_in].  In fp32, bf16 or fp16.
    texts: N strings, each token's own text with the white space before it, if any.  context_length: tokens per context,
    where all contexts are of one length; without it every token is a context of its own.
    batch_size: tokens encoded at a time.  (A BatchTopKSAE without a threshold chooses among those.)
    overwrite: replace a store that is there, also a damaged one; anything else that is there stays.  about: more entries
    for store.json, of other names than its own.

    The store is written beside ``path`` and renamed: whatever fails, and a Ctrl-C, leaves what was there and nothing else.
    ``FileExistsError`` for a store without ``overwrite``, one with files in it that are not its own, or a folder of
    something else; ``ValueError`` for activations that do not fit the SAE or are not finite; ``OSError`` for a full disk;
    ``MissingExtra`` without pyarrow.
    """
    require("pyarrow", extra="store")
    path = Path(path)
    manifest.check_free(path, overwrite)
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, want at least 1 token")
    if taken := sorted(manifest.RESERVED.intersection(about or {})):
        raise ValueError(f"about: got {taken[0]!r}, which store.json says of the store itself; want another name")
    if isinstance(activations, ActivationStore):
        if texts is not None or context_length is not None:
            raise ValueError("texts, context_length: an ActivationStore has its own, want neither")
        context_length = activations.context_length
        about = {name: activations.info.get(name) for name in ("model", "hook_name", "layer")} | (about or {})
    if context_length is not None and context_length < 1:
        raise ValueError(f"context_length: got {context_length}, want at least 1 token, or None")
    total = count(activations)

    def replaces() -> bool:
        manifest.check_free(path, overwrite)  # again: encoding takes its time
        return overwrite

    with appear(path.resolve(), replaces) as folder:
        if texts is not None and total is not None:
            _check_texts(texts, total)
        runs, n_tokens = sorted_runs(sae, activations, total, batch_size, progress, folder)
        if n_tokens == 0:
            raise ValueError("activations: got none, want at least one token")
        if isinstance(activations, ActivationStore):
            _write_tokens(folder, _pieces(activations), n_tokens, context_length)
        elif texts is not None:
            _check_texts(texts, n_tokens)
            _write_tokens(folder, map(_split, texts), n_tokens, context_length)
        _merge(runs, sae.d_sae, n_tokens, folder)
        shutil.rmtree(folder / "runs")
        counts = dict(n_tokens=n_tokens, context_length=context_length, n_activations=sum(run.nnz for run in runs))
        return manifest.write(folder, sae, counts, about or {})


def _check_texts(texts: Sequence[str], n_tokens: int) -> None:
    if len(texts) != n_tokens:
        raise ValueError(f"texts: got {len(texts)} of {n_tokens} tokens, want one of each")


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _merge(runs: list[Sorted], d_sae: int, n_tokens: int, folder: Path) -> None:
    """activations/*.parquet, each a range of features of about RUN entries, and features.parquet."""
    import pyarrow as pa

    (folder / "activations").mkdir()
    schema = pa.schema([("token", pa.int64()), ("feature", pa.int32()), ("activation", pa.float32())])
    # Tokens ascend within a feature, so their differences are small.
    encoding = dict(use_dictionary=["feature"], column_encoding={"token": "DELTA_BINARY_PACKED", "activation": "PLAIN"})
    fires = np.sum([np.diff(run.colptr) for run in runs], axis=0)
    low, high, total = (np.zeros(d_sae, dtype) for dtype in (np.float32, np.float32, np.float64))

    def merge(begin: int, end: int) -> None:
        tokens, values = (np.concatenate(parts) for parts in zip(*(run.read(begin, end) for run in runs), strict=True))
        features = np.concatenate([np.repeat(np.arange(begin, end, dtype=np.int32), run.fires(begin, end)) for run in runs])
        if len(runs) > 1:
            order = np.argsort(features, kind="stable")
            features, tokens, values = features[order], tokens[order], values[order]
        columns = [pa.array(column) for column in (tokens, features, values)]
        file = folder / "activations" / f"{begin:08}.parquet"
        _write(file, pa.Table.from_arrays(columns, schema=schema), **encoding)
        alive = begin + np.flatnonzero(fires[begin:end])
        if len(alive):
            starts = np.cumsum(fires[alive]) - fires[alive]
            low[alive], high[alive] = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
            total[alive] = np.add.reduceat(values, starts, dtype=np.float64)

    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        try:
            for done in [threads.submit(merge, *features) for features in _ranges(fires, FILE)]:
                done.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    table = dict(feature=np.arange(d_sae, dtype=np.int32), fires=fires, density=fires / n_tokens, maximum=high)
    table |= dict(mean=(total / np.maximum(fires, 1)).astype(np.float32), minimum=low)
    _write(folder / "features.parquet", pa.table(table))


def _ranges(fires: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Ranges of features, in order, of at most ``size`` entries each unless a single feature has more."""
    ends, held = [], 0
    for feature, n in enumerate(fires.tolist()):
        if held and held + n > size:
            ends.append(feature)
            held = 0
        held += n
    ends.append(len(fires))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _write_tokens(folder: Path, pieces: Iterator[tuple[str, str]], n_tokens: int, context_length: int | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict(token=pa.int64(), context=pa.int64(), position=pa.int32(), text=pa.string(), gap=pa.string())
    schema, length = pa.schema(names.items()), context_length or 1
    with pq.ParquetWriter(folder / "tokens.parquet", schema, compression="zstd") as writer:
        for begin in range(0, n_tokens, TOKENS):
            token = np.arange(begin, min(begin + TOKENS, n_tokens))
            gaps, texts = zip(*(piece for _, piece in zip(token, pieces, strict=False)), strict=True)
            columns = [token, token // length, (token % length).astype(np.int32), texts, gaps]
            arrays = [pa.array(column, type=kind) for column, kind in zip(columns, names.values(), strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP)


def _pieces(activations: ActivationStore) -> Iterator[tuple[str, str]]:
    """(what the text has between the token before and this one, its own text), of every token.  Of a character that
    several tokens make up, the first has the text."""
    text, end = activations.text, None
    for begin in range(0, activations.n_tokens, TOKENS):
        for left, right in activations.spans[begin : begin + TOKENS].tolist():
            end = left if end is None else end
            gap, own = _split(text[max(left, end) : right])
            yield text[end:left] + gap, own
            end = max(end, right)


def _split(piece: str) -> tuple[str, str]:
    """(white space before, the rest); a piece of nothing but white space is its own text."""
    own = piece.lstrip() or piece
    return piece[: len(piece) - len(own)], own


def _write(file: Path, table: Any, **encoding: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, file, compression="zstd", row_group_size=ROW_GROUP, **encoding)
