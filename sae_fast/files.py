"""Files that are whole or not there.

Whatever is written lies in a *room* first: a hidden folder beside its place, on the same disk, held by a lock.  Renaming is
the moment at which it appears.  A room vanishes with its writer's block; one whose writer was killed is swept by the next
that writes into that folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOM = ".sae_fast-{}.tmp"
TURNED = 64  # rows of a matrix that are read before they are turned
LFS = b"version https://git-lfs.github.com/spec/"
Writer = Callable[[Path], None]  # writes a file to the path that it is given


def sync(path: Path) -> None:
    """Flush to the disk: a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- Rooms ----------------------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: Path) -> Iterator[bool | None]:
    """Hold a folder while the block runs.  Gives True, or False where another process holds it; None on a disk without
    locks, where nobody can tell."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours: bool | None = True
        except BlockingIOError:
            ours = False
        except OSError:
            ours = None
        yield ours
    finally:
        os.close(handle)


@contextmanager
def room(parent: Path) -> Iterator[Path]:
    """A hidden folder in ``parent``, held while the block runs and removed when it ends."""
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent}: there is no such folder")
    sweep(parent)
    while True:
        made = parent / ROOM.format(secrets.token_hex(6))
        try:
            made.mkdir()
        except OSError as error:  # the name of a room would say nothing
            raise OSError(error.errno, os.strerror(error.errno or 0), str(parent)) from error
        with lock(made) as ours:
            if ours is False or not made.exists():  # a sweeper was between our two calls
                continue
            try:
                yield made
            finally:
                shutil.rmtree(made, ignore_errors=True)
            return


def sweep(parent: Path) -> None:
    """Remove the rooms in ``parent`` whose writers are dead; a folder that one had moved away goes back."""
    for left in parent.glob(ROOM.format("*")):
        with suppress(OSError), lock(left) as ours:  # it may vanish, or be no folder
            if ours:
                for replaced in left.glob("old/*"):
                    if not (parent / replaced.name).exists():
                        os.rename(replaced, parent / replaced.name)
                shutil.rmtree(left, ignore_errors=True)


# ---- Writing --------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike, writer: Writer) -> None:
    """Write one file: what was there stays until the new one is whole and on the disk."""
    path = Path(path)
    with room(path.parent) as made:
        _write_synced(made / path.name, writer, path)
        os.replace(made / path.name, path)
        sync(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text, in UTF-8, as :func:`write` does."""
    write(path, _text_writer(text))


def write_json(path: str | os.PathLike, value: Any, indent: int = 2) -> None:
    """Write what JSON can hold as :func:`write` does."""
    write(path, json_writer(value, indent))


def write_files(folder: str | os.PathLike, files: Mapping[str, Writer], overwrite: bool) -> None:
    """Write several files into a folder (made if missing), of which the last says how to read the others.

    An error leaves what was there.  Where a file is replaced the last goes before and comes back after: a kill in between
    leaves a folder that does not load, not one of old and new.  ``FileExistsError`` when the folder has one of them and
    ``overwrite`` is not given.
    """
    folder = Path(folder)
    there = [name for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{folder}: holds {', '.join(there)} already; overwrite=True (--overwrite) replaces them")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, want a folder")
    last = list(files)[-1]
    with _there(folder), room(folder) as made:
        for name, writer in files.items():
            _write_synced(made / name, writer, folder / name)
        if set(there) - {last}:
            (folder / last).unlink(missing_ok=True)
        try:
            for name in files:
                os.replace(made / name, folder / name)
        except BaseException:
            if (made / last).exists():  # else all are in place
                for name in set(files) - set(there):
                    (folder / name).unlink(missing_ok=True)
            raise
        sync(folder)


@contextmanager
def _there(folder: Path) -> Iterator[None]:
    """A folder, made if missing; one that was made goes again if the block fails and leaves it empty."""
    missing = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if missing:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


