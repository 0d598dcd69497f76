"""Time to quality beside dictionary_learning, and the packages' own training loops with our classes."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.tables._markdown import grid, number, of, shape, source, times
from benchmarks.tables._region import RESULTS, table

QUALITY = RESULTS / "intel-r-xeon-r-processor-2-threads" / "quality.json"
TRAINSAE = RESULTS / "amd-epyc-2-threads" / "dictionary_learning_loop.json"
FIT = RESULTS / "amd-epyc-2-threads" / "saelens_loop.json"


@table
def quality() -> str:
    """The time that it takes to be as good as the peer at its end."""
    found = json.loads(QUALITY.read_text("utf-8"))
    rows = []
    for name, pair in found["pairs"].items():
        end = pair["targets"][-1]
        seconds = [f"{number(end[whose])} s" for whose in ("theirs_seconds", "ours_seconds")]
        rows.append([name, number(end["fvu"]), number(end["l0"]), *seconds, times(end["times_sooner"])])
    headings = ["until both are within 1 % of the peer's end", "its FVU", "its L0", "dictionary_learning", "sae_fast", ""]
    return grid(headings, rows) + source(QUALITY, of(found["about"]))


@table
def loops() -> str:
    """How many times faster whole loops are, in a line each."""
    theirs, fit = (json.loads(path.read_text("utf-8")) for path in (TRAINSAE, FIT))
    rows = [
        ["dictionary_learning's `trainSAE`", *(times(list(each["ratios"].values())[-1]) for each in theirs["results"])],
        ["SAELens' `SAETrainer.fit`", *(times(statistics.median(each["ratios"])) for each in fit["results"])],
    ]
    headings = ["whole loop, times faster than with the package's own class", "from its own start", "calibrated"]
    return grid(headings, rows) + source(TRAINSAE, of(theirs["about"])) + source(FIT, of(fit["about"]))


@table
def trainsae() -> str:
    """The loop of dictionary_learning, part by part."""
    found = json.loads(TRAINSAE.read_text("utf-8"))
    rows = []
    for each in found["results"]:
        l0 = {int(step): value for step, value in each["l0"].items()}
        for part, ratio in each["ratios"].items():
            first, last = (int(end) for end in part.split("–"))
            whole = last - first == each["task"]["steps"]
            near = l0[max(step for step in l0 if step < last)]
            steps = f"all {number(last)}" if whole else f"{number(first)}–{number(last)}"
            faster = f"**{times(ratio)}**" if whole else times(ratio)
            rows.append([each["start"], steps, number(near), f"{number(1e3 * each['theirs_median_s'])} ms", faster])
    task = found["results"][0]["task"]
    at = shape(f"B={task['shape']['B']} d={task['shape']['d']} F={task['shape']['F']}")
    setting = f"{at}, λ {task['l1']}, warm-ups of {task['warmup']} and {2 * task['warmup']} steps, the package on every "
    setting += f"{found['results'][0]['every']}th batch; its steps cost the same at any density"
    headings = ["start", "steps", "L0 at their end", "a step of dictionary_learning", "the loop, times faster"]
    return grid(headings, rows) + source(TRAINSAE, f"{setting}; {of(found['about'])}")


@table
def saelens_fit() -> str:
    """The loop of SAELens."""
    found = json.loads(FIT.read_text("utf-8"))
    rows = []
    for each in found["results"]:
        seconds = [f"{_milliseconds(each, whose)} ms" for whose in ("sae_lens", "sae_fast")]
        l0 = f"{number(each['l0'][0])}, {number(each['l0'][-1])}"
        rows.append([each["start"], l0, *seconds, f"**{times(statistics.median(each['ratios']))}**"])
    headings = ["start", "L0, first and last", "a step with SAELens' class", "with sae_fast's", "times faster"]
    return grid(headings, rows) + source(FIT, f"medians of blocks of steps, in turns; {of(found['about'])}")


def _milliseconds(result: dict[str, Any], whose: str) -> str:
    return number(1e3 * statistics.median(result["seconds"][whose]))
