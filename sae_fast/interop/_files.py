"""Reading and writing other packages' files: no pickle is executed, every error names the file and the tensor or key."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast import files


class Tensors:
    """The tensors of a file: each is taken once, with the shape that it has to have; what is left over is an error."""

    def __init__(self, file: Path, tensors: Mapping[str, Any]):
        self.file, self._left = file, dict(tensors)
        for name, tensor in self._left.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{file}: {name}: got {type(tensor).__name__}, want a tensor")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> set[str]:
        return set(self._left)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of that name, of a shape in which None stands for any size."""
        if name not in self._left:
            raise ValueError(f"{self.file}: tensor {name!r} is missing; it holds {sorted(self._left)}")
        tensor = self._left.pop(name)
        fits = tensor.dim() == len(shape) and all(w is None or s == w for s, w in zip(tensor.shape, shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if w is None else str(w) for w in shape)
            raise ValueError(f"{self.file}: {name}: got shape {tuple(tensor.shape)}, want ({wanted})")
        return tensor

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"{self.file}: unknown tensors {sorted(self._left)}: nothing is known to hold them")


def read_safetensors(file: Path) -> Tensors:
    """The tensors of a safetensors file.  Errors as of :func:`sae_fast.files.read_safetensors`."""
    return Tensors(file, files.read_safetensors(file))


def read_pt(file: Path) -> Any:
    """What torch.save wrote, as far as it is tensors and plain values."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: there is no such file") from error
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        if "Unsupported global" in reason or "Unsupported class" in reason or "Unsupported operand" in reason:
            wanted = "want tensors and plain values: it names code, and a pickle is never executed"
            raise ValueError(f"{file}: {wanted} ({_global(reason)})") from error
        raise ValueError(f"{file}: truncated or damaged: {reason[:200]}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a seek beyond the end gives
            raise
        raise ValueError(f"{file}: truncated or damaged: {str(error)[:200]}") from error


def _global(reason: str) -> str:
    """What torch says of the code that a pickle asks for, without its advice to run it."""
    start = reason.find("Unsupported")
    return reason[start:].split(" was not", 1)[0].split(". ", 1)[0][:200]


def pt_writer(tensors: Mapping[str, Tensor]) -> files.Writer:
    """A writer of what torch.load reads; the tensors are copied now."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:  # by its name torch.save would put the temporary one into the file
            torch.save(plain, file)

    return write
