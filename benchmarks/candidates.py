"""Candidates per true entry: how much more than the support the screen lets through to the exact check.

`python -m benchmarks.candidates`.  Three kinds of batch, each with the gates calibrated on it: the benchmark's data, white
noise, and the benchmark's data with two dimensions offset by 300 σ, as massive activations are (and not in b_dec).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import results
from benchmarks.data import FULL, Shape, world
from benchmarks.registry import OURS
from sae_fast import GatedSAE
from sae_fast.ops.encode import screen

METRIC = "candidates_per_entry"
AT_MOST = 2.0
OFFSET, SIGMAS = 2, 300  # dimensions, and by how much


def candidates(sae: GatedSAE, x: Tensor) -> int:
    """How many entries of a batch pass the screen: those whose upper bound, the screening product, is above 0."""
    operands = screen.Operands(x - sae.b_dec, sae.W_enc, None, sae.b_gate, None)
    memory = torch.empty(sae.d_sae, operands.rows.shape[1], dtype=torch.bfloat16)
    bound = screen.product(operands.rows, operands.weights(0, sae.d_sae, memory), memory.new_empty(x.shape[0], sae.d_sae))
    return int((~(bound <= 0)).sum())


def noise(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(x.shape[0]))


def offset(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :OFFSET] += SIGMAS * (x - x.mean(0)).std()
    return x


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"superposition": lambda x: x, "noise": noise, "offset": offset}


@torch.no_grad()
def rows(shape: Shape) -> list[results.Row]:
    """One row a kind of batch; none where there is no screen."""
    if screen.unavailable():
        return []
    here = world(shape)
    figures = []
    for name, kind in KINDS.items():
        sae, x = here.new_sae(), kind(here.batches[0])
        sae.calibrate_(kind(torch.cat(here.batches[1:3])), shape.l0)  # not on x itself, whose entries it would keep apart
        ratio = candidates(sae, x) / sae.encode_sparse(x).nnz
        figures.append(results.row(f"screen_{name}", OURS, "forward", METRIC, str(shape), [ratio]))
    return figures


def show(console: Console, figures: list[results.Row]) -> None:
    for figure in figures:
        verdict = "[green]reached" if figure.p50 <= AT_MOST else "[red]not reached"
        console.print(f"{figure.case}: {figure.p50:.3g} candidates per true entry, wanted at most {AT_MOST:g}: {verdict}")


if __name__ == "__main__":
    show(Console(), rows(FULL))
