"""Dense helpers: for the reference bodies, and for batches so dense that a matrix product beats gathering rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_fast.code import row_ids
from sae_fast.ops.dispatch import may_run
from sae_fast.ops.native import _C, threads

# nnz / (B · F) above which an op of the C++ engine takes its dense route, from a sweep at B 2048, d 768, F 24576 on
# two Sapphire Rapids cores.  The route depends on the arguments only, never on timing, so runs repeat bit for bit.
CROSSOVER = {"decode": 0.25, "sampled_dots": 0.22, "decode_loss": 0.35, "outer": 0.22, "weight_step": 0.12, "step": 0.11}
# The same for every op on a GPU: gathers at 2.7 TB/s against an fp32 product at 60 TFLOP/s, modelled, not measured.
GPU_DENSE = 0.03
CHUNK = 2**23  # floats in a dense chunk: 32 MiB
GPU_CHUNK = 2**26  # on a GPU, which reads all weights once a chunk: 256 MiB


def is_dense(op: str, nnz: int, rows: int, features: int) -> bool:
    return nnz > CROSSOVER[op] * rows * features


def gpu_rejects(nnz: int, rows: int, features: int) -> str | None:
    """The reason why a GPU should not gather rows for this many entries, or None; a forced body takes any number."""
    if nnz <= GPU_DENSE * rows * features or not may_run("reference"):
        return None
    return f"the code is dense: {nnz} entries of {rows} × {features}"


def to_dense(indptr: Tensor, indices: Tensor, values: Tensor, features: int) -> Tensor:
    """[B, F] from CSR values [nnz], in plain PyTorch."""
    dense = torch.zeros(indptr.shape[0] - 1, features, dtype=values.dtype, device=values.device)
    dense[row_ids(indptr, values.shape[0]), indices.long()] = values
    return dense


def chunks(n: int, width: int, device: str = "cpu") -> Iterator[tuple[int, int]]:
    """Runs [first, last) of n rows such that a [last − first, width] block stays small."""
    step = max(1, min(n, (CHUNK if device == "cpu" else GPU_CHUNK) // max(width, 1)))
    return ((first, min(first + step, n)) for first in range(0, n, step))


def scatter(indptr: Tensor, indices: Tensor, perm: Tensor | None, first: int, last: int, values: Tensor, out: Tensor):
    """Rows first .. last of a CSR (or, with ``perm``, a CSC) as dense ``out`` [last − first, width], by the engine."""
    _C.scatter(
        indptr=indptr, indices=indices, perm=perm, first=first, n=last - first, width=out.shape[1], values=values, out=out,
        threads=threads(),
    )  # fmt: skip
    return out


def gather(indptr: Tensor, indices: Tensor, first: int, last: int, dense: Tensor, out: Tensor) -> None:
    """The entries of rows first .. last from dense rows, into out [nnz], by the engine."""
    _C.gather(
        indptr=indptr, indices=indices, first=first, n=last - first, width=dense.shape[1], dense=dense, out=out,
        threads=threads(),
    )  # fmt: skip
