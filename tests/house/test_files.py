"""Files are whole or not there: whatever fails, whenever the writer is killed."""

from __future__ import annotations

import errno
import os
import random
import signal
import time

import pytest
import torch

from sae_fast import files


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_old(path):
    (path / "f").write_text("old")


def one_file(folder):
    files.write_text(folder / "f", "new" * 50_000)


def several_files(folder):
    files.write_files(folder, {"f": files.safetensors_writer({"t": torch.ones(20_000)}), "last": lambda p: p.touch()}, True)


def a_folder(folder):
    with files.appear(folder / "f", lambda: True) as new:
        for i in range(20):
            (new / f"{i}").write_text("new" * 1000)


WRITERS = [one_file, several_files, a_folder]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_writer_leaves_is_swept_by_the_next(tmp_path, writer):
    (tmp_path / "fresh").mkdir()
    writer(tmp_path / "fresh")
    whole = contents(tmp_path / "fresh")
    start = time.perf_counter()
    writer(tmp_path / "fresh")
    seconds, chance, left = time.perf_counter() - start, random.Random(0), 0
    for moment in range(25):
        folder = tmp_path / f"{moment}"
        folder.mkdir()
        child = os.fork()
        if child == 0:
            while True:
                writer(folder)
        while not os.listdir(folder):  # until it has begun
            time.sleep(0)
        time.sleep(chance.random() * 2 * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left += any(name.startswith(".") for name in os.listdir(folder))
        if writer is not several_files:  # whose last file is away while the others are replaced
            found = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
            assert found in ({}, whole) or not (folder / "f").exists()
        writer(folder)
        assert contents(folder) == whole and not any(name.startswith(".") for name in os.listdir(folder))
    assert left  # some were killed in the midst of it


def test_a_writer_at_work_is_not_swept(tmp_path):
    with files.room(tmp_path) as made:
        (made / "half").touch()
        files.write_text(tmp_path / "other", "whole")
        assert (made / "half").exists()
    assert os.listdir(tmp_path) == ["other"]


def test_a_folder_that_was_moved_away_when_its_writer_was_killed_comes_back(tmp_path):
    (tmp_path / "store").mkdir()
    write_old(tmp_path / "store")
    child = os.fork()
    if child == 0:
        os.rename = lambda source, target, rename=os.rename: (rename(source, target), os._exit(0))  # after the first
        with files.appear(tmp_path / "store", lambda: True):
            pass
    os.waitpid(child, 0)
    assert not (tmp_path / "store").exists()
    files.sweep(tmp_path)
    assert contents(tmp_path) == {"store/f": b"old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("writer", [one_file, several_files])
def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path, monkeypatch, writer, number):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {number})")

    def full_text(*_, **__):
        raise OSError(number, "No space")

    write_old(tmp_path)
    monkeypatch.setattr(files, "save_file", full)
    monkeypatch.setattr(files.Path, "write_text", full_text)
    with pytest.raises(OSError, match=f"{tmp_path}/f") as found:
        writer(tmp_path)
    assert found.value.errno == number
    assert contents(tmp_path) == {"f": b"old"}


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space"), "No space left on device: '{}'"),  # as pyarrow's, of no file
        (OSError("9 requested and 0 written"), "not written: 9 requested and 0 written: '{}'"),  # as numpy's
        (FileNotFoundError("model: there is none"), "model: there is none"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path, error, said):
    with pytest.raises(type(error)) as found, files.appear(tmp_path / "store"):
        raise error
    assert str(found.value).endswith(said.format(tmp_path / "store")) and not list(tmp_path.iterdir())


def test_a_folder_made_for_what_was_not_written_goes_again(tmp_path):
    def full(path):
        raise OSError(errno.ENOSPC, "No space")

    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(OSError, match=str(folder / "f")):
            files.write_files(folder, {"f": full}, overwrite=False)
        assert not list(tmp_path.iterdir())


def test_where_no_room_can_be_made_the_folder_is_named(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a room")

    monkeypatch.setattr(files.Path, "mkdir", refused)
    with pytest.raises(OSError, match=f"Read-only file system: '{tmp_path}'"):
        one_file(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o007])
@pytest.mark.parametrize("writer", [one_file, several_files])
def test_permissions_are_those_of_any_new_file(tmp_path, writer, mask):
    before = os.umask(mask)
    try:
        writer(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        files.write_text(tmp_path / "nowhere" / "f", "text")


@pytest.mark.parametrize("read", [files.read_json, files.read_safetensors])
def test_reading_names_the_file_and_what_is_wrong(tmp_path, read):
    file = tmp_path / "f"
    with pytest.raises(FileNotFoundError, match="f: there is no such file"):
        read(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="f: a Git LFS pointer"):
        read(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"f: (not valid JSON|truncated or damaged)"):
        read(file)
