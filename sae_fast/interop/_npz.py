"""Reading numpy's .npz: arrays of plain numbers only, in memory that the file's own size bounds."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sae_fast import files

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
CHUNK = 1 << 20  # bytes that are taken at a time


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The arrays' shapes by name; no number is read.  Errors as of :func:`read`."""
    with _opened(file) as archive:
        return {_name(entry): _header(archive, entry)[0] for entry in archive.infolist()}


def read(file: Path) -> dict[str, Tensor]:
    """The arrays by name.  ``FileNotFoundError``, or ``ValueError`` that names the file, and the array, where it is not of
    numpy, is damaged or packed, has pickles in it, or says that it holds more than it does."""
    with _opened(file) as archive:
        return {_name(entry): _array(archive, entry) for entry in archive.infolist()}


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, whose errors in the block get the file's name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    if said := files.lfs_pointer(file) or files.packed(file, "numpy.savez"):
        raise ValueError(f"{file}: {said}")
    try:
        with zipfile.ZipFile(file) as archive:
            names = [entry.filename for entry in archive.infolist()]
            if len(set(names)) != len(names):
                raise _Said(f"got {len(names)} entries of {len(set(names))} names, want one of each")
            yield archive
    except _Said as error:
        raise ValueError(f"{file}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{file}: truncated or damaged: {' '.join(str(error).split())[:200]}") from error


class _Said(Exception):
    """A complaint of an array."""


def _name(entry: zipfile.ZipInfo) -> str:
    return entry.filename.removesuffix(".npy")


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns come first, dtype and the header's length, which together fill the entry."""
    with archive.open(entry) as stream:
        shape, by_columns, dtype = _of_stream(stream, entry)
        length = stream.tell()
    if dtype.hasobject:
        raise _Said(f"{_name(entry)}: want numbers: it is a pickle, which is never executed")
    if dtype.kind not in "fiub" or not dtype.isnative:
        raise _Said(f"{_name(entry)}: got an array of {dtype}, want plain numbers")
    needed, held = math.prod(shape) * dtype.itemsize, entry.file_size - length
    if min(shape, default=0) < 0 or needed != held:
        raise _Said(f"{_name(entry)}: got shape {shape} of {dtype}, {needed} bytes, but the file holds {held} of it")
    return shape, by_columns, dtype, length


def _of_stream(stream: IO[bytes], entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(stream)
    if version not in HEADERS:
        raise _Said(f"{_name(entry)}: got version {version} of numpy's format, want one of {sorted(HEADERS)}")
    return HEADERS[version](stream)


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    shape, by_columns, dtype, length = _header(archive, entry)
    array = np.empty(math.prod(shape), dtype)
    with archive.open(entry) as stream:
        stream.read(length)
        into, done = array.view(np.uint8).data, 0
        while done < len(into):
            read = stream.readinto(into[done : done + CHUNK])  # type: ignore[attr-defined]
            if not read:
                raise EOFError("the file ends within an array")
            done += read
        stream.read(1)  # at the end the checksum is compared
    tensor = torch.from_numpy(array)
    return tensor.view(shape[::-1]).permute(*range(len(shape))[::-1]) if by_columns else tensor.view(shape)
