"""`sae-fast demo`."""

from __future__ import annotations

from pathlib import Path

from sae_fast.cli._common import Out, Seed, Steps, one_line_errors, show


def demo(out: Out = Path("out/demo"), steps: Steps = 1500, seed: Seed = 0) -> None:
    """Train a Gated SAE on what block 2 of MiniLM gives, over the documentation inside Python's standard library."""
    with one_line_errors():
        from sae_fast.demo import Recipe, demo_model, run
        from sae_fast.encoding import STDLIB
        from sae_fast.train.text import stdlib_documentation

        recipe = Recipe(steps=steps, seed=seed)
        result = run(demo_model(), 2, stdlib_documentation(), out, recipe, name="all-MiniLM-L6-v2", text_from=STDLIB)
        show(result, out)
