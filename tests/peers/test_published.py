"""Published SAEs by SAELens' own loaders, of the same files: its outputs, by the 2× rule."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_close_2x
from problems.published import PUBLISHED, D, inputs

pytest.importorskip("sae_lens", reason="the peers are in an environment of their own: make test-peers builds it")

from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors import safe_open

import sae_fast as sf
from sae_fast.interop.published import FORMATS, REFUSED

LOADERS = {
    "gemma scope": loaders.gemma_2_sae_huggingface_loader,
    "gemma scope, mlp": loaders.gemma_2_sae_huggingface_loader,
    "gemma scope, embedding": loaders.gemma_2_sae_huggingface_loader,
    "gemma scope, transcoder": loaders.gemma_2_transcoder_huggingface_loader,
    "gemma scope 2": loaders.gemma_3_sae_huggingface_loader,
    "gemma scope 2, affine": loaders.gemma_3_sae_huggingface_loader,
    "gemma scope 2, affine, no config": loaders.gemma_3_sae_huggingface_loader,
    "llama scope, saelens": loaders.llama_scope_sae_huggingface_loader,
    "goodfire": loaders.get_goodfire_huggingface_loader,
    "deepseek": loaders.deepseek_r1_sae_huggingface_loader,
    "hook_z": loaders.connor_rob_hook_z_huggingface_loader,
    "mwhanna": loaders.mwhanna_transcoder_huggingface_loader,
    "mwhanna, misspelt": loaders.mwhanna_transcoder_huggingface_loader,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_published_sae_gives_saelens_own_outputs(name, tmp_path, monkeypatch):
    published = PUBLISHED[name]
    place = published.write(tmp_path)

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: object) -> str:
        file = tmp_path / repo_id / (subfolder or "") / filename
        if not file.is_file():
            raise EntryNotFoundError(f"no {filename}")
        return str(file)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(Path(download(repo_id, filename)), "pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    folder = published.place
    config, state, _ = LOADERS[name](published.repo, folder, "cpu", False, {"dtype": "float32", "d_in": D})
    d_sae, d_in = state["W_enc"].T.shape
    config = loaders.handle_config_defaulting({**config, "d_in": d_in, "d_sae": d_sae, "reshape_activations": "none"})
    config |= {"d_out": state["W_dec"].shape[1]} if "d_out" in config else {}
    theirs = SAE.get_sae_class_for_architecture(config["architecture"])(
        SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
    )
    theirs.process_state_dict_for_loading(state)
    theirs.load_state_dict({key: t.contiguous() for key, t in state.items()}, assign=True)
    if published.format == "llama_scope":
        theirs.fold_activation_norm_scaling_factor(d_in**0.5 / 5.5)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mine, x = sf.load(place, **published.options), inputs()
        f, x_hat = theirs.encode(x), theirs(x)
        (f64, x_hat64), got = published.gives(x, torch.float64), mine.encode(x)
        assert torch.equal(got != 0, f != 0)
        assert_close_2x(got, f, f64, "f")
        assert_close_2x(mine(x), x_hat, x_hat64, "x̂")


def test_every_loader_of_saelens_list_is_a_format_here_or_refused():
    saes = sf.published()
    assert len(saes) > 13_000
    assert set(loaders.NAMED_PRETRAINED_SAE_LOADERS) - set(FORMATS) - set(REFUSED) == set()
    assert {sae.release for sae in saes if sae.format is None} == {
        sae.release for sae in saes if "clt" in sae.release or "temporal" in sae.release.lower()
    }


def test_gemma_scope_goes_through_saelens_and_back(tmp_path):
    """Ours, saved in SAELens' format, loaded and saved by SAELens, and ours again: the same SAE to the bit."""
    mine, x = sf.load(PUBLISHED["gemma scope"].write(tmp_path)), inputs()
    sf.interop.save(mine, tmp_path / "ours", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(theirs.encode(x) != 0, mine.encode(x) != 0)
    theirs.save_model(tmp_path / "theirs")
    back = sf.load(tmp_path / "theirs")
    assert type(back) is type(mine) and back.options() == mine.options()
    for (name, a), (other, b) in zip(mine.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    assert {key: back.metadata.get(key) for key in ("model_name", "hook_name")} == {
        key: mine.metadata.get(key) for key in ("model_name", "hook_name")
    }
