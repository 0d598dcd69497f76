"""Run a transformer over a text once, and keep what one layer says in an ActivationStore on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sae_fast.extras import require
from sae_fast.files import appear
from sae_fast.train.activations import VERSION, ActivationStore

PIECE = 1 << 16  # characters given to the tokenizer at a time
WEIGHTS_AND_TOKENIZER = (".json", ".safetensors", ".bin", ".txt", ".model")


def harvest(
    model: str | Path,
    text: str,
    layer: int,
    *,
    context_length: int = 128,
    batch_size: int = 32,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ActivationStore:
    """`hidden_states[layer]` of a Hugging Face transformer on every token of a text, computed once and
    cached on disk.

    model: a folder or a hub id, read with `transformers`; run in fp32, on the GPU if there is one, without
    the blocks above `layer`. layer: 0 is the embedding, i the output of block i. The text is cut into
    contexts of `context_length` tokens; what does not fill the last one is dropped. batch_size: contexts
    run at a time. cache: the folder that holds the stores, by default `$SAE_FAST_CACHE` or
    `~/.cache/sae_fast`.

    A store is reused if model files, layer, context length and text are the same. An interrupted harvest
    leaves none. Raises ValueError for arguments that do not fit the model, OSError if the disk is too full,
    and MissingExtra if `transformers` is not installed.
    """
    source = _open_model(model, layer, context_length)
    key = _key(model=source.fingerprint, layer=layer, context_length=context_length, text=_hash(text.encode()))
    root = cache_folder(cache) / "activations"
    if (root / key).is_dir():
        return ActivationStore.open(root / key)
    contexts = _contexts(source.tokenizer, text, context_length)
    info = {
        "d": source.config.hidden_size,
        "n_tokens": contexts.ids.size,
        "context_length": context_length,
        "layer": layer,
        "model": str(model),
        "key": key,
        "version": VERSION,
    }
    root.mkdir(parents=True, exist_ok=True)
    _check_disk(root, 4 * info["n_tokens"] * info["d"] + 20 * contexts.ids.size + 4 * len(text))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with appear(root / key) as folder:
            np.save(folder / "tokens.npy", contexts.ids.reshape(-1).astype(np.int32))
            np.save(folder / "spans.npy", contexts.spans)
            (folder / "text.txt").write_bytes(text.encode())
            (folder / "store.json").write_text(json.dumps(info, indent=2) + "\n")
            _run(source, contexts, layer, batch_size, device, progress, folder / "activations.npy")
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster: its store is as good
            raise
    return ActivationStore.open(root / key)


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where stores are kept: `cache`, else `$SAE_FAST_CACHE`, else `~/.cache/sae_fast`."""
    return Path(cache or os.environ.get("SAE_FAST_CACHE") or "~/.cache/sae_fast").expanduser()


class HiddenStates:
    """ids [N, T] int64 → `hidden_states[layer]` [N, T, d] of a Hugging Face transformer, without the blocks
    above it.

    The i-th hidden state is what block i (counting from 0) is given, in every architecture; the last one
    has also been through the final norm. So the model is left by an exception when that block is reached.
    Whether this gives what `output_hidden_states` does is checked when it is built; where it does not, the
    whole model runs.
    """

    def __init__(self, model: nn.Module, layer: int):
        self.model, self.layer = model, layer
        self.config: Any = model.config
        probe = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        wanted = self._run_all(probe)
        self.block = next((block for block in self._candidates() if _same(self._run_until(block, probe), wanted)), None)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        hidden = self._run_all(ids) if self.block is None else self._run_until(self.block, ids)
        assert hidden is not None
        return hidden

    def _candidates(self) -> Iterator[nn.Module]:
        n_layers = self.config.get_text_config().num_hidden_layers
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers and self.layer < n_layers:
                yield module[self.layer]

    @torch.inference_mode()
    def _run_all(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, output_hidden_states=True).hidden_states[self.layer]

    @torch.inference_mode()
    def _run_until(self, block: nn.Module, ids: Tensor) -> Tensor | None:
        def leave(_: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Reached(args[0] if args else kwargs.get("hidden_states"))

        handle = block.register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self.model(input_ids=ids)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        return None


class _Reached(Exception):
    def __init__(self, hidden: Tensor | None):
        self.hidden = hidden


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and torch.equal(a, b)


class _Source(NamedTuple):
    load: Callable[[], nn.Module]
    tokenizer: Any
    config: Any
    fingerprint: str


class _Contexts(NamedTuple):
    ids: np.ndarray  # [n_contexts, context_length] int64
    spans: np.ndarray  # [n_contexts * context_length, 2] int64, characters of the text
    prefix: list[int]  # special tokens before and after every context
    suffix: list[int]


def _open_model(model: str | Path, layer: int, context_length: int) -> _Source:
    """The model's configuration and tokenizer, checked against the arguments; its weights are loaded on
    demand.
    """
    transformers = require("transformers", extra="demo")
    if context_length < 1:
        raise ValueError(f"context_length: got {context_length}, want at least 1 token")
    if layer < 0:
        raise ValueError(f"layer: got {layer}, want 0 (the embedding) or more")
    if str(model).startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ValueError(f"model: the folder {str(model)!r} does not exist")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"model: the folder {str(model)!r} holds no config.json, want a Hugging Face model")
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(model)
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"model: {str(model)!r} is neither a folder nor a hub id that loads: {reason}") from error
    if config.is_encoder_decoder or not hasattr(config.get_text_config(), "num_hidden_layers"):
        raise ValueError(f"model: got a {config.model_type} model, want one stack of transformer blocks over text")
    if not tokenizer.is_fast:
        raise ValueError(f"model: its tokenizer, a {type(tokenizer).__name__}, is slow, want one that keeps offsets")
    text_config = config.get_text_config()
    if not 0 <= layer <= text_config.num_hidden_layers:
        last = f"{text_config.num_hidden_layers} (the model's last block)"
        raise ValueError(f"layer: got {layer}, want 0 (the embedding) to {last}")
    special = sum(map(len, _special_tokens(tokenizer)))
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and context_length + special > longest:
        most = f"at most {longest - special}, what the model takes"
        raise ValueError(f"context_length: got {context_length}, want {most}")

    def load() -> nn.Module:
        with _quiet(transformers):
            return transformers.AutoModel.from_pretrained(model).float().eval()

    return _Source(load, tokenizer, text_config, _fingerprint(model, config))


