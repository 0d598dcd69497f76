"""`sae-fast demo`."""

from __future__ import annotations

from pathlib import Path

from sae_fast.cli._common import (
    Device,
    Kind,
    Out,
    Overwrite,
    Quiet,
    SaveEvery,
    Seed,
    Steps,
    bars,
    notes,
    one_line_errors,
    show,
)

ORDER = 0  # in the list of commands


def demo(
    out: Out = Path("out/demo"),
    kind: Kind = "gated",
    steps: Steps = 1500,
    seed: Seed = 0,
    device: Device = None,
    save_every: SaveEvery = 5,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train an SAE on what block 2 of MiniLM gives, over the documentation inside Python's standard library.

    A Gated SAE's step is timed against dense PyTorch's too, at the end.
    """
    with one_line_errors(), notes():
        from sae_fast.data.text import stdlib_documentation
        from sae_fast.demo import demo_model
        from sae_fast.devices import usable
        from sae_fast.runs.source import STDLIB
        from sae_fast.runs.train import Recipe, run

        recipe = Recipe(steps=steps, seed=seed, device=str(usable(device, "--device")), kind=kind)
        result = run(
            demo_model(), 2, stdlib_documentation(), out, recipe, name="all-MiniLM-L6-v2", text_from=STDLIB,
            overwrite=overwrite, save_minutes=save_every, compare=kind == "gated", progress=bars(quiet),
        )  # fmt: skip
        if not quiet:
            show(result, out)
