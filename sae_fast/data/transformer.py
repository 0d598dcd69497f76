"""A Hugging Face transformer, of which one place is read: which block or module that is, and what leads to it."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sae_fast import files
from sae_fast.data import _lens_names, sites
from sae_fast.extras import require

WEIGHTS_AND_TOKENIZER = (".json", ".safetensors", ".bin", ".txt", ".model")
BLOCK_OUTPUT = "blocks.{}.hook_resid_post"  # TransformerLens' name


class Place(NamedTuple):
    """A site of a transformer.

    site: the name of its module, with ":input" where it is what the module is given. run: which of the module's runs in a
    pass, from 0; blocks may share one. hook_name: TransformerLens' name where there is one, else `site`. layer: the block
    in which it is, from 0, or None. is_block: it is what that block gives.
    """

    site: str
    run: int
    hook_name: str
    layer: int | None
    is_block: bool = False


class HiddenStates:
    """ids [N, T] int64 → what comes through a place of a Hugging Face transformer [N, T, d].

    The model is left when the place is reached: what comes after it does not run. d: the width; found, with the
    names of the modules that lead to the place (`below`), by a probe of two tokens. Raises ValueError where
    nothing of that shape comes.
    """

    def __init__(self, model: nn.Module, place: Place):
        self.model, self.place, self.site = model, place, sites.find(model, place.site)
        self.below: set[str] = set()
        probe = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        seen = [
            m.register_forward_pre_hook(lambda *_, name=name: self.below.add(name)) for name, m in model.named_modules()
        ]
        try:
            x = self._read(probe)
        finally:
            for handle in seen:
                handle.remove()
        if x.dim() != 3 or x.shape[:2] != (1, 2):
            raise ValueError(
                f"hook: {place.site!r} gives {tuple(x.shape)} for ids (1, 2), want (1, 2, d), a vector a token"
            )
        self.d = x.shape[2]
        if place.is_block:
            self._check_block(probe, x)

    def __call__(self, ids: Tensor) -> Tensor:
        return self._read(ids)

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Tensor:
        runs = itertools.count()

        def leave(x: Tensor) -> Tensor:
            if next(runs) == self.place.run:
                raise _Reached(x)
            return x

        try:
            with sites.changed(self.site, leave):
                self.model(input_ids=ids)
        except _Reached as reached:
            return reached.x
        raise ValueError(f"hook: {self.place.site!r} is not reached when the model runs")

    @torch.inference_mode()
    def _check_block(self, probe: Tensor, x: Tensor) -> None:
        """ValueError unless the block's output is one of what `output_hidden_states` gives.  The last block's is not: there
        it gives the state after the final norm."""
        states = getattr(self.model(input_ids=probe, output_hidden_states=True), "hidden_states", None) or ()
        layer = self.place.layer
        assert layer is not None
        if layer + 2 < len(states) and not any(torch.allclose(state, x, 1e-3, 1e-5, True) for state in states):
            where = f"layer: {layer} of this {type(self.model).__name__} is not what {self.place.site!r} gives"
            raise ValueError(f"{where}; want the site's own name, as hook")


class _Reached(Exception):
    def __init__(self, x: Tensor):
        self.x = x


# ---- The model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A transformer whose weights are not loaded yet.  config: that of its text; skeleton: its modules, without memory."""

    name: str
    tokenizer: Any
    config: Any
    skeleton: Any
    commit: str | None  # on the hub

    @classmethod
    def open(cls, model: str | Path) -> Source:
        """Raises ValueError for what is no stack of transformer blocks over text with a tokenizer that keeps offsets."""
        transformers = require("transformers", extra="demo")
        name, folder = str(model), Path(model)
        if name.startswith((".", "/", "~")) and not folder.is_dir():
            raise ValueError(f"model: the folder {name!r} does not exist")
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"model: the folder {name!r} holds no config.json, want a Hugging Face model")
        with quiet(transformers):
            try:
                config = transformers.AutoConfig.from_pretrained(model)
                tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            except (OSError, ValueError) as error:
                reason = _damaged(folder) or " ".join(str(error).split())[:200]
                raise ValueError(f"model: {name!r} is neither a folder nor a hub id that loads: {reason}") from error
            text_config = config.get_text_config()
            if config.is_encoder_decoder or not hasattr(text_config, "num_hidden_layers"):
                raise ValueError(f"model: got a {config.model_type} model, want one stack of transformer blocks over text")
            if not tokenizer("a")["input_ids"]:
                raise ValueError(f"model: there is no tokenizer in {name!r}")
            if not tokenizer.is_fast:
                got = f"its tokenizer, a {type(tokenizer).__name__}, is slow"
                raise ValueError(f"model: {got}, want one that keeps offsets")
            try:
                with torch.device("meta"):
                    skeleton = transformers.AutoModel.from_config(config)
            except (RuntimeError, NotImplementedError):  # it computes as it is made
                skeleton = transformers.AutoModel.from_config(config)
        return cls(name, tokenizer, text_config, skeleton, getattr(config, "_commit_hash", None))

    def place(self, layer: int | None = None, hook: str | None = None) -> Place:
        """The place of a block's output, or of a hook's name.  Raises ValueError for what the model has not."""
        if (layer is None) == (hook is None):
            raise ValueError(f"layer, hook: got {layer!r} and {hook!r}, want one of them")
        if layer is not None:
            if not 0 <= layer < self.n_blocks:
                last = f"{self.n_blocks - 1} (the output of the model's last block)"
                raise ValueError(f"layer: got {layer}, want 0 to {last}; other sites have names, as hook")
            site, run = self._block(layer)
            block = self.skeleton.get_submodule(site)
            own_name = run or not self.blocks or _lens_names.normalises_output(block)
            return Place(site, run, site if own_name else BLOCK_OUTPUT.format(layer), layer, is_block=True)
        assert hook is not None
        name = self._without_prefix(hook)
        try:
            found = sites.find(self.skeleton, name)
        except ValueError as error:
            raise ValueError(f"hook: {str(error).removeprefix('site: ')}") from error
        site = f"{found.name}:input" if found.at_input else found.name
        if site in self.blocks:
            return self.place(self.blocks.index(site), None)
        within = [i for i, block in enumerate(self.blocks) if f"{found.name}.".startswith(f"{block}.")]
        return Place(site, 0, site if name == site else hook, within[0] if within else None)

    def check_length(self, context_length: int) -> None:
        """ValueError unless the model takes contexts of that many tokens."""
        if context_length < 1:
            raise ValueError(f"context_length: got {context_length}, want at least 1 token")
        if self.longest is not None and context_length > self.longest:
            raise ValueError(f"context_length: got {context_length}, want at most {self.longest}, what the model takes")

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the model's weights: the hub's commit, or a hash of the files in its folder."""
        folder = Path(self.name)
        if not folder.is_dir():
            return f"{self.name}@{self.commit}"
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            if file.suffix in WEIGHTS_AND_TOKENIZER:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
        return digest.hexdigest()

    @cached_property
    def special_tokens(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts (before, after) a text; a BOS where it puts nothing but has one."""
        probe = self.tokenizer("a", return_special_tokens_mask=True)
        ids, special = probe["input_ids"], probe["special_tokens_mask"]
        if 0 not in special:
            raise ValueError(f"model: there is no tokenizer for text in {self.name!r}")
        first, last = special.index(0), len(special) - special[::-1].index(0)
        if len(ids) == last - first and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id], []
        return ids[:first], ids[last:]

    @cached_property
    def not_text(self) -> list[int]:
        """The ids of special tokens.  One that stands for an unknown word is text, unless it has another office too."""
        tokenizer = self.tokenizer
        named = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
            tokenizer.all_special_ids
        )
        offices = ("bos", "eos", "cls", "sep", "pad", "mask")
        if tokenizer.unk_token_id not in {getattr(tokenizer, f"{office}_token_id") for office in offices}:
            named.discard(tokenizer.unk_token_id)
        return sorted(named)

    @cached_property
    def longest(self) -> int | None:
        """The most tokens of text in a context, or None: as many as you like."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is None:
            return None
        for name, module in self.skeleton.named_modules():  # RoBERTa counts from the padding's position on
            if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
                positions = min(positions, module.num_embeddings - module.padding_idx - 1)
        before, after = self.special_tokens
        return positions - len(before) - len(after) - (not before)

    @property
    def n_blocks(self) -> int:
        return self.config.num_hidden_layers

    def load(self, place: Place, device: torch.device) -> HiddenStates:
        """The model, at a place.  Raises ValueError if its files are damaged or lack weights on which the place depends."""
        transformers = require("transformers", extra="demo")
        with quiet(transformers):
            try:
                model, report = transformers.AutoModel.from_pretrained(
                    self.name, output_loading_info=True, ignore_mismatched_sizes=True
                )
            except (
                SafetensorError,
                OSError,
                RuntimeError,
                ValueError,
                EOFError,
                KeyError,
                pickle.UnpicklingError,
            ) as error:
                reason = _damaged(Path(self.name)) or " ".join(str(error).split())[:200]
                raise ValueError(f"model: the weights in {self.name!r} do not load: {reason}") from error
        model.config.use_cache = False
        states = HiddenStates(model.float().eval().to(device), place)
        _check_weights(self.name, report, states.below)
        return states

    def _without_prefix(self, hook: str) -> str:
        """A name in the model with a head, in the model itself."""
        prefix = f"{self.skeleton.base_model_prefix}."
        known = dict(self.skeleton.named_modules())
        return hook.removeprefix(prefix) if hook.partition(":")[0] not in known else hook

    @cached_property
    def blocks(self) -> list[str]:
        """The names of the blocks' modules; none where blocks share them."""
        return _lens_names.blocks(self.skeleton)

    def _block(self, layer: int) -> tuple[str, int]:
        """(the module's name, which of its runs) of a block."""
        if self.blocks:
            return self.blocks[layer], 0
        groups = getattr(self.config, "num_hidden_groups", None)  # ALBERT's blocks share their weights
        for name, members in self.skeleton.named_modules():
            if isinstance(members, nn.ModuleList) and len(members) == groups:
                group = [int(i / (self.n_blocks / groups)) for i in range(layer + 1)]
                return f"{name}.{group[-1]}", group.count(group[-1]) - 1
        raise ValueError(
            f"layer: the blocks of {type(self.skeleton).__name__} are not found; want the site's name, as hook"
        )


