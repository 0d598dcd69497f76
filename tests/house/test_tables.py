"""No measured figure stands in README.md or docs/ that a committed result does not hold."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import jsonfile, tables
from benchmarks.claims import _page
from benchmarks.data import FULL, SMALL, Shape
from benchmarks.results import Row
from benchmarks.results import write as write_rows
from benchmarks.tables import __main__, _figures, _markdown, _region, demo

ROOT = Path(__file__).parents[2]
UNITS = r"(?:ms|µs|s|minutes?|seconds?|hours?|tokens/s|[kKMG]i?B|[GT]B/s|TFLOP/s|x|%)(?![\w/-])|×(?!\s?\d)"
FIGURE = re.compile(rf"(?<![\w.])\d+(?:[.,–]\d+| \d{{3}})*\s?(?:{UNITS})")
NOT_MEASURED = {  # what looks like it and is none: sizes of what is kept, limits that are set, arithmetic
    "README.md": {
        "0.7 GB": "the activations that the demo keeps: tokens × 384 × 4 bytes",
        "8 minutes": "the limit that make gpu sets itself",
        "3 %": "the density from which a GPU's step is dense, GPU_DENSE",
    },
    "developing.md": {"2 GB": "the packages that .venv-peers installs"},
    "kernels.md": {
        "34 MB": "128 columns of the large W",
        "17 MB": "512 columns of a large batch",
        "1.15 ×": "from when on a CUDA body ships, EARNS",
    },
    "report.md": {"12 MB": "what the test of the page asks for", "4 s": "likewise"},
    "screen.md": {"16 ×": "from when on a column is an outlier", "3 %": "GPU_DENSE"},
}
documents = pytest.mark.parametrize("document", tables.documents(), ids=lambda path: path.name)


def figures(text: str) -> list[str]:
    """What looks like a measured figure outside of the tables."""
    return [found[0] for found in FIGURE.finditer(_region.REGION.sub("", text))]


@documents
def test_the_tables_are_what_the_results_say(document):
    assert document.read_text("utf-8") == tables.filled(document), "python -m benchmarks.tables writes them"


@documents
def test_no_figure_is_written_by_hand(document):
    """A measured figure belongs into a table of `benchmarks.tables`; what is none belongs into the list above."""
    found, allowed = figures(document.read_text("utf-8")), NOT_MEASURED.get(document.name, {})
    assert set(found) == set(allowed)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("takes 4 009 ms, 37 × less", ["4 009 ms", "37 ×"]),
        ("1.5 s, 12.5 GB and 40,815 tokens/s", ["1.5 s", "12.5 GB", "40,815 tokens/s"]),
        ("5–15 % in two minutes or 8 minutes", ["5–15 %", "8 minutes"]),
        ("3.5×, 1.5x, 2.99 TB/s, 20–30 µs", ["3.5×", "1.5x", "2.99 TB/s", "20–30 µs"]),
        ("tiles of 128 × 256, B 4 096, radius=4.0, s=3, sm_90, 8 samples, x86-64", []),
        ("<!-- table: step -->\n4 009 ms\n<!-- /table -->\n", []),
    ],
)
def test_what_a_figure_looks_like(text, found):
    assert figures(text) == found


def test_every_table_stands_in_one_document():
    text = "\n".join(document.read_text("utf-8") for document in tables.documents())
    assert sorted(name for _, name, *_ in _region.REGION.findall(text)) == sorted(tables.TABLES)


def test_a_table_is_filled_and_its_links_lead_to_the_root(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "step", lambda: "| [a](/b/c.csv) |\n")
    text = "before\n<!-- table: step -->\nold\n<!-- /table -->\nafter\n"
    assert tables.fill(text, "../") == "before\n<!-- table: step -->\n| [a](../b/c.csv) |\n<!-- /table -->\nafter\n"
    monkeypatch.setitem(tables.TABLES, "step", lambda: None)
    assert tables.fill(text) == text, "where nothing is measured yet, what stands there stays"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<!-- table: speed -->\n<!-- /table -->\n", "table: got 'speed', want one of attribution, "),
        ("<!-- table: step -->\n", "got a table without its end"),
        ("<!-- /table -->\n", "got a table without its end"),
        ("<!-- table: step -->\n<!-- table: rivals -->\n<!-- /table --><!-- /table -->\n", "want them in pairs"),
    ],
)
def test_a_document_that_cannot_be_filled_says_why(text, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        tables.fill(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(4058.96, "4 059"), (999.6, "1 000"), (113.42, "113"), (21.53, "21.5"), (0.1, "0.100"), (0, "0"), (24576, "24 576")],
)
def test_numbers(value, text):
    assert _markdown.number(value) == text


def test_cells_are_the_csvs_own():
    with tables.cpu.CSV.open(newline="") as file:
        times = {row["provider"]: float(row["p50"]) for row in csv.DictReader(file)
                 if (row["case"], row["metric"], row["x"]) == ("step", "time", str(FULL))}  # fmt: skip
    line = next(line for line in tables.TABLES["step"]().splitlines() if line.startswith("| eager PyTorch"))
    eager, ours, product = times["eager"], times["sae_fast"], times["bare_product"]
    assert [cell.strip() for cell in line.split("|")][2:5] == [
        f"{eager:,.0f} ms".replace(",", " "), _markdown.number(eager / product), f"{_markdown.number(eager / ours)} ×",
    ]  # fmt: skip


def test_a_step_of_each_kind_is_shown_once_it_is_measured(tmp_path, monkeypatch):
    """Made up: of each case 10 ms ours, 20 of the product, 100 of the peer's, and a MiB of memory against four."""
    monkeypatch.setattr(_markdown, "ROOT", tmp_path)
    monkeypatch.setattr(tables.cpu, "CSV", tmp_path / "made.csv")
    found = {("sae_fast", "time"): 10, ("bare_product", "time"): 20, ("dictionary_learning", "time"): 100,
             ("sae_fast", "peak_memory"): 1, ("dictionary_learning", "peak_memory"): 4}  # fmt: skip

    def write(cases):
        rows = [
            Row(case, who, "train", metric, "", str(at), value, value, value, "a machine", "torch 2", "abc", "2026-12-01")
            for case in cases for at in (FULL, SMALL) for (who, metric), value in found.items()
        ]  # fmt: skip
        (tmp_path / "made.csv").unlink(missing_ok=True)
        write_rows(tmp_path / "made.csv", rows)

    write(["step"])
    assert tables.TABLES["kinds"]() is None, "no other kind is measured yet"
    write(["step", "kind_topk"])
    lines = tables.TABLES["kinds"]().split("\n\n", 1)[1].splitlines()
    assert lines[2] == "| Gated | 10.0 ms | 0.500 | 10.0 × | 0.25 | 0.500 | 10.0 × |"
    assert lines[3].startswith("| TopK |") and lines[4] == "", "what is not measured has no row"


