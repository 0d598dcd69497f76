"""Time to quality beside dictionary_learning, and the packages' own training loops with our classes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.tables._markdown import grid, number, of, shape, source, times
from benchmarks.tables._region import ROOT, newest, table

TITLES = {
    "gated": "Gated",
    "standard": "Standard",
    "april": "Standard, April update",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka BatchTopK",
    "jumprelu": "JumpReLU",
    "p_anneal": "PAnneal",
    "gated_anneal": "GatedAnneal",
}


def committed(name: str) -> tuple[Path, dict[str, Any]]:
    """The newest results of a name, and what they say."""
    path = newest(name)
    assert path is not None, name
    return path, json.loads(path.read_text("utf-8"))


@table
def quality() -> str:
    """The time that it takes to be as good as the peer at its end."""
    return _until_as_good(*committed("quality.json"))


@table
def quality_kinds() -> str | None:
    """The same of kinds that keep the largest, under their curves."""
    if newest("quality_kinds.json") is None:
        return None
    path, found = committed("quality_kinds.json")
    picture = path.with_suffix(".png").relative_to(ROOT).as_posix()
    task = found["about"]["task"]
    shown = "The same of kinds that keep the largest activations, by both packages' trainers, with the same arguments:\n\n"
    shown += f"![FVU of each kind, against the clock and against the step](/{picture})\n\n"
    return shown + _until_as_good(path, found, f"k {task['k']}, {task['steps']} steps; ")


def _until_as_good(path: Path, found: dict[str, Any], setting: str = "") -> str:
    rows = []
    for name, pair in found["pairs"].items():
        end = pair["targets"][-1]
        seconds = [f"{number(end[whose])} s" for whose in ("theirs_seconds", "ours_seconds")]
        rows.append([TITLES.get(name, name), number(end["fvu"]), number(end["l0"]), *seconds, times(end["times_sooner"])])
    headings = ["until both are within 1 % of the peer's end", "its FVU", "its L0", "dictionary_learning", "sae_fast", ""]
    return grid(headings, rows) + source(path, f"{setting}{of(found['about'])}")


@table
def fronts() -> str | None:
    """The picture of the claim on kinds, once it is made."""
    if not (ROOT / "docs" / "claims" / "kinds.json").is_file():
        return None
    said = "Kinds at equal L0 on the demo's activations, and AuxK for penalised ones ([figures](/docs/claims.md)):"
    return f"{said}\n\n![FVU against L0 of each kind, and dead features with AuxK and without](/docs/claims/kinds.png)\n"


@table
def loops() -> str:
    """How many times faster whole loops are, in a line each."""
    (theirs_path, theirs), (fit_path, fit) = committed("dictionary_learning_loop.json"), committed("saelens_loop.json")
    whole: dict[str, list[str]] = {}
    for each in theirs["results"]:
        whole.setdefault(each["kind"], []).append(times(list(each["ratios"].values())[-1]))
    rows = [[f"dictionary_learning's `trainSAE`, {TITLES[kind]}", *cells, ""][:3] for kind, cells in whole.items()]
    rows.append(
        ["SAELens' `SAETrainer.fit`, Gated", *(times(statistics.median(each["ratios"])) for each in fit["results"])]
    )
    headings = ["whole loop, times faster than with the package's own class", "from its own start", "calibrated"]
    return grid(headings, rows) + source(theirs_path, of(theirs["about"])) + source(fit_path, of(fit["about"]))


@table
def trainsae() -> str:
    """The loop of dictionary_learning: while it warms up, at its end, and all of it."""
    path, found = committed("dictionary_learning_loop.json")
    rows = []
    for each in found["results"]:
        *parts, whole = each["ratios"].items()
        l0 = {int(step): value for step, value in each["l0"].items()}
        cells = []
        for part, ratio in (parts[0], parts[-1]):
            near = l0[max(step for step in l0 if step < int(part.split("–")[1]))]
            cells.append(f"{times(ratio)}, L0 {number(near)}")
        start = "calibrated" if each["start"].startswith("calibrated") else "the package's"
        theirs = f"{number(1e3 * each['theirs_median_s'])} ms"
        rows.append([TITLES[each["kind"]], start, theirs, *cells, f"**{times(whole[1])}**"])
    task, each = found["results"][0]["task"], found["results"][0]
    first, last = (list(each["ratios"])[i].split("–") for i in (0, -2))
    at = shape(f"B={task['shape']['B']} d={task['shape']['d']} F={task['shape']['F']}")
    k = f" or k {task['k']}" if "k" in task else ""
    setting = f"{at}, λ {task['l1']}{k}, {number(task['steps'])} steps with warm-ups of {task['warmup']} and "
    setting += (
        f"{2 * task['warmup']}, the package on every {each['every']}th batch (its steps cost the same at any density), "
    )
    setting += f"calibrated to init_l0 = {task['shape']['l0']:g}"
    spans = (f"the first {number(int(first[1]))} steps", f"the last {number(int(last[1]) - int(last[0]))}")
    headings = ["", "start", "a step of dictionary_learning", *(f"the loop, {span}" for span in spans), "all of it"]
    return grid(headings, rows) + source(path, f"{setting}; {of(found['about'])}")


@table
def saelens_fit() -> str:
    """The loop of SAELens."""
    path, found = committed("saelens_loop.json")
    rows = []
    for each in found["results"]:
        seconds = [f"{_milliseconds(each, whose)} ms" for whose in ("sae_lens", "sae_fast")]
        l0 = f"{number(each['l0'][0])}, {number(each['l0'][-1])}"
        rows.append([each["start"], l0, *seconds, f"**{times(statistics.median(each['ratios']))}**"])
    headings = ["start", "L0, first and last", "a step with SAELens' class", "with sae_fast's", "times faster"]
    return grid(headings, rows) + source(path, f"medians of blocks of steps, in turns; {of(found['about'])}")


def _milliseconds(result: dict[str, Any], whose: str) -> str:
    return number(1e3 * statistics.median(result["seconds"][whose]))
