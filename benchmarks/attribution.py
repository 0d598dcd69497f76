"""Integrated gradients over all features of a site: attribution.patch against dense formulations, in turns.

`python -m benchmarks.attribution`.  512 tokens, d = 768, F = 24 576, N = 10 points.  `dense` is the method as it is written
down and as published code has it: [512, F] codes, and at each point a decoder product and a gradient with respect to every
feature.  `shortened` is what algebra makes of that without sparsity: where features move on a line, so do the d dimensions,
and one product turns the mean gradient of these into that of the features.  Behind the site is a readout, alone or after
transformer blocks: what they cost is the same for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.data import Shape, world
from benchmarks.ending import close
from sae_fast import GatedSAE, reference
from sae_fast.analysis import attribution

TOKENS, CONTEXT, STEPS = 512, 128, 10
PROVIDERS = ("dense", "shortened", "sae_fast")
AGREE = 1e-5  # the largest difference, relative to the largest effect


class Behind(nn.Module):
    """Identity (the site), ``blocks`` transformer blocks, and one number an example."""

    def __init__(self, d: int, blocks: int):
        super().__init__()
        self.site = nn.Identity()
        layer = dict(nhead=12, dim_feedforward=4 * d, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(d, **layer) for _ in range(blocks)))
        self.readout = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.readout(self.blocks(self.site(x)))).sum((1, 2))


def dense(model: Behind, sae: GatedSAE, clean: Tensor, patch: Tensor, steps: int) -> Tensor:
    """[R, F]: integrated gradients by the midpoint rule, error kept, from dense codes."""
    parameters = (sae.W_enc, sae.b_gate, sae.b_mag, sae.r_mag, sae.b_dec)
    with torch.no_grad():
        f, f_patch = (reference.gated_encode(x.flatten(0, 1), *parameters).f for x in (clean, patch))
        rest = clean.flatten(0, 1) - f @ sae.W_dec
        mean = torch.zeros_like(f)
    for k in range(steps):
        with torch.no_grad():
            point = torch.lerp(f, f_patch, (k + 0.5) / steps)
        point.requires_grad_()
        value = model((point @ sae.W_dec.detach() + rest).view_as(clean)).sum()
        (gradient,) = torch.autograd.grad(value, point)
        mean += gradient
    return mean.mul_(f_patch - f).div_(steps)


def shortened(model: Behind, sae: GatedSAE, clean: Tensor, patch: Tensor, steps: int) -> Tensor:
    """The same from dense codes with gradients with respect to the d dimensions alone."""
    parameters = (sae.W_enc, sae.b_gate, sae.b_mag, sae.r_mag, sae.b_dec)
    with torch.no_grad():
        f, f_patch = (reference.gated_encode(x.flatten(0, 1), *parameters).f for x in (clean, patch))
        change = ((f_patch - f) @ sae.W_dec).view_as(clean)
        mean = torch.zeros_like(clean)
    for k in range(steps):
        point = (clean + (k + 0.5) / steps * change).requires_grad_()
        (gradient,) = torch.autograd.grad(model(point).sum(), point)
        mean += gradient
    with torch.no_grad():
        return (mean.flatten(0, 1) @ sae.W_dec.T).mul_(f_patch - f).div_(steps)


def sparse(model: Behind, sae: GatedSAE, clean: Tensor, patch: Tensor, steps: int) -> attribution.Effects:
    return attribution.patch(model, "site", sae, clean, patch, metric=lambda m: m, steps=steps)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


app = typer.Typer(add_completion=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of each formulation, in turns.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="A small shape: a test, not a measurement.")] = False,
    out: Annotated[Path | None, typer.Option(help="The JSON; by default in benchmarks/results/<machine>.")] = None,
) -> None:
    """Times them with 0, 1 and 6 blocks behind the site; exits with 1 if they disagree."""
    shape = Shape(B=TOKENS, d=48, F=1024, l0=16) if quick else Shape(B=TOKENS, d=768, F=24576, l0=46)
    data = world(shape, n_batches=2)
    clean, patch = (x.view(-1, CONTEXT, shape.d) for x in data.batches)
    sae = data.sae
    table = Table(title=f"integrated gradients, N = {STEPS}, at {shape}", title_justify="left")
    for heading in ("blocks behind", *PROVIDERS, "times faster", "than shortened", "largest difference"):
        table.add_column(heading, justify="right")
    others, results = machine.Others(), []
    for blocks in (0, 1) if quick else (0, 1, 6):
        torch.manual_seed(0)
        model = Behind(shape.d, blocks).eval().requires_grad_(False)
        calls: dict[str, Callable[[], Any]] = {
            "dense": partial(dense, model, sae, clean, patch, STEPS),
            "shortened": partial(shortened, model, sae, clean, patch, STEPS),
            "sae_fast": partial(sparse, model, sae, clean, patch, STEPS),
        }
        effects = sparse(model, sae, clean, patch, STEPS).to_dense()
        wanted = [calls[name]() for name in ("dense", "shortened")]
        difference = max(float((effects - each).abs().max() / each.abs().max()) for each in wanted)
        times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
        for turn in range(rounds):
            for i in range(len(PROVIDERS)):
                name = PROVIDERS[(turn + i) % len(PROVIDERS)]
                times[name].append(seconds_of(calls[name]))
        medians = {name: statistics.median(each) for name, each in times.items()}
        faster = {f"than_{name}": medians[name] / medians["sae_fast"] for name in PROVIDERS[:2]}
        results.append({"blocks": blocks, "seconds": medians, "times_faster": faster, "difference": difference})
        cells = [*(f"{medians[name]:.3f} s" for name in PROVIDERS), *(f"{each:.1f}×" for each in faster.values())]
        table.add_row(str(blocks), *cells, f"{difference:.1e}")
    console = Console()
    console.print(table)
    path = out or (None if quick else Path(__file__).parent / "results" / machine.slug() / "attribution.json")
    close(console, others, results, path, shape=str(shape), steps=STEPS)
    raise typer.Exit(int(any(result["difference"] > AGREE for result in results)))


if __name__ == "__main__":
    app()
