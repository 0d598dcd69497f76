"""Encoding into sorted runs: what :mod:`sae_fast.analysis.store.writer` merges into a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_fast import ops
from sae_fast.code import SparseCode
from sae_fast.data.activations import ActivationStore
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.base import INPUT_DTYPES

RUN = 1 << 23  # entries sorted at a time
FLOATS = (np.float16, np.float32, np.float64)

Source = ActivationStore | Tensor | np.ndarray | Iterable[Tensor]


@dataclass
class Sorted:
    """Some tokens' entries, by feature and then by token.  colptr [F+1]: where each feature's begin.  The two files hold
    each entry's token, counted from ``first`` (int32), and its activation (float32)."""

    first: int
    colptr: np.ndarray
    files: tuple[Path, Path]

    @property
    def nnz(self) -> int:
        return int(self.colptr[-1])

    def fires(self, begin: int, end: int) -> np.ndarray:
        """[end − begin]: the entries of each of features begin to end − 1."""
        return np.diff(self.colptr[begin : end + 1])

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64, activations float32) of features begin to end − 1."""
        first, n = int(self.colptr[begin]), int(self.colptr[end] - self.colptr[begin])
        kinds = zip(self.files, (np.int32, np.float32), strict=True)
        rows, values = (np.fromfile(file, kind, count=n, offset=4 * first) for file, kind in kinds)
        return rows.astype(np.int64) + self.first, values


@dataclass
class _Gathered:
    """The entries above 0 of batches, until they are a run."""

    first: int = 0
    rows: int = 0
    nnz: int = 0
    counts: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, code: SparseCode) -> None:
        indptr, indices, values = code.indptr, code.indices, code.magnitudes
        if not bool((fires := values > 0).all()):
            before = torch.zeros(code.nnz + 1, dtype=torch.int64, device=fires.device)
            torch.cumsum(fires, 0, out=before[1:])
            indptr, indices, values = before[indptr], indices[fires], values[fires]
        self.counts.append(indptr.diff().cpu())
        self.indices.append(indices.cpu())
        self.values.append(values.float().cpu())
        self.rows += code.batch
        self.nnz += len(self.indices[-1])

    def sort(self, d_sae: int, folder: Path) -> Sorted:
        """Sorted by feature, into files in ``folder``."""
        indptr = torch.zeros(self.rows + 1, dtype=torch.int64)
        torch.cumsum(torch.cat(self.counts), 0, out=indptr[1:])
        indices, values = torch.cat(self.indices), torch.cat(self.values)
        code = SparseCode(torch.Size((self.rows, d_sae)), indptr, indices, values, values[None])
        csc = ops.transpose(code)
        files = (folder / f"{self.first}.tokens", folder / f"{self.first}.activations")
        for file, column in zip(files, (csc.rows, values[csc.perm]), strict=True):
            file.write_bytes(column.numpy().data)
        return Sorted(self.first, csc.colptr.numpy(), files)


def sorted_runs(
    sae: SparseAutoencoder, activations: Source, total: int | None, batch_size: int, progress: bool, folder: Path
) -> tuple[list[Sorted], int]:
    """(the sorted runs, the number of tokens)."""
    (folder / "runs").mkdir()
    runs, gathered = [], _Gathered()
    bar = tqdm(total=total, desc="encode", unit="tok", unit_scale=True, dynamic_ncols=True, disable=not progress)
    with bar, torch.inference_mode(), sae.frozen():
        for x in _batches(activations, batch_size):
            _check(sae, x, gathered.first + gathered.rows)
            gathered.add(sae.encode_sparse(x.to(sae.W_enc.device)))
            if gathered.nnz >= RUN:
                runs.append(gathered.sort(sae.d_sae, folder / "runs"))
                gathered = _Gathered(first=gathered.first + gathered.rows)
            bar.update(len(x))
        if gathered.rows:
            runs.append(gathered.sort(sae.d_sae, folder / "runs"))
    return runs, gathered.first + gathered.rows


def count(activations: Source) -> int | None:
    """The number of tokens, where it is known before they are read."""
    if isinstance(activations, ActivationStore):
        return activations.n_tokens
    return len(activations) if isinstance(activations, (Tensor, np.ndarray)) and activations.ndim else None


def _batches(activations: Source, batch_size: int) -> Iterator[Tensor]:
    if isinstance(activations, ActivationStore):
        yield from activations.chunks(batch_size)
    elif isinstance(activations, (Tensor, np.ndarray)):
        if activations.ndim != 2:
            raise ValueError(f"activations: got shape {tuple(activations.shape)}, want [N, d_in]")
        if isinstance(activations, np.ndarray) and activations.dtype.newbyteorder("=") not in FLOATS:
            raise ValueError(f"activations: got {activations.dtype}, want float32 or float16")
        for begin in range(0, len(activations), batch_size):
            piece = activations[begin : begin + batch_size]
            yield piece if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece, piece.dtype.newbyteorder("=")))
    else:
        for given in activations:
            if not isinstance(given, Tensor) or given.dim() != 2:
                got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"activations: got {got} in an iterable, want tensors [n, d_in]")
            yield from given.split(batch_size)


def _check(sae: SparseAutoencoder, x: Tensor, first: int) -> None:
    """Checks what the layer checks too, which knows neither a token's number nor, on a GPU, what is not finite."""
    if x.shape[1] != sae.d_in:
        raise ValueError(f"activations: got {x.shape[1]} dimensions, want d_in = {sae.d_in} of this {type(sae).__name__}")
    if x.dtype not in (*INPUT_DTYPES, sae.W_enc.dtype):
        raise ValueError(f"activations: got {x.dtype}, want one of {', '.join(map(str, INPUT_DTYPES))}")
    if not x.isfinite().all():
        token, dimension = (~x.isfinite()).nonzero()[0].tolist()
        where = f"at token {first + token}, dimension {dimension}"
        raise ValueError(f"activations: got {float(x[token, dimension])} {where}, want finite numbers")