def test_the_newest_result_of_a_name_is_shown(tmp_path):
    assert _region.newest("loop.json", tmp_path) is None
    for machine, about in (("a", {"date": "2026-12-01"}), ("b", {}), ("c", {"date": "2026-11-30"})):
        jsonfile.write(tmp_path / machine / "loop.json", {"about": about})
    assert _region.newest("loop.json", tmp_path) == tmp_path / "a" / "loop.json"


def test_the_loops_of_each_kind_stand_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(_markdown, "ROOT", tmp_path)
    task = {"shape": {"B": 8, "d": 4, "F": 32, "l0": 2.0}, "l1": 2.5, "k": 3, "warmup": 2, "steps": 30}
    ratios, l0 = {"0–2": 2.0, "2–20": 4.0, "20–30": 6.0, "0–30": 5.0}, {"0": 3.0, "1": 3.0, "16": 3.0}
    each = {"kind": "topk", "start": "the package's", "task": task, "every": 5, "ratios": ratios, "l0": l0}
    each["theirs_median_s"] = 0.2
    about = {"device": "a machine", "commit": "abc", "date": "2026-12-01"}
    jsonfile.write(tmp_path / "loop.json", {"about": about, "results": [each, each | {"kind": "gated"}]})
    fit = {"about": about, "results": [{"ratios": [2.0, 3.0, 4.0]}, {"ratios": [5.0]}]}
    jsonfile.write(tmp_path / "fit.json", fit)
    paths = {"dictionary_learning_loop.json": tmp_path / "loop.json", "saelens_loop.json": tmp_path / "fit.json"}
    monkeypatch.setattr(tables.peers, "newest", paths.get)
    loops = tables.TABLES["loops"]()
    assert "| dictionary_learning's `trainSAE`, TopK | 5.0 × |  |" in loops
    assert "| SAELens' `SAETrainer.fit`, Gated | 3.0 × | 5.0 × |" in loops
    lines = tables.TABLES["trainsae"]().splitlines()
    assert lines[0].count("the first 2 steps") == lines[0].count("the last 10") == 1
    assert lines[2] == "| TopK | the package's | 200 ms | 2.0 ×, L0 3.00 | 6.0 ×, L0 3.00 | **5.0 ×** |"
    assert "λ 2.5 or k 3, 30 steps with warm-ups of 2 and 4" in lines[-1] and "2026-12-01" in lines[-1]


