"""Run a transformer over a text once, and keep what one of its sites says in an ActivationStore on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sae_fast import files
from sae_fast.data.activations import VERSION, ActivationStore
from sae_fast.data.transformer import HiddenStates, Place, Source
from sae_fast.devices import usable

PIECE = 1 << 16  # characters given to the tokenizer at a time


def harvest(
    model: str | Path,
    text: str,
    layer: int | None = None,
    *,
    hook: str | None = None,
    context_length: int = 128,
    batch_size: int = 32,
    d: int | None = None,
    text_from: str = "",
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ActivationStore:
    """The activations at one site of a Hugging Face transformer on every token of a text, computed once and
    cached on disk.

    model: a folder or a hub id, read with `transformers`; run in fp32, on the GPU if there is one, without
    what comes after the site. layer: i is the output of block i, counted from 0, before any final norm. hook:
    any other site, by the name of a module ("encoder.layer.2.attention", or with ":input" what it is given) or
    TransformerLens' name ("blocks.0.hook_resid_pre", "hook_embed", "ln_final.hook_normalized"). d: the width
    that is wanted. The text is cut into contexts of `context_length` tokens; what does not fill the last one
    is dropped. batch_size: contexts run at a time. text_from: what the cache's list calls the text. cache: the
    folder that holds the stores, by default `$SAE_FAST_CACHE` or `~/.cache/sae_fast`.

    Special tokens go through the model and are not kept: those that the tokenizer puts around a context (a BOS
    before it, where it has one), and those that stand in the text, such as "<|endoftext|>" between documents;
    a context is `context_length` tokens besides them. Where the tokenizer has neither BOS nor others, the token
    before a context takes the BOS's place, as the first position of a causal model is an attention sink, which
    says nothing of its token.

    A store is reused if model files, site, context length and text are the same. An interrupted harvest
    leaves none. Raises ValueError for arguments that do not fit the model, for a model whose files lack weights
    that the site depends on and for a damaged store in the cache, OSError if the disk is too full, and
    MissingExtra if `transformers` is not installed.
    """
    device = usable(device)
    source = Source.open(model)
    place = source.place(layer, hook)
    source.check_length(context_length)
    key = _key(model=source.fingerprint, site=place.site, run=place.run, context_length=context_length, text=hash_of(text))
    root = cache_folder(cache) / "activations"
    if (root / key).is_dir():
        return _of_width(reopened(root / key), d)
    if place.is_block:
        _check_width(place, source.config.hidden_size, d)
    contexts = _contexts(source, text, context_length)
    states = source.load(place, device)
    _check_width(place, states.d, d)
    n_tokens = contexts.kept.size
    info = {
        "d": states.d,
        "n_tokens": n_tokens,
        "context_length": context_length,
        "layer": place.layer,
        "hook_name": place.hook_name,
        "place": {"layer": place.layer} if place.is_block else {"hook": place.hook_name},  # for harvest
        "site": place.site,
        "model": str(model),
        "prepend_bos": bool(contexts.prefix),
        "text": {"from": text_from, "characters": len(text), "sha256": hash_of(text)},
        "harvested": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "key": key,
        "version": VERSION,
    }
    root.mkdir(parents=True, exist_ok=True)
    files.sweep(root)  # what killed harvests left may be what fills the disk
    _check_disk(root, n_tokens * (4 * states.d + 20) + 4 * len(text))
    try:
        with files.appear(root / key) as folder:
            np.save(folder / "tokens.npy", contexts.ids[contexts.kept].reshape(-1).astype(np.int32))
            np.save(folder / "spans.npy", contexts.spans[contexts.kept].reshape(-1, 2))
            (folder / "text.txt").write_bytes(text.encode())
            (folder / "store.json").write_text(json.dumps(info, indent=2) + "\n")
            _run(states, contexts, place, batch_size, device, progress, folder / "activations.npy")
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster: its store is as good
            raise
    return ActivationStore.open(root / key)


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder of the stores: `cache`, else `$SAE_FAST_CACHE`, else `~/.cache/sae_fast`."""
    return Path(cache or os.environ.get("SAE_FAST_CACHE") or "~/.cache/sae_fast").expanduser()


def reopened(folder: Path) -> ActivationStore:
    """A store of the cache, which from now on counts as used today."""
    store = ActivationStore.open(folder)
    with suppress(OSError):  # a cache that is only read
        os.utime(folder)
    return store


