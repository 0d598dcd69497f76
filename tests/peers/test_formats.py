"""Checkpoints of the packages themselves, read and written: outputs are the package's own, round trips the same bits.

Runs where the packages are: the environment that `make test` builds for the peers.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_close_2x, same_bits
from torch import Tensor

pytest.importorskip("dictionary_learning", reason="the peers are in an environment of their own: make test-peers builds it")

from dictionary_learning.utils import (
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
    load_dictionary,
)
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

import sae_fast as sf

D, F, K = 20, 70, 5
DL = {
    "gated": (GatedAutoEncoder, (), "GatedSAETrainer"),
    "relu": (AutoEncoder, (), "StandardTrainer"),
    "relu new": (AutoEncoderNew, (), "StandardTrainer"),
    "jumprelu": (JumpReluAutoEncoder, (), "JumpReluTrainer"),
    "topk": (AutoEncoderTopK, (K,), "TopKTrainer"),
    "batchtopk": (BatchTopKSAE, (K,), "BatchTopKTrainer"),
    "matryoshka": (MatryoshkaBatchTopKSAE, (K, [10, 25, 35]), "MatryoshkaBatchTopKTrainer"),
}
SAELENS = ("gated", "standard", "jumprelu", "topk")
TO_SAELENS = [kind for kind in DL if kind != "matryoshka"]


def randomise(module: torch.nn.Module, unit: str | None = None, seed: int = 0) -> None:
    """Weights of a trained SAE's size; the decoder's rows unit along the dimension of the parameter ``unit``."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 1 else 1.0))
            if "threshold" in name:
                p.abs_()
            if name == unit:
                p.div_(p.norm(dim=0 if p.shape[0] == D else 1, keepdim=True))


