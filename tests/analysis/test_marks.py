"""Marks: what is written is read, another SAE's are refused, and a file that is none says so."""

import json
import os

import pytest

import sae_fast as sf
from sae_fast.analysis.marks import Marks
from sae_fast.nn.identity import fingerprint


@pytest.fixture(scope="module")
def sae():
    return sf.GatedSAE(6, 16, seed=0)


@pytest.fixture
def file(tmp_path, sae):
    return Marks.of(sae, {12: "irrelevant", 4: "relevant", 3: "irrelevant"}, {12: "naïve “pronouns”"}).write(
        tmp_path / "m.json"
    )


def test_marks_are_read_as_they_were_written(file, sae):
    marks = Marks.read(file, sae)
    assert marks.irrelevant == [3, 12] and marks.relevant == [4] and marks.notes == {12: "naïve “pronouns”"}
    value = json.loads(file.read_text(encoding="utf-8"))
    assert value["format"] == "sae_fast.marks" and value["version"] == 1 and value["d_sae"] == 16
    assert value["sae"] == fingerprint(sae) and value["marks"]["4"] == "relevant"
    assert os.listdir(file.parent) == ["m.json"]


def test_a_file_may_have_no_notes_and_no_marks(tmp_path, sae):
    assert Marks.read(Marks.of(sae, {}).write(tmp_path / "m.json"), sae).irrelevant == []


def test_marks_are_of_the_weights_not_of_the_object(file, sae):
    same = sf.GatedSAE(6, 16, seed=1)
    with pytest.raises(ValueError, match=rf"m.json: got marks of SAE {fingerprint(sae)} of 16 features"):
        Marks.read(file, same)
    same.load_state_dict(sae.state_dict())
    assert Marks.read(file, same).irrelevant == [3, 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "sae_fast.store"}, "got format 'sae_fast.store', want 'sae_fast.marks'"),
        ({"version": 2}, "got version 2, want 1"),
        ({"marks": {"16": "irrelevant"}}, "got feature 16, want 0 to 15"),
        ({"marks": {"-1": "irrelevant"}}, "got feature '-1', want a number"),
        ({"marks": {"03": "irrelevant"}}, "got feature '03', want a number"),
        ({"marks": {"3": "irelevant"}}, "got 'irelevant' for feature 3, want 'irrelevant' or 'relevant'"),
        ({"marks": {"3": ["irrelevant"]}}, r"got \['irrelevant'\] for feature 3"),
        ({"marks": ["3"]}, r"marks: got \['3'\], want an object"),
        ({"notes": {"40": "x"}}, "notes: got feature 40"),
        ({"notes": {"4": 1}}, "notes: got a int for feature 4"),
        ({"d_sae": "16"}, "d_sae '16'"),
        ({"d_sae": 17}, "of 17 features, want those of the SAE in use"),
        ({"sae": None}, "sae None"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(file, sae, change, message):
    value = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(value | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Marks.read(file, sae)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]", "3", "[" * 5000])
def test_what_is_no_file_of_marks_is_refused(tmp_path, sae, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match=r"m\.json: "):
        Marks.read(tmp_path / "m.json", sae)


def test_a_feature_marked_twice_is_refused(file, sae):
    file.write_text(file.read_text(encoding="utf-8").replace('"3"', '"4"'), encoding="utf-8")
    with pytest.raises(ValueError, match="got '4' twice"):
        Marks.read(file, sae)


def test_a_disk_that_is_full_leaves_the_old_file_whole(file, sae, monkeypatch):
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        Marks.of(sae, {1: "relevant"}).write(file)
    assert file.read_bytes() == before and os.listdir(file.parent) == ["m.json"]


def test_marks_made_by_hand_are_checked_too(sae):
    with pytest.raises(ValueError, match="got feature 16"):
        Marks.of(sae, {16: "relevant"})
    with pytest.raises(ValueError, match="got feature True"):
        Marks.of(sae, {True: "relevant"})
