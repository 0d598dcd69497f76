"""What `make demo` prints at its end, from the metrics of one run that are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks import jsonfile, machine
from benchmarks.tables._markdown import grid, of, source
from benchmarks.tables._region import RESULTS, ROOT, newest, table
from sae_fast.runs.train import summary

KEPT = ("held_out", "training", "step", "recipe")


def kept(results: Path = RESULTS) -> Path | None:
    """The newest demo.json, of whichever machine; None before there is one."""
    return newest("demo.json", results)


def keep(metrics: Path, results: Path = RESULTS, picture: Path = ROOT / "docs" / "demo_training.png") -> Path:
    """Stores a run's metrics.json as this machine's, and its picture beside the documents; returns the path.

    FileNotFoundError without the run, ValueError for a file of something else.
    """
    run = json.loads(metrics.read_text("utf-8"))
    if missing := [name for name in KEPT if name not in run]:
        raise ValueError(f"{metrics}: got no {', '.join(missing)}, want the metrics.json of a demo")
    path = results / machine.slug() / "demo.json"
    jsonfile.write(path, {"about": machine.about()} | {name: run[name] for name in KEPT})
    shutil.copyfile(metrics.with_name("training.png"), picture)
    return path


@table
def demo() -> str | None:
    """The closing table, once a run is kept."""
    path = kept()
    if path is None:
        return None
    run = json.loads(path.read_text("utf-8"))
    held_out = run["held_out"]
    rows = summary(held_out, run["training"], run["step"])
    return grid([f"on {held_out['tokens']:,} held-out tokens", ""], rows) + source(path, of(run["about"]))
