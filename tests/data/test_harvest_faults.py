"""Harvests that must not happen, and tokens that must not be kept: models whose files do not fit, full disks, damaged
caches, special tokens."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch
from helpers import PATIENCE, wait_until
from problems.tiny_models import WORDS, save_tiny_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from sae_fast.data import harvest as harvesting
from sae_fast.data.activations import ActivationStore
from sae_fast.data.harvest import harvest
from sae_fast.data.transformer import HiddenStates

TEXT = "The gate opens when its sum\nis above zero . " * 9
CONTEXT = 6


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def folder(transformers, tmp_path):
    """A tiny GPT-2, to spoil."""
    return save_tiny_model(transformers, "gpt2", tmp_path / "model")


def harvested(model, tmp_path, text=TEXT, **arguments):
    defaults = dict(layer=1, context_length=CONTEXT, batch_size=4, cache=tmp_path / "cache", device="cpu", progress=False)
    return harvest(model, text, **(defaults | arguments))


# ---- Weights that do not fit the config (F1) -------------------------------------------------------------------------


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_before_the_names_of_the_weights(folder, tmp_path, prefix):
    rewrite(folder, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    with pytest.raises(ValueError, match=rf"h\.0\.\S+ is missing, and so on: \d+ in all; its files have '{prefix}' before"):
        harvested(folder, tmp_path)
    assert not list((tmp_path / "cache").glob("*/*"))


@pytest.mark.parametrize(
    "name, problem",
    [
        ("h.0.mlp.c_fc.weight", "is missing"),
        ("h.1.ln_1.bias", "is missing"),
        ("wte.weight", "is missing"),
        ("h.1.ln_2.weight", r"has shape \(7,\), want \(16,\)"),
    ],
)
def test_a_weight_that_is_missing_or_of_another_shape_below_the_site(folder, tmp_path, name, problem):
    def change(tensors):
        got = tensors.pop(name)
        return tensors if problem == "is missing" else tensors | {name: torch.zeros(7)} if got.dim() else tensors

    rewrite(folder, change)
    with pytest.raises(ValueError, match=rf"model: the weights in .* do not fit its config: {name} {problem}"):
        harvested(folder, tmp_path)


def test_what_comes_after_the_site_may_be_missing(folder, tmp_path):
    whole = np.array(harvested(folder, tmp_path).activations)
    rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if not k.startswith(("h.2.", "ln_f."))})
    assert np.array_equal(harvested(folder, tmp_path).activations, whole)
    for after in (dict(layer=2), dict(layer=None, hook="ln_f")):
        with pytest.raises(ValueError, match="is missing"):
            harvested(folder, tmp_path, **after)


def test_a_pooler_may_be_missing_and_tied_weights_are_fine(transformers, tmp_path):
    for kind, change in [
        ("bert", lambda tensors: {k: t for k, t in tensors.items() if "pooler" not in k}),
        ("gpt2", lambda tensors: tensors),
    ]:
        folder = save_tiny_model(transformers, kind, tmp_path / kind)
        rewrite(folder, change)
        assert harvested(folder, tmp_path).n_tokens > 0
    head = transformers.GPT2LMHeadModel(tiny_model(transformers, "gpt2").config)  # whose head is the embedding
    head.save_pretrained(folder)
    assert harvested(folder, tmp_path).n_tokens > 0


# ---- What ended in a riddle (F14) ------------------------------------------------------------------------------------


def half(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_truncated_weights_are_named(folder, tmp_path):
    half(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
        harvested(folder, tmp_path)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"model\.safetensors: a Git LFS pointer"):
        harvested(folder, tmp_path)


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="there is no tokenizer in"):
        harvested(folder, tmp_path)


def test_a_token_beyond_the_vocabulary(transformers, folder, tmp_path):
    tokenizer = tiny_tokenizer(transformers, "gpt2")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="its tokenizer gives '<bos>' the id 16, and its vocabulary has 16"):
        harvested(folder, tmp_path)


def test_the_longest_context_that_the_error_names_runs(transformers, tmp_path):
    """RoBERTa's positions begin after the padding's."""
    sizes = dict(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    for name, most in (("RobertaConfig", 30), ("BertConfig", 32)):
        config = getattr(transformers, name)(**sizes, max_position_embeddings=34)
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / name)
        tiny_tokenizer(transformers, "bert").save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"context_length: got 40, want at most {most},"):
            harvested(tmp_path / name, tmp_path, context_length=40)
        assert harvested(tmp_path / name, tmp_path, context_length=most).context_length == most


@pytest.mark.parametrize("name", ["activations.npy", "spans.npy", "store.json", "{}", "short", "gone"])
def test_a_damaged_store_in_the_cache_is_named_and_how_to_go_on(folder, tmp_path, name):
    store = harvested(folder, tmp_path).folder
    info = json.loads((store / "store.json").read_text())
    if name == "{}":
        (store / "store.json").write_text("{}")
    elif name == "short":
        (store / "store.json").write_text(json.dumps(info | {"n_tokens": info["n_tokens"] - CONTEXT}))
    elif name == "gone":
        (store / "tokens.npy").unlink()
    else:
        half(store / name)
    with pytest.raises(ValueError, match=rf"{store}.* cannot be used: .*delete that folder and harvest again"):
        harvested(folder, tmp_path)


def test_a_device_that_is_not_here(folder, tmp_path):
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device in (missing, "gpu"):
        with pytest.raises(ValueError, match=f"device: got '{device}', want one that is here: cpu"):
            harvested(folder, tmp_path, device=device)


# ---- Special tokens (F10) --------------------------------------------------------------------------------------------

ID = {word: i + 3 for i, word in enumerate(WORDS)}


def test_special_tokens_in_the_text_go_through_the_model_and_are_not_kept(transformers, folder, tmp_path):
    text = "the [CLS] gate opens of a [UNK] sum [CLS] [CLS] and the gate is above zero . [CLS] "  # [CLS] is its BOS
    store = harvested(folder, tmp_path, text=text, layer=2, context_length=4)
    words = [word for word in text.split() if word != "[CLS]"][:12]  # a word that is not known is text
    assert [store.around(i)[1] for i in range(12)] == words and store.n_tokens == 12
    assert store.tokens.tolist() == [ID.get(word, 0) for word in words]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    seen = []
    model.h[2].register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    wanted = []
    for run in ("[CLS] the [CLS] gate opens of", "[CLS] a [UNK] sum [CLS] [CLS] and", "[CLS] the gate is above"):
        ids = torch.tensor([[{"[CLS]": 1, "[UNK]": 0}.get(word, ID.get(word)) for word in run.split()]])
        with torch.no_grad():
            model(input_ids=ids)
        wanted.append(seen.pop()[0][ids[0] != 1])
    torch.testing.assert_close(torch.tensor(store.activations), torch.cat(wanted))


def test_more_special_tokens_than_the_model_has_room_for(folder, tmp_path):
    text = "the gate " + "[CLS] " * 30 + "opens when its sum is above zero"
    with pytest.raises(
        ValueError, match=r"context_length: got 6, which .* makes contexts of up to 36 tokens, want at most 31"
    ):
        harvested(folder, tmp_path, text=text)


def test_without_a_bos_the_token_before_a_context_is_the_attention_sink(transformers, folder, tmp_path):
    tokenizer = tiny_tokenizer(transformers, "gpt2")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    store = harvested(folder, tmp_path, layer=2)
    words = TEXT.lower().split()
    assert [store.around(i)[1].lower() for i in range(store.n_tokens)] == words[1 : 1 + store.n_tokens]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([[ID[word] for word in words[CONTEXT : 2 * CONTEXT + 1]]])
    seen = []
    model.h[2].register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=ids)
    torch.testing.assert_close(torch.tensor(store.activations[CONTEXT : 2 * CONTEXT]), seen[0][0, 1:])
    assert store.info["prepend_bos"] is False
    with pytest.raises(ValueError, match="context_length: got 32, want at most 31"):
        harvested(folder, tmp_path, context_length=32)


# ---- Full disks, kills (F6, F16) -------------------------------------------------------------------------------------


def test_the_space_is_taken_before_the_model_runs(folder, tmp_path, monkeypatch):
    def full(handle, offset, size):
        assert size > 4 * 16 * 90
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(HiddenStates, "__call__", lambda self, ids: pytest.fail("ran the model"))
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/cache/activations/\w+'"):
        harvested(folder, tmp_path)
    assert not list((tmp_path / "cache" / "activations").iterdir())


def test_a_disk_that_fills_meanwhile_is_an_error_that_names_the_store(folder, tmp_path, monkeypatch):
    """Where space cannot be taken beforehand.  A memory map would end the process with a signal."""
    monkeypatch.delattr(os, "posix_fallocate")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/cache/activations/\w+'"):
            harvested(folder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_come_back_from_the_file_in_any_order(tmp_path):
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    with harvesting._rows(tmp_path / "x.npy", 7, 3) as write:
        for first, last in ((4, 7), (0, 1), (1, 4)):
            write(first, x[first:last])
    assert np.array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), x)


def test_what_a_killed_harvest_leaves_is_swept_by_the_next(folder, tmp_path):
    cache = tmp_path / "cache" / "activations"
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            HiddenStates.__call__ = lambda self, ids: time.sleep(PATIENCE)
            harvested(folder, tmp_path)
        finally:
            os._exit(0)
    wait_until(lambda: list(cache.glob(".*/**/activations.npy")))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(cache.iterdir())) == 1
    store = harvested(folder, tmp_path)
    assert list(cache.iterdir()) == [store.folder]
    assert ActivationStore.open(store.folder).n_tokens == store.n_tokens
