"""The table of all claims, from the results that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.claims import NAMES

HEAD = """\
# The paper's claims and the critique's, checked

Every row is a program in [`benchmarks/claims/`](../benchmarks/claims) that states, measures and draws it. `make claims`
runs them all on two CPU cores in less than an hour; an interrupted run goes on where it was. *The paper* is
Rajamanoharan et al. 2024 ([arXiv 2404.16014](https://arxiv.org/abs/2404.16014)), *the critique* S. Marks' comments on
[its announcement](https://www.lesswrong.com/posts/vdoiWXeouGsZEYgrg) and what followed from them, *sae_fast* what this
engine is built on. Brackets are 95 % confidence intervals over seeds (Student's t, unless a section says otherwise).
Sizes are those of two CPU cores, not the paper's: a verdict says what holds *here*. This page is written by the programs.
"""
QUICK = "**Made with `--quick`: a test of the programs, not a result.**\n"


def write(out: Path) -> Path:
    """Writes OUT/claims.md from OUT/claims/*.json, in the order of NAMES."""
    paths = [path for name in NAMES if (path := out / "claims" / f"{name}.json").is_file()]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    lines = [HEAD]
    if any(report["about"]["quick"] for report in reports):
        lines.append(QUICK)
    lines += ["| claim | by | verdict | result | checked in | command |", "|---|---|---|---|---|---|"]
    lines += [_row(report, row) for report in reports for row in report["rows"]]
    for report in reports:
        about = report["about"]
        lines += [
            "",
            f"## {report['title']}",
            "",
            report["setting"],
            "",
            f"![{report['title']}](claims/{report['claim']}.png)",
            "",
        ]
        lines += [f"{about['seeds']} seeds, on {about['device']}; {about['versions']}. What each seed measured:"]
        lines += [f"[claims/{report['claim']}.json](claims/{report['claim']}.json)."]
    page = out / "claims.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _command(report: dict[str, Any]) -> str:
    return f"`python -m benchmarks.claims {report['claim']}`"


def _row(report: dict[str, Any], row: dict[str, Any]) -> str:
    cells = (row["claim"], row["by"], f"**{row['verdict']}**", row["result"], row["checked"], _command(report))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