def _check_weights(name: str, report: Mapping[str, Any], below: set[str]) -> None:
    """ValueError if weights of modules that ran were not in the files: they are random then.  Those of heads and poolers
    may be missing."""
    bad = {key: "is missing" for key in report["missing_keys"]}
    bad |= {key: f"has shape {tuple(got)}, want {tuple(want)}" for key, got, want in report["mismatched_keys"]}
    bad = {key: problem for key, problem in bad.items() if key.rpartition(".")[0] in below}
    if not bad:
        return
    key = min(bad)
    more = f", and so on: {len(bad)} in all" if len(bad) > 1 else ""
    extras = report["unexpected_keys"]
    before = next((extra.removesuffix(k) for k in sorted(bad) for extra in extras if extra.endswith(f".{k}")), None)
    why = f"; its files have {before!r} before the names, as DDP and torch.compile put it: rename them" if before else ""
    raise ValueError(f"model: the weights in {name!r} do not fit its config: {key} {bad[key]}{more}{why}")


def _damaged(folder: Path) -> str | None:
    """The file in a model's folder that is damaged, and how, as far as can be told."""
    there = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    for file in there:
        if said := files.lfs_pointer(file):
            return f"{file}: {said}"
    for file in (file for file in there if file.suffix == ".safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file}: truncated or damaged: {error}"
    return None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
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
