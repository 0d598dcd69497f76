"""Other packages' checkpoints: what is refused, by name; nothing is executed, lost or half-written; the Hub; the command.

That the files are the packages' own is tested against the packages, in tests/peers/test_formats.py.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits, same_bits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast import files, interop
from sae_fast.cli import app
from sae_fast.interop import _norms
from sae_fast.interop.formats import FORMATS

D, F = 12, 30
MAKE = {
    "gated": lambda **k: sf.GatedSAE(D, F, seed=0, **k),
    "relu": lambda **k: sf.ReluSAE(D, F, seed=0, **k),
    "jumprelu": lambda **k: sf.JumpReluSAE(D, F, seed=0, **k),
    "topk": lambda **k: sf.TopKSAE(D, F, 4, seed=0, **k),
    "batchtopk": lambda **k: sf.BatchTopKSAE(D, F, 4, seed=0, **k),
}
HELD = {  # the formats that hold each kind, as it is here
    "sae_fast": ("gated", "relu", "jumprelu", "topk", "batchtopk"),
    "dictionary_learning": ("gated", "relu", "topk", "batchtopk"),
    "saelens": ("gated", "relu", "jumprelu", "topk"),
    "sparsify": ("topk",),
}
formats_and_kinds = pytest.mark.parametrize("format, kind", [(f, k) for f, kinds in HELD.items() for k in kinds])


def make(kind: str, **kwargs):
    sae = MAKE[kind](**kwargs)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sae.parameters():
            if p.dim() == 1:
                p.copy_(torch.randn(p.shape, generator=g).abs())
    return sae


def same(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return type(a) is type(b) and a.options() == b.options() and all(same_bits(t, second[n]) for n, t in first.items())


def weights(folder: Path) -> Path:
    return next(p for p in sorted(folder.iterdir()) if p.suffix in (".pt", ".safetensors"))


def config(folder: Path) -> Path:
    return next(p for p in sorted(folder.iterdir()) if p.suffix == ".json")


def edit(folder: Path, change) -> None:
    value = json.loads(config(folder).read_text())
    change(value)
    config(folder).write_text(json.dumps(value))


def edit_tensors(folder: Path, change) -> None:
    file = weights(folder)
    tensors = torch.load(file) if file.suffix == ".pt" else load_file(file)
    change(tensors)
    if file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file({k: t.contiguous() for k, t in tensors.items()}, file)


# ---- Round trips ----------------------------------------------------------------------------------------------------


@formats_and_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_again(format, kind, dtype, tmp_path):
    sae = make(kind, dtype=dtype)
    sae.metadata = {"note": "mine"}
    interop.save(sae, tmp_path, format, model_name="a/model", layer=2)
    again = sf.load(tmp_path)
    assert same(sae, again)
    assert {"note": "mine", "model_name": "a/model", "layer": 2}.items() <= again.metadata.items()
    assert sae.metadata == {"note": "mine"}, "saving changes nothing"


@pytest.mark.parametrize("kind", MAKE)
def test_what_does_not_subtract_b_dec_says_so_in_our_format(kind, tmp_path):
    sae = make(kind, apply_b_dec_to_input=False)
    sf.save(sae, tmp_path)
    assert same(sae, sf.load(tmp_path)) and not sf.load(tmp_path).apply_b_dec_to_input


def test_a_scale_is_folded(tmp_path):
    sae = make("gated")
    interop.save(sae, tmp_path, "saelens")
    scaled = sf.load(tmp_path, activation_scale=4.0)
    x = torch.randn(33, D, generator=torch.Generator().manual_seed(2))
    assert torch.equal(scaled.encode(x), sae.encode(4 * x)), "a power of two rounds nothing"
    torch.testing.assert_close(scaled(x), sae(4 * x) / 4)
    for wrong in (0, -1, float("inf"), "2"):
        with pytest.raises(ValueError, match="activation_scale"):
            sf.load(tmp_path, activation_scale=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MAKE)
def test_folding_decoder_norms_keeps_the_function_and_unfolding_restores_the_bits(kind, dtype):
    sae = make(kind, dtype=dtype)
    with torch.no_grad():
        sae.W_dec.mul_(torch.logspace(-3, 3, F).to(dtype)[:, None])
        sae.W_dec[3] = 0
        sae.W_enc[5, :4] = torch.tensor([1e-42, -0.0, 3e-39, 0.0]).to(dtype)  # subnormal in float32, 0 in float16
    if kind == "batchtopk":
        sae.threshold.fill_(0.5)
    before = {n: t.clone() for n, t in sae.state_dict().items()}
    x = torch.randn(65, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted, chooses = sae(x), kind in ("topk", "batchtopk")
    if chooses:
        with pytest.raises(ValueError, match="rows are not unit: folded, it would choose others"):
            _norms.fold(sae)
        assert all(same_bits(t, before[n]) for n, t in sae.state_dict().items())
    how = _norms.fold(sae, chosen_with_norms=chooses)
    assert _norms.is_unit(sae) and not sae.encode(x)[:, 3].any(), "a row of norm 0 is any unit row, its feature silent"
    if not chooses and dtype == torch.float32:
        torch.testing.assert_close(sae(x), wanted, rtol=1e-4, atol=1e-2)
    _norms.unfold(sae, _norms.Unfold.of_tensors(how.tensors(), how.digest))
    for name, t in sae.state_dict().items():
        assert same_bits(t, before[name]), name
    with pytest.raises(ValueError, match="unfold: the weights are no longer"):
        _norms.unfold(sae, how)


def test_folding_float64_is_refused():
    with pytest.raises(ValueError, match="float64, want a narrower"):
        _norms.fold(make("gated", dtype=torch.float64))


@pytest.mark.parametrize("format", ["dictionary_learning", "saelens"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_what_chooses_features_by_comparing_them_keeps_its_norms(kind, format, tmp_path):
    sae = make(kind)
    with torch.no_grad():
        sae.W_dec.mul_(torch.logspace(-1, 1, F)[:, None])
        if kind == "batchtopk":
            sae.threshold.fill_(0.7)
    interop.save(sae, tmp_path, format)
    assert same(sae, sf.load(tmp_path))
    with pytest.raises(ValueError, match="folded, it would choose others"):
        sf.load(tmp_path, fold_decoder_norm=True)
    with pytest.raises(ValueError, match="rows are not unit"):
        interop.save(sae, tmp_path / "b", "saebench", layer=1, model_name="m")


# ---- What a format cannot hold --------------------------------------------------------------------------------------

GROUPS = dict(group_sizes=[10, 20])
REFUSED = {
    "gated without pre-bias": (
        "gated",
        dict(apply_b_dec_to_input=False),
        "dictionary_learning",
        "apply_b_dec_to_input: got False",
    ),
    "jumprelu with pre-bias": ("jumprelu", {}, "dictionary_learning", "apply_b_dec_to_input: got True"),
    "topk without pre-bias": (
        "topk",
        dict(apply_b_dec_to_input=False),
        "dictionary_learning",
        "apply_b_dec_to_input: got False",
    ),
    "grouped topk": ("topk", GROUPS, "dictionary_learning", "group_sizes"),
    "grouped topk, saelens": ("topk", GROUPS, "saelens", "group_sizes"),
    "no threshold": ("batchtopk", {}, "saelens", "threshold: it is not set"),
    "gated in sparsify": ("gated", {}, "sparsify", "it holds TopKSAE only"),
    "batchtopk in sparsify": ("batchtopk", {}, "sparsify", "it holds TopKSAE only"),
    "grouped in sparsify": ("topk", GROUPS, "sparsify", "group_sizes: it has no groups"),
    "no pre-bias in sparsify": ("topk", dict(apply_b_dec_to_input=False), "sparsify", "apply_b_dec_to_input: got False"),
    "saebench without pre-bias": ("relu", dict(apply_b_dec_to_input=False), "saebench", "apply_b_dec_to_input: got False"),
    "saebench without a layer": ("gated", {}, "saebench", "layer: got None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_named_and_nothing_is_written(case, tmp_path):
    kind, options, format, message = REFUSED[case]
    about = {} if "without a layer" in case else dict(layer=1, model_name="m")
    with pytest.raises(ValueError, match=rf"sae: {format} cannot hold this .*SAE: .*{message}"):
        interop.save(make(kind, **options), tmp_path / "folder", format, **about)
    assert not (tmp_path / "folder").exists()


def test_an_saelens_config_without_pre_bias_is_refused_by_dictionary_learning_and_kept_by_the_others(tmp_path):
    interop.save(make("gated", apply_b_dec_to_input=False), tmp_path / "a", "saelens")
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["apply_b_dec_to_input"] is False
    with pytest.raises(ValueError, match="apply_b_dec_to_input: got False"):
        interop.convert(tmp_path / "a", tmp_path / "b", "dictionary_learning")
    assert not (tmp_path / "b").exists()
    interop.convert(tmp_path / "a", tmp_path / "b", "sae_fast")
    assert same(sf.load(tmp_path / "a"), sf.load(tmp_path / "b"))


def test_saebench_wants_a_name_unit_rows_and_more_features_than_dimensions(tmp_path):
    sae = make("gated")
    with pytest.raises(ValueError, match="model_name: missing"):
        interop.save(sae, tmp_path / "a", "saebench", layer=3)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    with pytest.raises(ValueError, match="rows are not unit"):
        interop.save(sae, tmp_path / "a", "saebench", layer=3, model_name="m", fold_decoder_norm=False)
    with pytest.raises(ValueError, match="d_sae: got 10, want at least d_in = 12"):
        interop.save(sf.GatedSAE(12, 10, seed=0), tmp_path / "a", "saebench", layer=3, model_name="m")
    interop.save(sae, tmp_path / "a", "saebench", layer=3, model_name="m")
    torch.testing.assert_close(sf.load(tmp_path / "a").W_dec.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("call", [interop.convert, lambda src, dst, to: interop.save(sf.load(src), dst, to)])
def test_an_unknown_format_is_refused_with_those_there_are(call, tmp_path):
    sf.save(make("gated"), tmp_path / "a")
    with pytest.raises(ValueError, match=rf"got 'onnx', want one of .*{sorted(FORMATS)[0]}"):
        call(tmp_path / "a", tmp_path / "b", "onnx")


# ---- Damaged files --------------------------------------------------------------------------------------------------


@formats_and_kinds
@pytest.mark.parametrize("keep", [0, 4, 0.3, 0.9])
def test_a_truncated_file_is_named(format, kind, keep, tmp_path):
    interop.save(make(kind), tmp_path, format)
    file = weights(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"{file.name}: truncated or damaged"):
        sf.load(tmp_path)


@formats_and_kinds
def test_a_missing_misshapen_or_unknown_tensor_is_named(format, kind, tmp_path):
    interop.save(make(kind), tmp_path, format)
    file = weights(tmp_path)
    for name in torch.load(file) if file.suffix == ".pt" else load_file(file):
        if name in ("k", "threshold") and "topk" in kind and format == "dictionary_learning":
            continue  # which older files have not
        interop.save(make(kind), tmp_path, format, overwrite=True)
        edit_tensors(tmp_path, lambda t, name=name: t.pop(name))
        with pytest.raises(ValueError, match=rf"'?{name}'? ?.*missing|missing.*{name}"):
            sf.load(tmp_path)
        interop.save(make(kind), tmp_path, format, overwrite=True)
        edit_tensors(tmp_path, lambda t, name=name: t.update({name: t[name][None].clone()}))
        with pytest.raises(ValueError, match=rf"{name}: got .*\(1,.*want"):
            sf.load(tmp_path)
    interop.save(make(kind), tmp_path, format, overwrite=True)
    edit_tensors(tmp_path, lambda t: t.update(other=torch.zeros(3)))
    with pytest.raises(ValueError, match=r"unknown tensors \['other'\]"):
        sf.load(tmp_path)


@pytest.mark.parametrize("format", ["dictionary_learning", "saelens"])
def test_mixed_and_integer_dtypes_are_refused(format, tmp_path):
    interop.save(make("gated"), tmp_path, format)
    edit_tensors(tmp_path, lambda t: t.update(r_mag=t["r_mag"].half()))
    with pytest.raises(ValueError, match=r"r_mag float16.*want one floating-point dtype"):
        sf.load(tmp_path)


CONFIGS = {
    "an unknown class": (
        "dictionary_learning", "gated", lambda c: c["trainer"].update(dict_class="CrossCoder"),
        "trainer.dict_class: got 'CrossCoder', want one of",
    ),
    "no trainer": ("dictionary_learning", "gated", lambda c: c.update(trainer=None), "trainer: got None, want dict"),
    "classes": (
        "dictionary_learning", "gated", lambda c: c["trainer"].update(dict_class=["x"]), r"trainer.dict_class: got \['x'\]"
    ),
    "architectures": ("saelens", "gated", lambda c: c.update(architecture=["gated"]), r"architecture: got \['gated'\]"),
    "no sizes": ("sparsify", "topk", lambda c: c.update(num_latents=0, expansion_factor=None), "num_latents: got 0"),
    "another k": (
        "dictionary_learning", "topk", lambda c: c["trainer"].update(k=7), "trainer.k: got 7, but .* holds k = 4"
    ),
    "an unknown architecture": (
        "saelens", "gated", lambda c: c.update(architecture="matching_pursuit"),
        "architecture: got 'matching_pursuit', want one of",
    ),
    "whitening": (
        "saelens", "gated", lambda c: c.update(normalize_activations="covariance_whitening"),
        "normalize_activations: got 'covariance_whitening",
    ),
    "another width": ("saelens", "gated", lambda c: c.update(d_sae=31), "d_sae: got 31, but .* holds 30"),
    "no width": ("saelens", "gated", lambda c: c.pop("d_in"), "d_in: got None, want int"),
    "pre-bias a word": (
        "saelens", "gated", lambda c: c.update(apply_b_dec_to_input="yes"), "apply_b_dec_to_input: got 'yes'"
    ),
    "a fine-tuned scale": (
        "saelens", "gated", lambda c: c.update(finetuning_scaling_factor=True), "finetuning_scaling_factor: got True"
    ),
    "a broken version": (
        "saelens", "gated", lambda c: c["metadata"].update(sae_lens_version="new"), "sae_lens_version: got 'new'"
    ),
    "no k": ("saelens", "topk", lambda c: c.pop("k"), "k: got None"),
    "half a k": ("saelens", "topk", lambda c: c.update(k=2.5), "k: got 2.5"),
    "groupmax": ("sparsify", "topk", lambda c: c.update(activation="groupmax"), "activation: got 'groupmax', want 'topk'"),
    "another size": (
        "sparsify", "topk", lambda c: c.update(num_latents=31, expansion_factor=1), "num_latents: got 31, but .* holds 30"
    ),
    "another d_in": ("sparsify", "topk", lambda c: c.update(d_in=13), "d_in: got 13, but .* holds 12"),
    "a skip connection": (
        "sparsify", "topk", lambda c: c.update(skip_connection=True), "skip_connection: got True, but .* has no W_skip"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_no_layer_fits_is_named_with_its_key(case, tmp_path):
    format, kind, change, message = CONFIGS[case]
    interop.save(make(kind), tmp_path, format)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=rf"{config(tmp_path).name}: {message}"):
        sf.load(tmp_path)


@pytest.mark.parametrize("format", ["dictionary_learning", "saelens", "sparsify"])
def test_a_config_that_is_not_json_or_not_there_is_named(format, tmp_path):
    interop.save(make("topk"), tmp_path, format)
    file = config(tmp_path)
    for content in (b"{", b"[]", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file.name}: (not valid JSON|got list)"):
            sf.load(tmp_path)
    file.unlink()
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"{file.name}: (there is no such file|trainer.dict_class: missing)"
    ):
        sf.load(tmp_path)


def test_a_class_without_a_config_is_known_by_its_tensors_where_they_say(tmp_path):
    for kind in ("gated", "relu"):
        interop.save(make(kind), tmp_path / kind, "dictionary_learning")
        (tmp_path / kind / "config.json").unlink()
        assert same(make(kind), sf.load(tmp_path / kind)) and same(make(kind), sf.load(tmp_path / kind / "ae.pt"))
    interop.save(make("topk"), tmp_path / "topk", "dictionary_learning")
    (tmp_path / "topk" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"dict_class: missing, and its tensors .* fit AutoEncoderTopK and BatchTopKSAE"):
        sf.load(tmp_path / "topk")


def test_the_oldest_gated_files_are_refused_by_their_tensors(tmp_path):
    names = {"bias": (D,), "decoder.weight": (D, F)}
    for encoder in ("active_features_encoder", "feature_magnitudes_encoder"):
        names |= {f"{encoder}.weight": (F, D), f"{encoder}.bias": (F,)}
    torch.save({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"active_features_encoder.weight, feature_magnitudes_encoder.weight: .*not tied"):
        sf.load(tmp_path)


def test_scaling_factors_of_old_saelens_files_are_dropped_when_they_are_ones_and_refused_otherwise(tmp_path):
    interop.save(make("gated"), tmp_path, "saelens")
    edit_tensors(tmp_path, lambda t: t.update(scaling_factor=torch.ones(F)))
    assert same(make("gated"), sf.load(tmp_path))
    edit_tensors(tmp_path, lambda t: t.update(scaling_factor=torch.full((F,), 2.0)))
    with pytest.raises(ValueError, match="scaling_factor: got values other than 1"):
        sf.load(tmp_path)


def test_a_skip_matrix_of_another_shape_is_named_and_one_that_the_config_denies(tmp_path):
    interop.save(make("topk"), tmp_path, "sparsify")
    edit_tensors(tmp_path, lambda t: t.update(W_skip=torch.zeros(D, D)))
    with pytest.raises(ValueError, match=r"cfg\.json: skip_connection: got False, but .* has a W_skip"):
        sf.load(tmp_path)
    edit(tmp_path, lambda c: c.update(skip_connection=True))
    edit_tensors(tmp_path, lambda t: t.update(W_skip=torch.zeros(D, F)))
    with pytest.raises(ValueError, match=r"W_skip: got shape \(12, 30\), want \(12, 12\)"):
        sf.load(tmp_path)


@pytest.mark.parametrize("factor", ["1", -2.0, True, float("inf"), float("nan")])
def test_a_backup_with_a_wrong_factor_is_refused(factor, tmp_path):
    interop.save(make("gated"), tmp_path, "dictionary_learning")
    state = torch.load(tmp_path / "ae.pt")
    torch.save({"step": 1, "ae": state, "norm_factor": factor}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"norm_factor: got"):
        sf.load(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    for value in ([torch.zeros(3)], {"a": 1}, {"a": {"b": torch.zeros(1)}}, torch.zeros(2)):
        torch.save(value, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match=r"ae\.pt: .*want a|dict_class: missing"):
            sf.load(tmp_path)


def test_non_contiguous_weights_are_read_as_what_they_are(tmp_path):
    sae = make("gated")
    interop.save(sae, tmp_path, "dictionary_learning")
    state = torch.load(tmp_path / "ae.pt")
    strided = {n: t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for n, t in state.items()}
    assert not strided["encoder.weight"].is_contiguous() and not strided["r_mag"].is_contiguous()
    torch.save(strided, tmp_path / "ae.pt")
    again = sf.load(tmp_path)
    assert same(sae, again) and all(p.is_contiguous() for p in again.parameters())


# ---- Pickles --------------------------------------------------------------------------------------------------------


class Attack:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["alone", "in a state_dict", "a plain pickle", "an old file of torch"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(how, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "ae.pt"
    interop.save(make("gated"), tmp_path, "dictionary_learning")
    state = torch.load(file)
    if how == "a plain pickle":
        file.write_bytes(pickle.dumps(Attack(mark)))
    elif how == "alone":
        torch.save(Attack(mark), file)
    else:
        torch.save({**state, "r_mag": Attack(mark)}, file, _use_new_zipfile_serialization=how == "in a state_dict")
    with pytest.raises(ValueError, match=r"ae.pt: want (tensors and plain values: it names code|what torch.save writes)"):
        sf.load(tmp_path)
    assert not mark.exists(), "the code was run"
    torch.load(file, weights_only=False) if how != "a plain pickle" else pickle.loads(file.read_bytes())
    assert mark.exists(), "and would have been by torch.load without weights_only"


# ---- Nothing is half-written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", HELD)
def test_a_folder_that_has_such_files_is_not_overwritten_unless_asked(format, tmp_path):
    first, second = make("topk"), sf.TopKSAE(D, F, 5, seed=9)
    interop.save(first, tmp_path, format)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        interop.save(second, tmp_path, format)
    assert same(first, sf.load(tmp_path))
    interop.save(second, tmp_path, format, overwrite=True)
    assert same(second, sf.load(tmp_path)) and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("format", ["dictionary_learning", "saelens", "sparsify"])
def test_a_full_disk_leaves_what_was_there(format, tmp_path, monkeypatch):
    first = make("topk")
    interop.save(first, tmp_path, format)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)  # the config, which comes last
    with pytest.raises(OSError, match="No space left"):
        interop.save(sf.TopKSAE(D, F, 5, seed=9), tmp_path, format, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_is_written_twice_is_the_same_bytes(tmp_path):
    for name in "ab":
        interop.save(make("gated"), tmp_path / name, "dictionary_learning")
    assert (tmp_path / "a" / "ae.pt").read_bytes() == (tmp_path / "b" / "ae.pt").read_bytes()


def test_metadata_that_json_cannot_hold_is_found_before_anything_is_written(tmp_path):
    sae = make("gated")
    sae.metadata["tensor"] = torch.zeros(1)
    for format in ("saelens", "dictionary_learning"):
        with pytest.raises(TypeError, match="JSON"):
            interop.save(sae, tmp_path / format, format)
        assert not (tmp_path / format).exists()


def test_files_are_replaced_all_or_none(tmp_path):
    def fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        files.write_files(tmp_path, {"a": lambda p: p.write_text("new") and None, "b": fail}, overwrite=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}


# ---- Finding --------------------------------------------------------------------------------------------------------


def test_a_folder_of_folders_says_what_is_in_it(tmp_path):
    for name in ("layers.0", "layers.3"):
        interop.save(make("topk"), tmp_path / "run" / name, "sparsify")
    with pytest.raises(FileNotFoundError, match=r"run holds no SAE itself; there are weights in layers.0, layers.3"):
        sf.load(tmp_path / "run")
    interop.save(make("gated"), tmp_path / "b" / "checkpoints", "dictionary_learning")
    (tmp_path / "b" / "checkpoints" / "ae.pt").rename(tmp_path / "b" / "checkpoints" / "ae_20.pt")
    (tmp_path / "b" / "checkpoints" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoints holds ae_20.pt: name one of these files"):
        sf.load(tmp_path / "b" / "checkpoints")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.bin").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json or other sign of an SAE, but model.bin; want"):
        sf.load(tmp_path / "other")


def test_a_folder_holds_an_sae_of_one_format(tmp_path):
    old, new = make("gated"), sf.GatedSAE(D, F, seed=9)
    interop.save(old, tmp_path / "a", "dictionary_learning")
    for format in ("saelens", "sae_fast"):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="holds an SAE of dictionary_learning; want a folder of its own"):
                interop.save(new, tmp_path / "a", format, overwrite=overwrite)
    interop.save(new, tmp_path / "a", "saebench", overwrite=True, layer=1, model_name="m")
    assert same(new, sf.load(tmp_path / "a")), "which are the same files"
    with pytest.raises(FileExistsError, match="holds an SAE of dictionary_learning; want a folder of its own"):
        sf.save(old, tmp_path / "a")
    sf.save(old, tmp_path / "b")
    (tmp_path / "b" / "config.json").rename(tmp_path / "a" / "config.json")  # as nothing here would do
    with pytest.raises(ValueError, match="holds SAEs of dictionary_learning and sae_fast; want a folder of one"):
        sf.load(tmp_path / "a")


def test_what_we_keep_in_another_packages_config_may_be_anything(tmp_path):
    for format in ("dictionary_learning", "saelens"):
        interop.save(make("gated"), tmp_path / format, format)
        edit(tmp_path / format, lambda c: c.get("metadata", c).update(sae_fast=3))
        assert same(make("gated"), sf.load(tmp_path / format))


def test_a_threshold_is_that_of_the_tensors_and_one_never_set_is_said(tmp_path):
    interop.save(make("topk"), tmp_path / "a", "dictionary_learning")
    edit_tensors(tmp_path / "a", lambda t: t.update(threshold=torch.tensor(0.25)))
    assert sf.load(tmp_path / "a").metadata["threshold"] == 0.25
    interop.save(make("batchtopk"), tmp_path / "b", "dictionary_learning")
    with pytest.warns(UserWarning, match="threshold: it was never set"):
        sf.load(tmp_path / "b")


def test_a_path_that_is_nothing_says_so():
    with pytest.raises(FileNotFoundError, match=r"there is no '\./nothing/here', and it is no place on the Hub"):
        sf.load("./nothing/here")


# ---- The command ----------------------------------------------------------------------------------------------------


def run(*arguments) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return done.exit_code, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_the_command_converts(tmp_path):
    sae = make("gated")
    interop.save(sae, tmp_path / "a", "dictionary_learning")
    code, out, _ = run(tmp_path / "a", tmp_path / "b", "--to", "saelens", "--model-name", "m", "--layer", 4)
    assert code == 0 and "GatedSAE, 30 features of 12 dimensions: dictionary_learning → saelens" in out
    again = sf.load(tmp_path / "b")
    assert same(sae, again) and again.metadata["layer"] == 4
    code, _, error = run(tmp_path / "a", tmp_path / "b", "--to", "saelens")
    assert code == 1 and "error: " in error and "--overwrite" in error
    assert run(tmp_path / "a", tmp_path / "b", "--to", "saelens", "--overwrite")[0] == 0
    assert run(tmp_path / "b", tmp_path / "d", "--to", "sae_fast")[1].startswith(
        "GatedSAE, 30 features of 12 dimensions: saelens"
    )
    assert "sae_fast → saelens" in run(tmp_path / "d", tmp_path / "e", "--to", "saelens")[1]
    code, _, _ = run(tmp_path / "a", tmp_path / "c", "--to", "saelens", "--as-jumprelu")
    assert code == 0 and isinstance(sf.load(tmp_path / "c"), sf.JumpReluSAE)


def test_the_command_says_what_is_wrong_and_what_to_know_in_a_line(tmp_path):
    code, _, error = run(tmp_path / "none", tmp_path / "b", "--to", "saelens")
    assert code == 1 and error.startswith("error: path: there is no")
    interop.save(make("gated"), tmp_path / "a", "saelens")
    code, _, error = run(tmp_path / "a", tmp_path / "b", "--to", "word")
    assert code == 1 and "to: got 'word', want one of" in error
    edit(tmp_path / "a", lambda c: c.update(reshape_activations="hook_z"))
    code, _, error = run(tmp_path / "a", tmp_path / "b", "--to", "sae_fast")
    assert code == 0 and "note: " in error and "hook_z" in error
    edit(tmp_path / "a", lambda c: c.update(normalize_activations="expected_average_only_in"))
    assert run(tmp_path / "a", tmp_path / "c", "--to", "sae_fast")[0] == 1
    assert run(tmp_path / "a", tmp_path / "c", "--to", "sae_fast", "--activation-scale", 2.0)[0] == 0


def test_loading_warns_at_the_callers_line(tmp_path):
    interop.save(make("gated"), tmp_path, "saelens")
    edit(tmp_path, lambda c: c.update(reshape_activations="hook_z"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sf.load(tmp_path)
    assert [Path(w.filename).name for w in said] == ["test_interop.py"]
    assert_same_bits(list(make("gated").parameters()), list(make("gated").parameters()))