def make_dl(kind: str, folder: Path, unit: bool = True) -> torch.nn.Module:
    """A dictionary of the package in its folder, as trainSAE writes it."""
    cls, arguments, trainer = DL[kind]
    ae = cls(D, F, *arguments)
    randomise(ae, ("decoder.weight" if hasattr(ae, "decoder") else "W_dec") if unit else None)
    if "batchtopk" in kind or kind == "matryoshka":
        ae.threshold.fill_(1.25)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(ae.state_dict(), folder / "ae.pt")
    about = {
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "a/model",
        "lr": 1e-3,
        **({"k": K} if arguments else {}),
    }
    config = {"trainer": {"dict_class": cls.__name__, "trainer_class": trainer, **about}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return ae


def make_saelens(architecture: str, folder: Path, **config) -> SAE:
    cls, config_cls = get_sae_class(architecture)
    arguments = {"k": K} if architecture == "topk" else {}
    sae = cls(config_cls(d_in=D, d_sae=F, **arguments, **config))
    randomise(sae)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "a/model", "blocks.3.hook_resid_post"
    sae.save_model(folder)
    return sae


def data(B: int = 257, seed: int = 1) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def judge(mine: sf.nn.SparseAutoencoder, theirs: torch.nn.Module, **encode) -> None:
    """Features and reconstructions by the 2× rule against the package in float32 and float64."""
    x = data()
    with torch.no_grad():
        own = theirs.encode(x, **encode), theirs.decode(theirs.encode(x, **encode))
        theirs.double()
        if hasattr(theirs, "dtype"):
            theirs.dtype = torch.float64
        exact = theirs.encode(x.double(), **encode), theirs.decode(theirs.encode(x.double(), **encode))
        got = mine.encode(x), mine(x)
    assert float((got[0] != 0).float().sum(1).mean()) > 2, "features fire"
    flips = ((got[0] != 0) != (exact[0] != 0)).sum()
    assert flips == 0, f"{flips} entries fire in one and not in the other"
    for name, a, b, c in zip(("f", "x̂"), got, own, exact, strict=True):
        assert_close_2x(a, b, c, name)


def files(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            found |= {f"{path.name}:{k}": v for k, v in torch.load(path).items()}
        if path.suffix == ".safetensors":
            found |= {f"{path.name}:{k}": v for k, v in load_file(path).items()}
    return found


def assert_same_files(a: Path, b: Path) -> None:
    first, second = files(a), files(b)
    assert set(first) == set(second) and first
    for name, tensor in first.items():
        assert same_bits(tensor, second[name]), name


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# ---- dictionary_learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DL)
def test_a_dictionary_of_the_package_gives_its_own_outputs(kind, tmp_path):
    theirs = make_dl(kind, tmp_path)
    mine = sf.load(tmp_path)
    assert (mine.metadata["format"], mine.metadata["layer"], mine.metadata["model_name"]) == (
        "dictionary_learning",
        3,
        "a/model",
    )
    judge(mine, theirs)


@pytest.mark.parametrize("kind", DL)
@pytest.mark.parametrize("unit", [True, False], ids=["unit rows", "any rows"])
def test_to_ours_and_back_is_the_same_files(kind, unit, tmp_path):
    make_dl(kind, tmp_path / "a", unit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not unit else "error")
        sf.interop.convert(tmp_path / "a", tmp_path / "b", "sae_fast")
        sf.interop.convert(tmp_path / "b", tmp_path / "c", "dictionary_learning")
    assert_same_files(tmp_path / "a", tmp_path / "c")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ac"]
    assert {k: v for k, v in configs[1].items() if k != "sae_fast"} == configs[0]
    again, _ = load_dictionary(str(tmp_path / "c"), "cpu")
    assert type(again) is DL[kind][0]


@pytest.mark.parametrize("kind", [k for k in TO_SAELENS if k != "jumprelu"])
def test_to_saelens_back_to_ours_and_back_is_the_same_files_and_a_chain_of_the_same_outputs(kind, tmp_path):
    theirs = make_dl(kind, tmp_path / "0")
    for i, to in enumerate(("saelens", "dictionary_learning", "sae_fast", "dictionary_learning")):
        sf.interop.convert(tmp_path / str(i), tmp_path / str(i + 1), to)
    assert_same_files(tmp_path / "0", tmp_path / "2")
    assert_same_files(tmp_path / "0", tmp_path / "4")
    in_saelens = SAE.load_from_disk(tmp_path / "1")
    x = data()
    torch.testing.assert_close(in_saelens.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_saelens(x), theirs(x), rtol=1e-5, atol=2e-5)
    assert in_saelens.cfg.metadata.model_name == "a/model" and in_saelens.cfg.normalize_activations == "none"


def test_a_jumprelu_of_the_package_goes_to_saelens_with_its_own_bias_rule(tmp_path):
    theirs = make_dl("jumprelu", tmp_path / "a")
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "saelens")
    in_saelens = SAE.load_from_disk(tmp_path / "b")
    assert in_saelens.cfg.apply_b_dec_to_input is False
    torch.testing.assert_close(in_saelens.encode(data()), theirs.encode(data()), rtol=1e-5, atol=1e-5)
    sf.interop.convert(tmp_path / "b", tmp_path / "c", "dictionary_learning")
    assert_same_files(tmp_path / "a", tmp_path / "c")


def test_decoder_norms_that_are_not_1_are_said_and_folded_when_asked(tmp_path):
    theirs = make_dl("gated", tmp_path, unit=False)
    with pytest.warns(UserWarning, match="the decoder's norms are not 1; files from before 2025-01-07"):
        as_stored = sf.load(tmp_path)
    judge(as_stored, GatedAutoEncoder.from_pretrained(tmp_path / "ae.pt"))
    folded = sf.load(tmp_path, fold_decoder_norm=True)
    x = data()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F))
    # What the package computed before that day, and computes now when it is asked to.
    torch.testing.assert_close(folded.encode(x), theirs.encode(x, normalize_decoder=True), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(folded(x), theirs(x), rtol=2e-5, atol=2e-5)
    make_dl("relu", tmp_path / "relu", unit=False)
    with pytest.warns(UserWarning, match="the package itself folds them in"):
        sf.load(tmp_path / "relu")
    own, _ = load_dictionary(str(tmp_path / "relu"), "cpu")
    torch.testing.assert_close(
        sf.load(tmp_path / "relu", fold_decoder_norm=True).encode(x), own.encode(x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("factor", [None, 7.5])
def test_a_backup_with_its_optimizer_is_read_and_its_biases_scaled(factor, tmp_path):
    theirs = make_dl("gated", tmp_path)
    backup = {
        "step": 3, "ae": theirs.state_dict(), "norm_factor": factor, "config": {"lr": 1e-3, "wandb_name": None},
        "optimizer": torch.optim.Adam(theirs.parameters()).state_dict(),
    }  # fmt: skip
    torch.save(backup, tmp_path / "ae.pt")
    mine = sf.load(tmp_path)
    if factor:
        theirs.scale_biases(factor)
        assert mine.metadata["norm_factor"] == factor
    judge(mine, theirs)


def test_a_checkpoint_among_others_is_read_with_the_config_above_it(tmp_path):
    theirs = make_dl("batchtopk", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / "ae_20.pt")
    mine = sf.load(tmp_path / "checkpoints" / "ae_20.pt")
    assert isinstance(mine, sf.BatchTopKSAE) and mine.metadata["layer"] == 3
    judge(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_kept(dtype, tmp_path):
    theirs = make_dl("gated", tmp_path / "a").to(dtype)
    torch.save(theirs.state_dict(), tmp_path / "a" / "ae.pt")
    assert sf.load(tmp_path / "a").W_enc.dtype == dtype
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "saelens")
    sf.interop.convert(tmp_path / "b", tmp_path / "c", "dictionary_learning")
    assert_same_files(tmp_path / "a", tmp_path / "c")
    assert str(SAE.load_from_disk(tmp_path / "b").W_enc.dtype) == str(dtype)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_files_from_before_k_and_threshold_were_in_them_give_what_those_give_that_have_them(kind, tmp_path):
    theirs = make_dl(kind, tmp_path)
    if kind != "topk":
        theirs.threshold.fill_(-1)
        torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    x, said = data(), warnings.catch_warnings()
    with said:
        warnings.simplefilter("ignore")  # the threshold was never set
        wanted = sf.load(tmp_path)(x)
        torch.save({n: t for n, t in theirs.state_dict().items() if n not in ("k", "threshold")}, tmp_path / "ae.pt")
        assert torch.equal(sf.load(tmp_path)(x), wanted)
        sf.interop.convert(tmp_path, tmp_path / "b", "dictionary_learning")
    again, _ = load_dictionary(str(tmp_path / "b"), "cpu")
    assert int(again.k) == K
    if kind == "topk":
        torch.testing.assert_close(again(x), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("to", ["dictionary_learning", "saebench"])
@pytest.mark.parametrize("cls", [sf.GatedSAE, sf.ReluSAE])
def test_a_decoder_row_of_norm_0_is_written_as_the_package_loads_it(cls, to, tmp_path):
    sae = cls(D, F, seed=0)
    randomise(sae)
    sae.W_dec.data[4] = 0
    sf.interop.save(sae, tmp_path, to, layer=3, model_name="a/model")
    again, _ = load_dictionary(str(tmp_path), "cpu")
    x = data()
    torch.testing.assert_close(again(x), sae(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(again.decoder.weight.norm(dim=0), torch.ones(F))
    assert not again.encode(x)[:, 4].any() and sae.encode(x)[:, 4].any()


# ---- SAELens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SAELENS)
@pytest.mark.parametrize("centred", [True, False])
def test_an_sae_of_saelens_gives_its_own_outputs_and_goes_back_the_same(architecture, centred, tmp_path):
    theirs = make_saelens(architecture, tmp_path / "a", apply_b_dec_to_input=centred)
    mine = sf.load(tmp_path / "a")
    assert mine.apply_b_dec_to_input is centred and mine.metadata["layer"] == 3
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "sae_fast")
    sf.interop.convert(tmp_path / "b", tmp_path / "c", "saelens")
    assert_same_files(tmp_path / "a", tmp_path / "c")
    configs = [json.loads((tmp_path / name / "cfg.json").read_text()) for name in "ac"]
    assert configs[1]["metadata"].pop("sae_fast")
    assert configs[0] == configs[1]
    assert type(SAE.load_from_disk(tmp_path / "c")) is type(theirs)
    judge(mine, theirs)


@pytest.mark.parametrize("architecture", ["gated", "standard"])
def test_saelens_norms_are_folded_for_dictionary_learning_and_unfolded_to_the_same_bits(architecture, tmp_path):
    theirs = make_saelens(architecture, tmp_path / "a")
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "dictionary_learning")
    ae, _ = load_dictionary(str(tmp_path / "b"), "cpu")
    x = data()
    torch.testing.assert_close(ae.decoder.weight.norm(dim=0), torch.ones(F))
    torch.testing.assert_close(ae.encode(x), theirs.encode(x) * theirs.W_dec.norm(dim=1), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ae(x), theirs(x), rtol=2e-5, atol=2e-5)
    sf.interop.convert(tmp_path / "b", tmp_path / "c", "saelens")
    assert_same_files(tmp_path / "a", tmp_path / "c")


def test_a_topk_of_saelens_keeps_its_norms_in_dictionary_learning(tmp_path):
    theirs = make_saelens("topk", tmp_path / "a")
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "dictionary_learning")
    ae, _ = load_dictionary(str(tmp_path / "b"), "cpu")
    torch.testing.assert_close(ae.encode(data()), theirs.encode(data()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ae(data()), theirs(data()), rtol=1e-5, atol=2e-5)
    sf.interop.convert(tmp_path / "b", tmp_path / "c", "saelens")
    assert_same_files(tmp_path / "a", tmp_path / "c")


def test_norms_are_not_unfolded_into_weights_that_were_trained_since(tmp_path):
    make_saelens("gated", tmp_path / "a")
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "dictionary_learning")
    state = torch.load(tmp_path / "b" / "ae.pt")
    state["encoder.weight"][3, 4] += 1e-3
    torch.save(state, tmp_path / "b" / "ae.pt")
    sf.interop.convert(tmp_path / "b", tmp_path / "c", "saelens")
    assert same_bits(load_file(tmp_path / "c" / "sae_weights.safetensors")["W_enc"], state["encoder.weight"].T)


def test_rescaled_activations_are_folded(tmp_path):
    theirs = make_saelens("topk", tmp_path, rescale_acts_by_decoder_norm=True)
    with pytest.warns(UserWarning, match="rescale_acts_by_decoder_norm"):
        mine = sf.load(tmp_path)
    x = data()
    torch.testing.assert_close(mine.encode(x), theirs.encode(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(mine(x), theirs(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["gated", "standard", "topk", "batchtopk", "matryoshka_batchtopk"])
def test_checkpoints_of_a_training_are_read(architecture, tmp_path):
    cls, config_cls = get_sae_training_class(architecture)
    arguments = {"k": K} if "topk" in architecture else {}
    arguments |= {"matryoshka_widths": [10, 35, F]} if "matryoshka" in architecture else {}
    theirs = cls(config_cls(d_in=D, d_sae=F, decoder_init_norm=1.0, **arguments))
    randomise(theirs, unit="W_dec")
    if "batchtopk" in architecture:
        theirs.topk_threshold = torch.tensor(1.5, dtype=torch.double)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    training, inference = sf.load(tmp_path / "training"), sf.load(tmp_path / "inference")
    wanted = SAE.load_from_disk(tmp_path / "inference")
    x = data()
    for mine in (training, inference):
        torch.testing.assert_close(mine.encode(x), wanted.encode(x), rtol=2e-5, atol=2e-5)
    if "matryoshka" in architecture:
        assert training.group_sizes == (10, 25, 35)
    assert isinstance(TrainingSAE.load_from_disk(tmp_path / "training"), cls)


def exact_in_bfloat16(sae: TrainingSAE, seed: int = 0) -> Tensor:
    """Fills it with small integers, on which bfloat16 rounds nothing, and gives examples of such."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=g))
            if name == "threshold":
                p.copy_(torch.randint(0, 4, p.shape, generator=g) + 2.0**-12)  # the integer itself, in bfloat16
    return torch.randint(-1, 2, (64, D), generator=g).bfloat16()


def test_a_threshold_in_float32_beside_bfloat16_gives_saelens_own_bits(tmp_path):
    cls, config_cls = get_sae_training_class("jumprelu")
    theirs = cls(config_cls(d_in=D, d_sae=F, dtype="bfloat16"))
    x = exact_in_bfloat16(theirs)
    assert (theirs.W_enc.dtype, theirs.threshold.dtype) == (torch.bfloat16, torch.float32)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    for folder in ("training", "inference"):
        wanted = SAE.load_from_disk(tmp_path / "inference") if folder == "inference" else theirs
        mine = sf.load(tmp_path / folder)
        assert mine.W_enc.dtype == torch.bfloat16 and same_bits(mine.threshold.float(), theirs.threshold)
        with torch.no_grad():
            assert torch.equal(mine.encode(x), wanted.encode(x)) and torch.equal(mine(x), wanted(x))  # −0 is 0
            assert 0 < (mine.encode(x) != 0).float().mean() < 0.5
        for to in ("sae_fast", "saelens"):
            sf.interop.convert(tmp_path / folder, tmp_path / folder / to, to)
            again = sf.load(tmp_path / folder / to)
            assert all(same_bits(t, again.state_dict()[name]) for name, t in mine.state_dict().items())
        assert_same_files(tmp_path / "inference", tmp_path / folder / "saelens")
        assert torch.equal(SAE.load_from_disk(tmp_path / folder / "saelens").encode(x), theirs.encode(x))


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("k", [1.5, 0.5])
def test_a_fractional_k_loads_by_its_threshold(architecture, k, tmp_path):
    cls, config_cls = get_sae_training_class(architecture)
    arguments = {"matryoshka_widths": [10, 35, F]} if "matryoshka" in architecture else {}
    theirs = cls(config_cls(d_in=D, d_sae=F, k=k, decoder_init_norm=1.0, **arguments))
    randomise(theirs, unit="W_dec")
    theirs.topk_threshold.fill_(0.7)
    theirs.save_model(tmp_path / "a")
    theirs.save_inference_model(tmp_path / "b")
    mine, x = sf.load(tmp_path / "a"), data()
    assert mine.k == k and type(mine) is sf.BatchTopKSAE
    torch.testing.assert_close(mine.encode(x), SAE.load_from_disk(tmp_path / "b").encode(x), rtol=2e-5, atol=2e-5)
    sf.interop.convert(tmp_path / "a", tmp_path / "c", "saelens")
    assert sf.load(tmp_path / "c").k == k
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "c").encode(x), mine.encode(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["gated", "standard", "jumprelu", "topk", "batchtopk"])
def test_the_scale_of_a_training_checkpoint_is_the_one_that_saelens_folds(architecture, tmp_path):
    cls, config_cls = get_sae_training_class(architecture)
    arguments = {"k": K} if "topk" in architecture else {}
    config = config_cls(
        d_in=D, d_sae=F, normalize_activations="expected_average_only_in", decoder_init_norm=1.0, **arguments
    )
    theirs = cls(config)
    randomise(theirs, unit="W_dec")
    if architecture == "batchtopk":
        theirs.topk_threshold.fill_(1.5)
    theirs.save_model(tmp_path)
    ActivationScaler(scaling_factor=2.5).save(str(tmp_path / "activation_scaler.json"))
    mine, x = sf.load(tmp_path), data()
    theirs.fold_activation_norm_scaling_factor(2.5)
    theirs.save_inference_model(tmp_path / "inference")
    wanted = SAE.load_from_disk(tmp_path / "inference")
    # Features that count their norms have them of the folded decoder in SAELens.
    counted = 2.5 if getattr(config, "rescale_acts_by_decoder_norm", False) else 1.0
    torch.testing.assert_close(mine.encode(x), wanted.encode(x) * counted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(mine(x), wanted(x), rtol=2e-5, atol=2e-5)


def test_a_batchtopk_of_ours_comes_back_from_saelens_as_one(tmp_path):
    make_dl("matryoshka", tmp_path / "a")
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "saelens")
    assert SAE.load_from_disk(tmp_path / "b").cfg.architecture() == "jumprelu"
    again = sf.load(tmp_path / "b")
    assert isinstance(again, sf.BatchTopKSAE) and again.group_sizes == (10, 25, 35) and float(again.threshold) == 1.25
    sf.interop.convert(tmp_path / "b", tmp_path / "c", "dictionary_learning")
    assert_same_files(tmp_path / "a", tmp_path / "c")


def test_a_config_from_before_version_6_is_read_as_the_package_reads_it(tmp_path):
    theirs = make_saelens("gated", tmp_path / "a")
    config = {
        **dict(architecture="gated", d_in=D, d_sae=F, dtype="float32", device="cpu", model_name="a/model"),
        **dict(hook_point="blocks.3.hook_mlp_out", hook_point_head_index=None, activation_fn_str="relu"),
        **dict(normalize_activations=False, sae_lens_training_version="3.1.0"),
    }
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(config))
    mine = sf.load(tmp_path / "a")
    assert (mine.metadata["hook_name"], mine.metadata["layer"]) == ("blocks.3.hook_mlp_out", 3)
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "saelens")
    again = SAE.load_from_disk(tmp_path / "b")
    assert again.cfg.metadata.hook_name == "blocks.3.hook_mlp_out" and again.cfg.metadata.model_name == "a/model"
    x = data()
    assert torch.equal(again.encode(x), SAE.load_from_disk(tmp_path / "a").encode(x))
    judge(mine, theirs)


def test_a_scale_that_is_not_in_the_files_has_to_be_given(tmp_path):
    theirs = make_saelens("gated", tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(
        ValueError, match=r"cfg.json: normalize_activations: 'expected_average_only_in'.*want activation_scale"
    ):
        sf.load(tmp_path)
    mine = sf.load(tmp_path, activation_scale=2.5)
    theirs.fold_activation_norm_scaling_factor(2.5)
    judge(mine, theirs)


def test_heads_side_by_side_are_said(tmp_path):
    theirs = make_saelens("standard", tmp_path, reshape_activations="hook_z")
    with pytest.warns(UserWarning, match="reshape_activations: 'hook_z'"):
        mine = sf.load(tmp_path)
    x = data()
    torch.testing.assert_close(mine(x), theirs(x.view(-1, 4, 5)).flatten(1), rtol=1e-5, atol=1e-5)


# ---- Gated to JumpReLU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning", "sae_fast"])
def test_a_gated_sae_is_exported_as_jumprelu(to, tmp_path):
    theirs = make_dl("gated", tmp_path / "a")
    sf.interop.convert(tmp_path / "a", tmp_path / "b", to, as_jumprelu=True)
    load = {
        "saelens": SAE.load_from_disk,
        "dictionary_learning": lambda p: load_dictionary(str(p), "cpu")[0],
        "sae_fast": sf.load,
    }[to]
    exported, x = load(tmp_path / "b"), data()
    assert "jumprelu" in type(exported).__name__.lower()
    wanted = theirs.encode(x)
    got = exported.encode(x)
    flips = (got != 0) != (wanted != 0)
    assert flips.sum() <= 2, "only ties may flip"
    torch.testing.assert_close(torch.where(flips, 0, got), torch.where(flips, 0, wanted), rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="as_jumprelu: got a JumpReluSAE"):
        sf.interop.convert(tmp_path / "b", tmp_path / "c", to, as_jumprelu=True)


# ---- sparsify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [dict(num_latents=F), dict(expansion_factor=4)], ids=str)
@pytest.mark.parametrize("transcode", [False, True], ids=["autoencoder", "transcoder"])
def test_a_coder_of_sparsify_gives_its_own_outputs_and_goes_back_the_same(sizes, transcode, tmp_path):
    theirs = SparseCoder(D, SparseCoderConfig(k=K, transcode=transcode, **sizes))
    randomise(theirs)
    theirs.save_to_disk(tmp_path / "layers.3")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mine = sf.load(tmp_path / "layers.3")
        sf.interop.convert(tmp_path / "layers.3", tmp_path / "b", "sae_fast")
        sf.interop.convert(tmp_path / "b", tmp_path / "c", "sparsify")
    assert any("transcoder" in str(w.message) for w in said) == transcode
    assert mine.metadata["hook_name"] == "layers.3"
    assert_same_files(tmp_path / "layers.3", tmp_path / "c")
    again = SparseCoder.load_from_disk(tmp_path / "c")
    assert again.cfg.to_dict() | {"num_latents": 0} == theirs.cfg.to_dict() | {"num_latents": 0}
    x = data()
    with torch.no_grad():
        values, indices, _ = theirs.encode(x)
        dense = torch.zeros(len(x), theirs.num_latents).scatter_(1, indices, values)
        torch.testing.assert_close(mine.encode(x), dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine(x), theirs.decode(values, indices), rtol=1e-5, atol=1e-5)


def test_a_topk_goes_round_all_four_packages(tmp_path):
    make_dl("topk", tmp_path / "0")
    for i, to in enumerate(("sparsify", "saelens", "sparsify", "sae_fast", "dictionary_learning")):
        sf.interop.convert(tmp_path / str(i), tmp_path / str(i + 1), to)
    assert_same_files(tmp_path / "0", tmp_path / "5")


# ---- SAEBench -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["dictionary_learning", "saelens"])
def test_saebench_loads_what_is_written_for_it(source, tmp_path, monkeypatch):
    gated = pytest.importorskip("sae_bench.custom_saes.gated_sae")
    if source == "saelens":
        theirs = make_saelens("gated", tmp_path / "a")  # rows of any norm
    else:
        theirs = make_dl("gated", tmp_path / "a")
    sf.interop.convert(tmp_path / "a", tmp_path / "b", "saebench")
    monkeypatch.setattr(gated, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    loaded = gated.load_dictionary_learning_gated_sae(
        "any", "b/ae.pt", "model", torch.device("cpu"), torch.float32, layer=3
    )
    x = data()
    torch.testing.assert_close(loaded(x), theirs(x), rtol=2e-5, atol=2e-5)
    assert loaded.cfg.architecture == "gated"


@pytest.mark.parametrize("kind", DL)
def test_any_layer_is_an_sae_that_saebench_takes(kind, tmp_path):
    pytest.importorskip("sae_bench.custom_saes.base_sae")
    from sae_bench.custom_saes.base_sae import BaseSAE

    from sae_fast.interop.saebench import as_saebench

    theirs = make_dl(kind, tmp_path)
    sae = as_saebench(sf.load(tmp_path), "a-model", 3)
    assert isinstance(sae, BaseSAE) and sae.check_decoder_norms()
    assert sae.W_enc.shape == (D, F) and sae.W_dec.shape == (F, D) and isinstance(sae.W_dec, torch.nn.Parameter)
    assert (sae.cfg.hook_name, sae.cfg.d_sae, sae.cfg.dtype) == ("blocks.3.hook_resid_post", F, "float32")
    assert sae.device == torch.device("cpu") and sae.dtype == torch.float32
    x = data()
    torch.testing.assert_close(sae.encode(x), theirs.encode(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(sae(x), theirs.decode(theirs.encode(x)), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x), rtol=2e-5, atol=2e-5)
    sae.sae.metadata |= {"model_name": "said", "layer": 2, "hook_name": "blocks.2.hook_resid_post"}
    own = as_saebench(sae.sae)
    assert (own.cfg.model_name, own.cfg.hook_layer, own.cfg.hook_name) == ("said", 2, "blocks.2.hook_resid_post")
    with pytest.raises(ValueError, match="hook_layer: got 3, but the SAE's metadata says 2"):
        as_saebench(sae.sae, "a-model", 3)
    sae.sae.metadata = {}
    with pytest.raises(ValueError, match="model_name, hook_layer: got None and None"):
        as_saebench(sae.sae)
    with torch.no_grad():
        sae.sae.W_dec.mul_(2)
    with pytest.raises(ValueError, match="rows are not unit"):
        as_saebench(sae.sae, "a-model", 3)
    with pytest.raises(ValueError, match="sae: got Linear, want one of"):
        as_saebench(torch.nn.Linear(D, F), "a-model", 3)