def hash_of(text: str) -> str:
    """The SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


# ---- The text -------------------------------------------------------------------------------------------------------


class _Contexts(NamedTuple):
    ids: np.ndarray  # [n] int64, the whole text's, special tokens among them
    spans: np.ndarray  # [n, 2] int64, characters of the text
    kept: np.ndarray  # [n_contexts, context_length] int64, positions in `ids`
    begin: np.ndarray  # [n_contexts] int64, where in `ids` what is run begins; it ends with the last that is kept
    prefix: list[int]  # special tokens before and after every context
    suffix: list[int]


def _contexts(source: Source, text: str, context_length: int) -> _Contexts:
    pieces = list(_pieces(text)) or [""]
    encoded = source.tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.concatenate([np.array(i, dtype=np.int64) for i in encoded["input_ids"]])
    begins = np.cumsum([0, *map(len, pieces)])
    spans = [np.array(o, np.int64).reshape(-1, 2) + b for o, b in zip(encoded["offset_mapping"], begins, strict=False)]
    prefix, suffix = source.special_tokens
    vocabulary = source.skeleton.get_input_embeddings().num_embeddings
    if (largest := max([*prefix, *suffix, int(ids.max(initial=0))])) >= vocabulary:
        token = source.tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(f"model: its tokenizer gives {token!r} the id {largest}, and its vocabulary has {vocabulary}")
    words = np.flatnonzero(~np.isin(ids, source.not_text))
    lead = 0 if prefix else 1
    n_contexts = max(len(words) - lead, 0) // context_length
    if n_contexts == 0:
        raise ValueError(f"text: got {len(words)} tokens, want at least one context of {context_length + lead}")
    kept = words[lead : lead + n_contexts * context_length].reshape(n_contexts, context_length)
    begin = words[: n_contexts * context_length : context_length] if lead else kept[:, 0]
    most = int((kept[:, -1] + 1 - begin).max()) - lead
    if source.longest is not None and most > source.longest:
        raise ValueError(
            f"context_length: got {context_length}, which with the special tokens that the text has in them makes "
            f"contexts of up to {most} tokens, want at most {source.longest}, what the model takes"
        )
    return _Contexts(ids, np.concatenate(spans), kept, begin, prefix, suffix)


def _pieces(text: str) -> Iterator[str]:
    """The text cut at line ends into pieces of about PIECE characters, which the tokenizer takes in
    parallel.
    """
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


# ---- Running --------------------------------------------------------------------------------------------------------


def _run(
    states: HiddenStates,
    contexts: _Contexts,
    place: Place,
    batch_size: int,
    device: torch.device,
    progress: bool,
    file: Path,
) -> None:
    """Write the activations of all contexts, a batch of contexts at a time; those of one length go together."""
    n_contexts, length = contexts.kept.shape
    before, after = (torch.tensor(ids, dtype=torch.int64) for ids in (contexts.prefix, contexts.suffix))
    lengths = contexts.kept[:, -1] + 1 - contexts.begin
    bar = tqdm(
        total=n_contexts * length, desc=f"harvest {place.hook_name}", unit="tok", unit_scale=True, disable=not progress
    )
    with bar, _rows(file, n_contexts * length, states.d) as write:
        for size in np.unique(lengths):
            same = np.flatnonzero(lengths == size)
            for chosen in np.split(same, range(batch_size, len(same), batch_size)):
                begin = contexts.begin[chosen, None]
                ids = torch.from_numpy(contexts.ids[begin + np.arange(size)])
                wrapped = torch.cat([before.expand(len(ids), -1), ids, after.expand(len(ids), -1)], dim=1)
                hidden = states(wrapped.to(device))
                at = torch.from_numpy(contexts.kept[chosen] - begin + len(before)).to(device)
                rows = hidden.gather(1, at[:, :, None].expand(-1, -1, states.d)).float().cpu()
                if not rows.isfinite().all():
                    where = f"in contexts {chosen[0]} to {chosen[-1]}"
                    raise ValueError(f"model: the activations at {place.hook_name} are not all finite {where}")
                for first, block in zip(chosen.tolist(), rows.numpy(), strict=True):
                    write(first * length, block)
                bar.update(rows.shape[0] * length)


@contextmanager
def _rows(file: Path, n: int, d: int) -> Iterator[Any]:
    """A .npy file of [n, d] float32, and a function (row, values) that writes into it.  Its space is taken at once where
    the system can; written, not mapped: a full disk is an OSError, no SIGBUS."""
    with file.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n, d)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.flush()
        begin = stream.tell()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, begin + 4 * n * d)

        def write(row: int, values: np.ndarray) -> None:
            stream.seek(begin + 4 * d * row)
            stream.write(np.ascontiguousarray(values, dtype="<f4").data)

        yield write


def _check_width(place: Place, got: int, want: int | None) -> None:
    if want is not None and got != want:
        raise ValueError(f"d: got {got} dimensions at {place.hook_name}, want {want}, those of the SAE")


def _of_width(store: ActivationStore, want: int | None) -> ActivationStore:
    if want is not None and store.d != want:
        raise ValueError(f"d: got {store.d} dimensions at {store.info.get('hook_name')}, want {want}, those of the SAE")
    return store


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the activations need {needed / 1e9:.2g} GB and {str(folder)!r} has {free / 1e9:.2g} GB free; "
            "make room, use less text, or set SAE_FAST_CACHE to a folder on a larger disk",
        )


def _key(**parts: Any) -> str:
    return hash_of(json.dumps({"version": VERSION, **parts}, sort_keys=True))[:24]