def _fingerprint(model: str | Path, config: Any) -> str:
    """What identifies a model's weights: the hub's commit, or a hash of the files in its folder."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{config._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in WEIGHTS_AND_TOKENIZER:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts (before, after) a text; a BOS where it puts nothing but has one.

    The first position of a causal model is an attention sink, whose activation says nothing of the token
    there.
    """
    probe = tokenizer("a", return_special_tokens_mask=True)
    ids, special = probe["input_ids"], probe["special_tokens_mask"]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    if len(ids) == last - first and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], []
    return ids[:first], ids[last:]


def _contexts(tokenizer: Any, text: str, context_length: int) -> _Contexts:
    pieces = list(_pieces(text)) or [""]
    encoded = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.concatenate([np.array(i, dtype=np.int64) for i in encoded["input_ids"]])
    begins = np.cumsum([0, *map(len, pieces)])
    spans = [np.array(o, np.int64).reshape(-1, 2) + b for o, b in zip(encoded["offset_mapping"], begins, strict=False)]
    n_contexts = len(ids) // context_length
    if n_contexts == 0:
        raise ValueError(f"text: got {len(ids)} tokens, want at least one context of {context_length}")
    kept = n_contexts * context_length
    ids = ids[:kept].reshape(n_contexts, context_length)
    return _Contexts(ids, np.concatenate(spans)[:kept], *_special_tokens(tokenizer))


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


def _run(
    source: _Source,
    contexts: _Contexts,
    layer: int,
    batch_size: int,
    device: torch.device,
    progress: bool,
    file: Path,
) -> None:
    """Write the activations of all contexts, a batch of contexts at a time."""
    hidden_states = HiddenStates(source.load().to(device), layer)
    n_contexts, length = contexts.ids.shape
    d = source.config.hidden_size
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(n_contexts * length, d))
    before, after = (
        torch.tensor(contexts.prefix, dtype=torch.int64),
        torch.tensor(contexts.suffix, dtype=torch.int64),
    )
    with tqdm(total=len(out), desc=f"harvest layer {layer}", unit="tok", unit_scale=True, disable=not progress) as bar:
        for begin in range(0, n_contexts, batch_size):
            ids = torch.from_numpy(contexts.ids[begin : begin + batch_size])
            wrapped = torch.cat([before.expand(len(ids), -1), ids, after.expand(len(ids), -1)], dim=1)
            hidden = hidden_states(wrapped.to(device))[:, len(before) : len(before) + length]
            rows = hidden.reshape(-1, d).float().cpu()
            if not rows.isfinite().all():
                where = f"in contexts {begin} to {begin + len(ids) - 1}"
                raise ValueError(f"model: the activations of layer {layer} are not all finite {where}")
            out[begin * length : begin * length + len(rows)] = rows.numpy()
            bar.update(len(rows))
    out.flush()


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the activations need {needed / 1e9:.1f} GB and {str(folder)!r} has {free / 1e9:.1f} GB free; "
            "make room, use less text, or set SAE_FAST_CACHE to a folder on a larger disk",
        )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the loading bars and reports of `transformers`, whose settings are put back."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _key(**parts: Any) -> str:
    return _hash(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode())[:24]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
