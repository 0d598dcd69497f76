"""Attribution and the feature store."""

from __future__ import annotations

import json

from benchmarks.tables._markdown import grid, number, of, shape, source, times
from benchmarks.tables._region import RESULTS, table

ATTRIBUTION, STORE = (RESULTS / "amd-epyc-2-threads" / f"{name}.json" for name in ("attribution", "store"))


@table
def attribution() -> str:
    """Integrated gradients on the entries, beside dense codes."""
    found = json.loads(ATTRIBUTION.read_text("utf-8"))
    rows = []
    for each in found["results"]:
        seconds = each["seconds"]
        rows.append([str(each["blocks"]), *(f"{number(seconds[name])} s" for name in ("dense", "shortened", "sae_fast"))])
        rows[-1] += [times(each["times_faster"][f"than_{name}"]) for name in ("dense", "shortened")]
    headings = ["blocks behind the site", "dense codes", "shortened by algebra", "sae_fast", "÷ dense", "÷ shortened"]
    about = f"{shape(found['shape'])}, N = {found['steps']}; {of(found['about'])}"
    return grid(headings, rows) + source(ATTRIBUTION, about)


@table
def store() -> str:
    """Encoding into a store, and asking it."""
    found = json.loads(STORE.read_text("utf-8"))
    encoding, asked = found["results"][0]["encoding"], found["results"][0]["questions"]
    rows = [
        [shape(each["shape"]), *(f"{number(each[name])} tokens/s" for name in ("alone", "store")), number(each["ratio"])]
        for each in encoding
    ]
    size = asked["bytes"] / asked["activations"]
    questions = [
        [f"the top 20 contexts of a feature, median of {found['asked']}", f"{number(asked['median'])} ms"],
        [f"of the commonest, which fires on {number(asked['fires'])} tokens", f"{number(asked['commonest'])} ms"],
        [f"all {number(asked['bulk_contexts'])} contexts that a page shows, at once", f"{number(asked['bulk_seconds'])} s"],
        ["an activation on the disk", f"{number(size)} bytes"],
    ]
    return (
        grid(["encoding", "`encode_sparse` alone", "into a store", "ratio"], rows)
        + "\n"
        + grid([f"a store of {number(asked['activations'])} activations", ""], questions)
        + source(STORE, of(found["about"]))
    )
