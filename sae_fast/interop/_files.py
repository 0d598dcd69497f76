"""Reading and writing other packages' files: no pickle is executed, every error names the file and the tensor or key."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast import files
from sae_fast.extras import require
from sae_fast.interop import _npz


class Tensors:
    """The tensors of a file: each is taken once, with the shape that it has to have; what is left over is an error."""

    def __init__(self, file: Path, tensors: Mapping[str, Any]):
        self.file, self._left = file, dict(tensors)
        for name, tensor in self._left.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{file}: {name}: got {type(tensor).__name__}, want a tensor")
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                raise ValueError(f"{file}: {name}: got a {tensor.layout} tensor on {tensor.device}, want plain numbers")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> set[str]:
        return set(self._left)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of that name, of a shape in which None stands for any size: for that, and for a matrix, there must be
        numbers in the file, as a small file may claim any shape for a view of one number."""
        if name not in self._left:
            raise ValueError(f"{self.file}: tensor {name!r} is missing; it holds {sorted(self._left)}")
        tensor = self._left.pop(name)
        fits = tensor.dim() == len(shape) and all(w is None or s == w for s, w in zip(tensor.shape, shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if w is None else str(w) for w in shape)
            raise ValueError(f"{self.file}: {name}: got shape {tuple(tensor.shape)}, want ({wanted})")
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        if (None in shape or len(shape) > 1) and tensor.numel() > held:
            raise ValueError(
                f"{self.file}: {name}: got shape {tuple(tensor.shape)}, but the file holds {held} numbers of it"
            )
        return tensor

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"{self.file}: unknown tensors {sorted(self._left)}: nothing is known to hold them")


def read_safetensors(file: Path, *turned: str) -> Tensors:
    """The tensors of a safetensors file; ``turned`` and errors as of :func:`sae_fast.files.read_safetensors`."""
    return Tensors(file, files.read_safetensors(file, turned))


def read_npz(file: Path) -> Tensors:
    """The arrays of a .npz file.  Errors as of :func:`sae_fast.interop._npz.read`."""
    return Tensors(file, _npz.read(file))


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.  Errors as of :func:`sae_fast.files.read_json`."""
    yaml = require("yaml", extra="hub")
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: there is no such file") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = files.lfs_pointer(file) or f"not valid YAML: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{file}: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {files.lfs_pointer(file) or f'got {type(value).__name__}, want a mapping'}")
    return value


# In torch's words:
CODE = re.compile(r"GLOBAL \S+|unrecognized function .*|new object for .*|build Tensor, .*|.* must be imported .*")


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of what a file of tensors holds, by name, without reading its numbers; () of what is no tensor, and none
    for a file that holds no names.  Errors as of :func:`read_safetensors`."""
    if file.suffix in (".safetensors", ".npz"):
        return (files.safetensors_shapes if file.suffix == ".safetensors" else _npz.shapes)(file)
    value = read_pt(file, mmap=zipfile.is_zipfile(file))
    return {n: tuple(getattr(t, "shape", ())) for n, t in value.items()} if isinstance(value, dict) else {}


def read_pt(file: Path, mmap: bool = False) -> Any:
    """The tensors and plain values in a file that torch.save wrote.  Errors as of :func:`read_safetensors`.
    ``mmap``: their numbers stay in the file, and may be others than it was written with where it is damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    if said := files.lfs_pointer(file) or files.packed(file, "torch.save"):
        raise ValueError(f"{file}: {said}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # whether it reads is what counts
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: {_why_not(str(error))}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a seek beyond the end gives
            raise
        raise ValueError(f"{file}: truncated or damaged: {error}") from error
    except Exception as error:  # a damaged pickle may ask for anything
        raise ValueError(f"{file}: truncated or damaged: {' '.join(str(error).split())[:200]}") from error


def read_state_dict(file: Path) -> dict[str, Any]:
    """The dict in a file that torch.save wrote.  Errors as of :func:`read_safetensors`."""
    value = read_pt(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: got {type(value).__name__}, want a state_dict")
    return value


def _why_not(reason: str) -> str:
    """The reason why torch did not read a pickle, without its advice to run it."""
    reason = reason.partition("Check the documentation of torch.load")[0].rpartition("WeightsUnpickler error:")[2]
    reason = re.sub(r".*Re-running `torch.load`.*", "", reason)
    code = CODE.search(reason)
    if code:
        what = code.group().partition(" was not")[0].strip()[:200]
        return f"want tensors and plain values: it names code, and a pickle is never executed ({what})"
    if "Unsupported operand" in reason:
        return "want what torch.save writes: it is something else, or damaged, and a pickle is never executed"
    return f"truncated or damaged: {' '.join(reason.split())[:200]}"


def pt_writer(tensors: Mapping[str, Tensor]) -> files.Writer:
    """A writer of what torch.load reads; the tensors are copied now."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:  # by its name torch.save would put the temporary one into the file
            torch.save(plain, file)

    return write
