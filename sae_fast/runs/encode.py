"""`sae-fast encode`: from an SAE and activations to a feature store."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_fast import interop
from sae_fast.analysis import write_store
from sae_fast.analysis.store import check_free
from sae_fast.analysis.store.writer import BATCH
from sae_fast.data.activations import ActivationStore
from sae_fast.data.harvest import harvest
from sae_fast.devices import usable
from sae_fast.extras import require
from sae_fast.files import lfs_pointer
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.identity import fingerprint
from sae_fast.runs.folder import STORE, run_of
from sae_fast.runs.source import activations_of, check_agreement, known_of, text_of


def encode(
    source: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    text: Path | None = None,
    context_length: int | None = None,
    activations: Path | None = None,
    batch_size: int = BATCH,
    overwrite: bool = False,
    anyway: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Writes the feature store of an SAE; returns (its folder, what its store.json says and ``seconds``).

    source: any SAE that :func:`sae_fast.load` takes.  What is not given of ``model``, ``layer`` or ``hook``, ``text`` and
    ``context_length`` is what the SAE's metadata says; of a run of `sae-fast demo` or `train` nothing has to be.  What
    contradicts it is an error, unless ``anyway``.  activations: a .npy or .safetensors file of [N, d_in] instead.  out: by
    default the run's store/, or a folder in out/store of the SAE's own.
    Errors as of :func:`sae_fast.load`, `harvest` and :func:`sae_fast.analysis.store.write_store`.
    """
    require("pyarrow", extra="store")
    chosen = usable(device)
    asked = {"--model": model, "--layer": layer, "--hook": hook, "--text": text}
    given = [name for name, value in asked.items() if value is not None]
    if activations is not None and given:
        raise ValueError(f"--activations: got {given[0]} too, want the activations or what to make them from")
    sae = interop.load(source)
    out = Path(out) if out is not None else default_store(source, sae)
    check_free(out, overwrite)
    data: ActivationStore | np.ndarray | Tensor
    if activations is not None:
        data = open_activations(activations)
    elif not given and context_length is None and "source" in sae.metadata:
        data = activations_of(sae, source, chosen, progress)
    else:
        known = known_of(sae.metadata)
        place = {"layer": layer, "hook": hook} if layer is not None or hook is not None else known.place
        model_, text_ = model or known.model, text or known.text
        wanted = {"--model": model_, "--layer (or --hook)": place, "--text": text_}
        if missing := [name for name, value in wanted.items() if value is None]:
            which = " and ".join(missing)
            raise ValueError(f"{source}: its metadata does not say {which}; want that, or --activations")
        assert model_ is not None and place is not None and text_ is not None
        if not anyway:
            check_agreement(known, model, place, context_length)
        data = harvest(
            model_, text_of(text_), **place, context_length=context_length or known.length or 128, d=sae.d_in,
            text_from=str(text_), device=chosen, progress=progress,
        )  # fmt: skip
    start = time.perf_counter()
    length = None if isinstance(data, ActivationStore) else context_length
    info = write_store(
        out, sae.to(chosen), data, context_length=length, batch_size=batch_size, overwrite=overwrite, progress=progress
    )
    return out, info | {"seconds": time.perf_counter() - start}


def default_store(source: str | Path, sae: SparseAutoencoder) -> Path:
    """The folder of an SAE's store when none is said: in its run, or in a folder of its own in out/store."""
    if (run := run_of(source)) is not None:
        return run / STORE
    name = Path(source).resolve().name if Path(source).exists() else re.sub(r"[^\w.-]+", "-", str(source))
    return Path("out/store") / f"{name}-{fingerprint(sae)[:8]}"


def open_activations(file: Path) -> np.ndarray | Tensor:
    """[N, d] in a .npy or .safetensors file, mapped, not read.  No pickle is executed."""
    if not file.is_file():
        raise FileNotFoundError(f"activations: {file} does not exist")
    if file.suffix == ".npy":
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            said = lfs_pointer(file) or f"damaged or holds no numbers: {error}"
            raise ValueError(f"activations: {file} is {said}") from error
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                if len(names) != 1:
                    raise ValueError(f"activations: {file} holds {len(names)} tensors, want one of [N, d_in]")
                return tensors.get_tensor(names[0])
        except SafetensorError as error:
            said = lfs_pointer(file) or f"truncated or damaged: {error}"
            raise ValueError(f"activations: {file} is {said}") from error
    raise ValueError(f"activations: got {file.name}, want a .npy or .safetensors file")