@contextmanager
def appear(path: Path, replace: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """A folder that takes the place ``path`` when the block ends well, with all that is in it on the disk.

    ``replace`` is asked then, as making takes its time: whether a folder that is there may go.  It may raise.  Without it
    ``OSError`` (ENOTEMPTY or EEXIST) when another appeared meanwhile.  One that names no file, as pyarrow's and numpy's of
    a full disk, names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with room(path.parent) as made:
        new, old = made / "new", made / "old" / path.name
        new.mkdir()
        old.parent.mkdir()
        try:
            yield new
            for file in (*new.rglob("*"), new):
                sync(file)
        except OSError as error:
            if error.filename is not None or (error.errno is None and type(error) is not OSError):
                raise
            said = os.strerror(error.errno) if error.errno else f"not written: {error}"
            raise OSError(error.errno or errno.EIO, said, str(path)) from error
        if replace() and path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
        sync(path.parent)


def _write_synced(path: Path, writer: Writer, place: Path) -> None:
    """Write the file that will be at ``place``, which an ``OSError`` names.  Its permissions are those of any new file:
    safetensors would keep it from everyone else."""
    try:
        path.touch()
        mode = path.stat().st_mode
        writer(path)
        path.chmod(mode)
        sync(path)
    except (SafetensorError, OSError) as error:
        found = re.search(r"os error (\d+)", str(error))  # safetensors' words for a full disk
        number = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else errno.EIO
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def _text_writer(text: str) -> Writer:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", newline="\n")

    return write


def json_writer(value: Any, indent: int = 2) -> Writer:
    """A writer of JSON; what it cannot hold is found here, before anything is written."""
    return _text_writer(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Writer:
    """A writer of tensors, which are copied now."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return lambda path: save_file(plain, path, metadata=metadata)


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, or ``FileNotFoundError`` or ``ValueError`` that names it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: there is no such file") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{file}: {lfs_pointer(file) or f'not valid JSON: {error}'}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: got {type(value).__name__}, want an object")
    return value


def read_safetensors(file: Path, turned: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors in a file, in memory of their own: what is loaded outlives the file.  Of the matrices named in ``turned``
    it is their transpose's memory.  Errors as of :func:`read_json`."""
    with _named(file), safe_open(file, "pt") as header, file.open("rb") as stream:  # which has checked it
        start = 8 + int.from_bytes(stream.read(8), "little")
        about = json.loads(stream.read(start - 8))
        found = {}
        for name in sorted(header.keys()):
            like = header.get_tensor(name)
            stream.seek(start + about[name]["data_offsets"][0])
            found[name] = (_read_turned if name in turned and like.dim() == 2 else _read_like)(stream, like)
        return found


def _read_turned(stream: BinaryIO, like: Tensor) -> Tensor:
    """The matrix that comes next, turned a few rows at a time."""
    transpose = like.new_empty(like.shape[::-1])
    for first in range(0, like.shape[0], TURNED):
        rows = like[first : first + TURNED]
        transpose[:, first : first + TURNED] = _read_like(stream, rows).T
    return transpose.T


def _read_like(stream: BinaryIO, like: Tensor) -> Tensor:
    """The numbers that come next, of that shape and dtype; a map of the file would stand beside them in memory."""
    tensor = torch.empty_like(like, memory_format=torch.contiguous_format)
    numbers = tensor.reshape(-1).view(torch.uint8).numpy()
    if stream.readinto(numbers) != numbers.size:  # type: ignore[attr-defined]
        raise SafetensorError("it ends before its tensors do")
    return tensor


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name, as the file's header says.  Errors as of :func:`read_json`."""
    with _named(file), safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of safetensors with the file's name."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: there is no such file") from error
    except SafetensorError as error:
        raise ValueError(f"{file}: {lfs_pointer(file) or f'truncated or damaged: {error}'}") from error


def lfs_pointer(file: Path) -> str | None:
    """The complaint about a file whose contents are still on a Git LFS server; None about any other."""
    with file.open("rb") as stream:
        pointer = stream.read(len(LFS)) == LFS
    return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`" if pointer else None


def packed(file: Path, writer: str) -> str | None:
    """A complaint of a zip archive that would take more memory than it has bytes: its ``writer`` compresses nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            needed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None  # an old file of torch, or a damaged one, which its reader says
    size = file.stat().st_size
    return f"got {needed} bytes packed into {size}, want what {writer} writes" if needed > size else None


def key(config: Mapping[str, Any], file: str | os.PathLike, kind: type | tuple[type, ...], *path: str) -> Any:
    """The value at these nested keys of what a JSON file holds, or ``ValueError`` that names file and keys."""
    value: Any = config
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{file}: {'.'.join(path)}: got {value!r}, want {' or '.join(k.__name__ for k in kinds)}")
    return value
