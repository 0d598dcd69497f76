"""Harvesting: which hidden state is kept, where its tokens are in the text, and that the cache is whole and reused."""

import itertools
import sys

import numpy as np
import pytest
import torch
from problems.tiny_models import WORDS, save_tiny_model, tiny_model, tiny_tokenizer

from sae_fast.data import activations
from sae_fast.data import harvest as harvesting
from sae_fast.data.harvest import harvest
from sae_fast.data.transformer import HiddenStates, Source
from sae_fast.extras import MissingExtra

TEXT = "The gate opens when its sum\nis above zero . " * 9
CONTEXT = 6


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model_folders(transformers, tmp_path_factory):
    return {kind: save_tiny_model(transformers, kind, tmp_path_factory.mktemp(kind)) for kind in ("bert", "gpt2")}


def harvested(model_folders, tmp_path, kind="bert", **arguments):
    defaults = dict(layer=1, context_length=CONTEXT, batch_size=4, cache=tmp_path, device="cpu", progress=False)
    arguments = defaults | arguments
    return harvest(model_folders[kind], arguments.pop("text", TEXT), **arguments)


KINDS = {"bert": "encoder.layer.{}", "gpt2": "h.{}", "llama": "layers.{}", "gpt_neox": "layers.{}"}


def source_of(transformers, kind):
    """A Source of a tiny model that is in no folder."""
    model = tiny_model(transformers, kind)
    return model, Source("tiny", tiny_tokenizer(transformers, kind), model.config, model, "")