def test_curves_and_fronts_of_the_kinds_are_shown_once_they_are_there(tmp_path, monkeypatch):
    for module in (_markdown, tables.peers):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert tables.TABLES["fronts"]() is None
    jsonfile.write(tmp_path / "docs" / "claims" / "kinds.json", {})
    assert "](/docs/claims/kinds.png)" in tables.TABLES["fronts"]()
    monkeypatch.setattr(tables.peers, "newest", lambda name: None)
    assert tables.TABLES["quality_kinds"]() is None
    end = {"fvu": 0.1, "l0": 32.0, "theirs_seconds": 60.0, "ours_seconds": 6.0, "times_sooner": 10.0}
    about = {"device": "a machine", "commit": "abc", "task": {"k": 32, "steps": 500}}
    jsonfile.write(tmp_path / "quality_kinds.json", {"about": about, "pairs": {"batchtopk": {"targets": [end]}}})
    monkeypatch.setattr(tables.peers, "newest", tmp_path.joinpath)
    shown = tables.TABLES["quality_kinds"]()
    assert "](/quality_kinds.png)" in shown and "| BatchTopK | 0.100 | 32.0 | 60.0 s | 6.00 s | 10.0 × |" in shown


def test_formulas_are_what_they_come_to():
    shape = Shape(B=8, d=3, F=64, l0=2)
    wanted = 4 * 16 * 3 + 4 * 8 * 3 + 8 * 64 / 8 + 4 * 64 * (1 - math.exp(-16 / 64)) * 3
    assert tables.kernels._sum(shape, "4nd + 4Bd + 8F/8 + 4td") == pytest.approx(wanted)


def test_a_figure_that_was_not_measured_is_an_error():
    with pytest.raises(ValueError, match=r"got no row step, nobody, time, .*, want what a document shows"):
        _figures.Figures(tables.cpu.CSV)("step", "nobody")


def test_check_shows_what_differs_and_writes_nothing(monkeypatch):
    before = {document: document.read_bytes() for document in tables.documents()}
    monkeypatch.setitem(tables.TABLES, "candidates", lambda: "| another |\n")
    result = CliRunner().invoke(__main__.app, ["--check"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "+| another |" in result.output and "-| white noise |" in result.output and "--- docs/screen.md" in result.output
    assert before == {document: document.read_bytes() for document in tables.documents()}
    monkeypatch.undo()
    assert CliRunner().invoke(__main__.app, ["--check"], catch_exceptions=False).exit_code == 0


def test_a_demo_is_kept_and_shown(tmp_path, monkeypatch):
    run, results, picture = tmp_path / "run", tmp_path / "results", tmp_path / "demo_training.png"
    (run / "metrics.json").parent.mkdir()
    held_out = {"l0": 30.52, "fvu": 0.08231, "relative_reconstruction_bias": 0.9991, "dead_fraction": 0.0, "tokens": 43008}
    metrics = {
        "held_out": held_out, "training": {"seconds": 37.6, "tokens_per_second": 40815.2, "scale": 1.0},
        "step": {"engine_ms": 21.96, "dense_ms": 205.8, "times_faster": 9.37}, "recipe": {"d_sae": 6144},
        "source": {"text_from": "/somewhere"}, "history": [{"step": 0}],
    }  # fmt: skip
    jsonfile.write(run / "metrics.json", metrics)
    (run / "training.png").write_bytes(b"drawn")
    path = demo.keep(run / "metrics.json", results, picture)
    assert path.parent.parent == results and picture.read_bytes() == b"drawn"
    kept = json.loads(path.read_text())
    assert kept["held_out"] == held_out and set(kept) == {"about", *demo.KEPT}, "no history, and no paths of a machine"
    old = results / "another" / "demo.json"
    jsonfile.write(old, kept | {"about": kept["about"] | {"date": "2026-01-01"}})
    assert demo.kept(results) == path, "the newest"
    monkeypatch.setattr(demo, "kept", lambda: path)
    monkeypatch.setattr(_markdown, "ROOT", tmp_path)
    table = tables.TABLES["demo"]()
    for cell in ("on 43,008 held-out tokens", "30.5", "0.0823", "40,815 tokens/s", "22.0 ms", "205.8 ms", "9.4×"):
        assert cell in table
    jsonfile.write(run / "metrics.json", {"step": {}})
    with pytest.raises(ValueError, match=r"metrics.json: got no held_out, training, recipe, want"):
        demo.keep(run / "metrics.json", results, picture)


def test_the_claims_page_is_what_its_results_say(tmp_path):
    shutil.copytree(ROOT / "docs" / "claims", tmp_path / "claims", ignore=shutil.ignore_patterns("*.png"))
    assert _page.write(tmp_path).read_text("utf-8") == (ROOT / "docs" / "claims.md").read_text("utf-8")
