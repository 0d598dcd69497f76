"""What the documents name is there: tests, files, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)


@documents
def test_every_test_that_a_document_names_exists(document):
    named = set(re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8")))
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in source} == set()
    if document.name == "README.md":
        assert len(named) > 15, "the table of features is backed by tests"


@documents
def test_every_file_that_a_document_links_to_exists(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert {link for link in links if not (document.parent / link).exists()} == set()


@documents
def test_every_heading_that_a_document_links_to_exists(document):
    """By GitHub's rule: lower case, without punctuation, a hyphen for each space."""
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = document.parent / path if path else document
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, path


@documents
def test_every_make_target_that_a_document_names_exists(document):
    targets = set(re.findall(r"`make ([a-z-]+)[^`]*`", document.read_text(encoding="utf-8")))
    made = set(re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert targets - {name for line in made for name in line.split()} == set()


def test_the_glossarys_words_are_in_the_files_that_it_names():
    entries = re.split(r"^- ", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(entries) > 20
    for entry in entries:
        text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"`([\w/]+\.py)`", entry))
        words = [word.replace(" ", ".") for word in re.findall(r"\*\*(.+?)\*\*", entry)]
        assert [word for word in words if not re.search(word, text, flags=re.I)] == [], entry