def outputs(model, name, ids):
    """What each run of a module gives in a whole pass."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.inference_mode():
        model(input_ids=ids)
    handle.remove()
    return [out if isinstance(out, torch.Tensor) else out[0] for out in seen]


@pytest.mark.parametrize("kind", [*KINDS, "albert"])
@pytest.mark.parametrize("layer", range(3))
def test_a_layer_is_the_output_of_that_block_counted_from_0(transformers, kind, layer):
    model, source = source_of(transformers, kind)
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        whole = model(input_ids=ids, output_hidden_states=True).hidden_states
    name = KINDS.get(kind, "encoder.albert_layer_groups.0").format(layer)
    wanted = outputs(model, name, ids)[layer if kind == "albert" else 0]
    place = source.place(layer, None)
    hook_name = name if kind in ("bert", "albert") else f"blocks.{layer}.hook_resid_post"
    assert (place.site, place.hook_name, place.layer) == (name, hook_name, layer)
    states = HiddenStates(model, place)
    assert torch.equal(states(ids), wanted) and states.d == 16
    # hidden_states counts the embedding, and its last one has been through the final norm, where there is one.
    assert torch.equal(wanted, whole[layer + 1]) == (layer < 2 or kind in ("bert", "albert"))
    assert torch.equal(model(input_ids=ids, output_hidden_states=True).hidden_states[layer], whole[layer])  # as it was


@pytest.mark.parametrize(
    "hook, site, hook_name, layer",
    [
        ("h.1", "h.1", "blocks.1.hook_resid_post", 1),
        ("transformer.h.1", "h.1", "blocks.1.hook_resid_post", 1),
        ("blocks.1.hook_resid_post", "h.1", "blocks.1.hook_resid_post", 1),
        ("blocks.0.hook_resid_pre", "h.0:input", "blocks.0.hook_resid_pre", 0),
        ("h.2.attn", "h.2.attn", "h.2.attn", 2),
        ("h.2.mlp.c_proj:input", "h.2.mlp.c_proj:input", "h.2.mlp.c_proj:input", 2),
        ("ln_f", "ln_f", "ln_f", None),
        ("ln_final.hook_normalized", "ln_f", "ln_final.hook_normalized", None),
        ("hook_embed", "wte", "hook_embed", None),
    ],
)
def test_a_hook_is_a_module_or_a_name_of_transformer_lens(transformers, hook, site, hook_name, layer):
    model, source = source_of(transformers, "gpt2")
    place = source.place(None, hook)
    assert (place.site, place.hook_name, place.layer) == (site, hook_name, layer)
    states, ids = HiddenStates(model, place), torch.arange(12).view(2, 6)
    name, _, at_input = site.partition(":")
    if not at_input:
        assert torch.equal(states(ids), outputs(model, name, ids)[0])
    assert states.d == (64 if "c_proj" in site else 16)


def test_a_module_that_is_not_the_block_is_noticed(transformers):
    model, source = source_of(transformers, "gpt2")
    place = source.place(0)
    assert HiddenStates(model, place).d == 16
    with pytest.raises(
        ValueError, match=r"layer: 0 of this GPT2Model is not what 'h\.0\.ln_1' gives; want the site's own name"
    ):
        HiddenStates(model, place._replace(site="h.0.ln_1"))


def test_the_final_norm_is_not_the_last_block(transformers, model_folders, tmp_path):
    last, norm = (harvested(model_folders, tmp_path, "gpt2", **at) for at in (dict(layer=2), dict(layer=None, hook="ln_f")))
    assert last.folder != norm.folder and not np.allclose(last.activations, norm.activations)


def test_the_width_that_is_wanted_is_asked_before_the_model_runs(model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(harvesting, "_run", lambda *_: pytest.fail("ran the model"))
    for place in (dict(layer=1), dict(layer=None, hook="encoder.layer.1.intermediate")):
        with pytest.raises(ValueError, match=r"d: got (16|32) dimensions at .*, want 12, those of the SAE"):
            harvested(model_folders, tmp_path, d=12, **place)


def test_blocks_above_the_layer_do_not_run(transformers):
    model, source = source_of(transformers, "bert")
    runs = []
    for i, block in enumerate(model.encoder.layer):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    states = HiddenStates(model, source.place(1, None))
    runs.clear()
    states(torch.arange(6).view(1, 6))
    assert runs == [0, 1]


@pytest.mark.parametrize("kind, prefix, suffix", [("bert", [1], [2]), ("gpt2", [1], [])])
def test_harvest_keeps_the_hidden_state_of_the_text_alone(transformers, model_folders, tmp_path, kind, prefix, suffix):
    store = harvested(model_folders, tmp_path, kind)
    model = transformers.AutoModel.from_pretrained(model_folders[kind]).eval()
    vocabulary = {word: i + 3 for i, word in enumerate(WORDS)}
    ids = torch.tensor([vocabulary[word] for word in TEXT.lower().split()])
    ids = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    wrapped = torch.stack([torch.tensor([*prefix, *context, *suffix]) for context in ids.tolist()])
    with torch.no_grad():
        wanted = model(input_ids=wrapped, output_hidden_states=True).hidden_states[2][:, 1 : 1 + CONTEXT]
    assert (store.d, store.n_tokens, store.context_length) == (16, ids.numel(), CONTEXT)
    assert store.tokens.tolist() == ids.flatten().tolist()
    assert store.activations.dtype == np.float32
    torch.testing.assert_close(torch.tensor(store.activations), wanted.reshape(-1, 16))


def test_tokens_are_found_in_the_text_as_written(model_folders, tmp_path):
    store = harvested(model_folders, tmp_path)
    assert store.around(0, after=2) == ("", "The", " gate opens")
    assert store.around(7, before=9, after=9) == (
        "is ",
        "above",
        " zero . The gate",
    )  # within its context of 6 tokens
    assert store.around(5) == ("The gate opens when its ", "sum", "")
    words = TEXT.split()
    assert [store.around(i)[1] for i in range(store.n_tokens)] == words[: store.n_tokens]


def test_pieces_of_the_text_change_neither_tokens_nor_places(model_folders, tmp_path, monkeypatch):
    whole = harvested(model_folders, tmp_path / "a")
    monkeypatch.setattr(harvesting, "PIECE", 20)
    pieces = harvested(model_folders, tmp_path / "b")
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert all(whole.around(i) == pieces.around(i) for i in range(whole.n_tokens))


def test_a_cached_store_is_reused_and_anything_else_is_not(model_folders, tmp_path, monkeypatch):
    first = harvested(model_folders, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "_run", lambda *_: pytest.fail("ran the model again"))
        assert harvested(model_folders, tmp_path).folder == first.folder
        monkeypatch.setenv("SAE_FAST_CACHE", str(tmp_path))
        assert harvested(model_folders, None).folder == first.folder
    others = [dict(layer=0), dict(context_length=5), dict(text=TEXT + "the gate"), dict(kind="gpt2")]
    folders = {harvested(model_folders, tmp_path, **other).folder for other in others}
    assert len(folders) == 4 and first.folder not in folders
    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "VERSION", activations.VERSION + 1)
        patch.setattr(activations, "VERSION", activations.VERSION + 1)
        assert harvested(model_folders, tmp_path).folder != first.folder


def test_other_weights_in_the_same_folder_are_another_model(transformers, model_folders, tmp_path):
    folder = tmp_path / "model"
    model = tiny_model(transformers, "bert")
    model.save_pretrained(folder)
    tiny_tokenizer(transformers, "bert").save_pretrained(folder)
    before = harvested({"bert": folder}, tmp_path)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(2)
    model.save_pretrained(folder)
    after = harvested({"bert": folder}, tmp_path)
    assert before.folder != after.folder
    assert not np.allclose(before.activations, after.activations)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_harvest_leaves_nothing(model_folders, tmp_path, monkeypatch, interruption):
    calls = itertools.count()

    def interrupted(self, ids):
        if next(calls) == 1:
            raise interruption
        return torch.zeros(*ids.shape, 16)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "__call__", interrupted)
        with pytest.raises(interruption):
            harvested(model_folders, tmp_path)
    assert list((tmp_path / "activations").iterdir()) == []
    assert np.abs(harvested(model_folders, tmp_path).activations).sum() > 0


def test_two_harvests_at_once_end_with_one_store(model_folders, tmp_path, monkeypatch):
    run = harvesting._run

    def slow_run(*arguments):
        monkeypatch.setattr(harvesting, "_run", run)
        harvested(model_folders, tmp_path)  # another process finishes first
        run(*arguments)

    monkeypatch.setattr(harvesting, "_run", slow_run)
    store = harvested(model_folders, tmp_path)
    assert store.n_tokens > 0
    assert [folder.name for folder in (tmp_path / "activations").iterdir()] == [store.folder.name]


def test_a_full_disk_is_noticed_before_the_model_runs(model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(harvesting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="SAE_FAST_CACHE"):
        harvested(model_folders, tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(layer=3), r"layer: got 3, want 0 to 2 \(the output of the model's last block\)"),
        (dict(layer=-1), "layer: got -1"),
        (dict(context_length=31), "context_length: got 31, want at most 30"),
        (dict(context_length=0), "context_length: got 0"),
        (dict(text="The gate"), "text: got 2 tokens, want at least one context of 6"),
        (dict(text=""), "text: got 0 tokens"),
    ],
)
def test_arguments_that_do_not_fit_the_model(model_folders, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        harvested(model_folders, tmp_path, **arguments)


def test_no_model_there(transformers, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        harvest(tmp_path / "empty", TEXT, 1, cache=tmp_path)


def test_activations_that_are_not_finite(model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(HiddenStates, "__call__", lambda self, ids: torch.full((*ids.shape, 16), torch.nan))
    with pytest.raises(ValueError, match=r"encoder\.layer\.1 are not all finite"):
        harvested(model_folders, tmp_path)


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sae-fast\[demo\]'"):
        harvest("model", TEXT, 1, cache=tmp_path)
