"""What others' files, and inputs made like them, have shown to be wrong: the right value of each, in every format."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import warnings
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from helpers import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from problems.tiny_models import save_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast import interop
from sae_fast.cli import app
from sae_fast.data.harvest import harvest
from sae_fast.data.text import read_text_file
from sae_fast.interop import _norms
from sae_fast.interop.formats import FORMATS
from sae_fast.runs.encode import open_activations
from sae_fast.runs.report import read_effects

D, F = 8, 32


def saelens(folder: Path, architecture: str, tensors: dict[str, Tensor], **config) -> Path:
    """A folder as SAELens writes it; W_enc [d, F], W_dec [F, d]."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    about = dict(architecture=architecture, d_in=D, d_sae=F, dtype="float32", device="cpu", apply_b_dec_to_input=True)
    about |= dict(normalize_activations="none", metadata={"sae_lens_version": "6.54.12"})
    (folder / "cfg.json").write_text(json.dumps(about | config))
    return folder


def plain(**changed: Tensor) -> dict[str, Tensor]:
    """The tensors of SAELens' simplest SAE."""
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(D, F, generator=g), torch.randn(F, D, generator=g)
    return dict(W_enc=W_enc, W_dec=W_dec, b_enc=torch.zeros(F), b_dec=torch.zeros(D)) | changed


def dictionary(folder: Path, name: str | None, tensors: dict[str, Tensor], **trainer) -> Path:
    """A folder as dictionary_learning writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    if name is not None:
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, **trainer}}))
    return folder


def linear(**changed: Tensor) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    weights = {"encoder.weight": torch.randn(F, D, generator=g), "decoder.weight": torch.randn(D, F, generator=g)}
    return weights | {"encoder.bias": torch.zeros(F), "b_dec": torch.zeros(D)} | changed


# ---- Decoder rows of norm 0 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_feature_of_norm_0_never_displaces_another_where_features_count_their_norms(architecture, tmp_path):
    W_enc, W_dec = torch.zeros(D, F), torch.zeros(F, D)
    W_enc[0, 0], W_enc[0, 1], W_dec[1, 2], W_dec[2:, 0] = 5, 3, 1, 1
    W_dec[0] = 1e-300  # 0 in float32
    tensors = plain(W_enc=W_enc, W_dec=W_dec) | ({"topk_threshold": torch.tensor(-1.0)} if "batch" in architecture else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the norms were folded
        sae = sf.load(saelens(tmp_path, architecture, tensors, k=1, rescale_acts_by_decoder_norm=True))
    x = torch.eye(D)[:1]
    assert sae.encode(x)[0, :3].tolist() == [0, 3, 0] and torch.equal(sae(x), 3 * W_dec[1:2])


@pytest.mark.parametrize("format", ["dictionary_learning", "saebench"])
@pytest.mark.parametrize("kind", [sf.GatedSAE, sf.ReluSAE, sf.JumpReluSAE])
def test_folded_a_row_of_norm_0_is_any_unit_row_whose_feature_is_silent(kind, format, tmp_path):
    sae = kind(D, F, seed=0, apply_b_dec_to_input=kind is not sf.JumpReluSAE)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(torch.rand(p.shape, generator=torch.Generator().manual_seed(1)))
        sae.W_dec[4], sae.W_dec[5] = 0, -0.0
    x = torch.randn(65, D, generator=torch.Generator().manual_seed(2))
    assert sae.encode(x)[:, 4:6].any()
    interop.save(sae, tmp_path / "a", format, model_name="m", layer=1)
    again = sf.load(tmp_path / "a")
    assert _norms.is_unit(again) and not again.encode(x)[:, 4:6].any()
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)
    back = interop.convert(tmp_path / "a", tmp_path / "b", "sae_fast")
    assert all(same_bits(t, back.state_dict()[name]) for name, t in sae.state_dict().items()), "to the bit"


def test_rows_of_norm_0_that_stay_are_named(tmp_path):
    relu, topk = sf.ReluSAE(D, F, seed=0), sf.TopKSAE(D, F, 4, seed=0)
    for sae in (relu, topk):
        sae.W_dec.data[4] = 0
    with pytest.raises(ValueError, match=r"rows \[4\] are zero, .* loads no such file; want fold_decoder_norm"):
        interop.save(relu, tmp_path / "a", "dictionary_learning", fold_decoder_norm=False)
    with pytest.raises(ValueError, match="W_dec: rows 4 are zero; folded, it would choose others"):
        interop.save(topk, tmp_path / "a", "saebench", model_name="m", layer=1)
    assert not (tmp_path / "a").exists()


def test_what_folded_would_overflow_is_refused():
    sae = sf.ReluSAE(D, F, seed=0, dtype=torch.float16)
    sae.W_dec.data[3], sae.W_enc.data[3] = 1000, 1000
    with pytest.raises(ValueError, match=r"sae: W_enc: folded, it does not fit into torch\.float16"):
        _norms.fold(sae)


# ---- dictionary_learning before 2024-12-22 ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("held", [(), ("k",), ("threshold",)], ids=str)
def test_k_and_threshold_may_be_missing_where_the_config_has_k(name, held, tmp_path):
    tensors: dict[str, Tensor] = linear()
    if "Matryoshka" in name:
        tensors = plain(group_sizes=torch.tensor([10, 22]))
    tensors |= {k: t for k, t in dict(k=torch.tensor(4), threshold=torch.tensor(0.5)).items() if k in held}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a threshold that was never set
        sae = sf.load(dictionary(tmp_path / "a", name, tensors, k=4))
        interop.convert(tmp_path / "a", tmp_path / "b", "dictionary_learning")
        again = sf.load(tmp_path / "b")
    assert sae.k == 4 and type(sae) is (sf.TopKSAE if name == "AutoEncoderTopK" else sf.BatchTopKSAE)
    threshold = sae.metadata["threshold"] if isinstance(sae, sf.TopKSAE) else float(sae.threshold)
    assert threshold == (0.5 if "threshold" in held else -1)
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize(
    "name, trainer, message",
    [
        ("AutoEncoderTopK", {}, "config.json: trainer.k: got None, want a positive int, as .*ae.pt holds no k"),
        ("BatchTopKSAE", {"k": "4"}, "config.json: trainer.k: got '4'"),
        ("BatchTopKSAE", {"k": 2.5}, "config.json: trainer.k: got 2.5"),
        ("BatchTopKSAE", {"k": True}, "config.json: trainer.k: got True"),
        ("AutoEncoderTopK", {"k": 33}, "ae.pt: k: got 33, want an int with 1 ≤ k ≤ d_sae = 32"),
        (None, {}, "dict_class: missing, and its tensors .* fit AutoEncoderTopK and BatchTopKSAE"),
    ],
)
def test_a_k_that_is_nowhere_or_none_is_named(name, trainer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sf.load(dictionary(tmp_path, name, linear(), **trainer))


def test_a_backups_threshold_is_scaled_with_its_biases(tmp_path):
    tensors = linear(k=torch.tensor(4), threshold=torch.tensor(0.5))
    dictionary(tmp_path, "AutoEncoderTopK", {"ae": tensors, "norm_factor": 3.0}, k=4)
    assert sf.load(tmp_path).metadata["threshold"] == 1.5


# ---- Numbers in configs -----------------------------------------------------------------------------------------------


def test_a_batchtopk_of_a_fractional_k_is_what_its_threshold_says(tmp_path):
    saelens(tmp_path / "a", "batchtopk", plain(topk_threshold=torch.tensor(0.7, dtype=torch.double)), k=1.5)
    sae, x = sf.load(tmp_path / "a"), torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    pi = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert sae.options() == {"k": 1.5} and torch.equal(sae.encode(x) > 0, pi > np.float32(0.7))
    for to in ("sae_fast", "saelens"):
        again = interop.convert(tmp_path / "a", tmp_path / to, to)
        assert sf.load(tmp_path / to).options() == {"k": 1.5} and torch.equal(again(x), sae(x))
    with pytest.raises(ValueError, match=r"dictionary_learning cannot hold .*: k: got 1\.5, and its k is whole"):
        interop.convert(tmp_path / "a", tmp_path / "b", "dictionary_learning")


@pytest.mark.parametrize("k", ["4", True, None, 0, -2, 33, float("inf"), float("nan"), [4]], ids=repr)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_k_that_is_none_is_named_with_its_file(architecture, k, tmp_path):
    with pytest.raises(ValueError, match=r"cfg\.json: k: got"):
        sf.load(saelens(tmp_path, architecture, plain(), k=k))


@pytest.mark.parametrize(
    "widths", [["8", 32], [8, 8, 32], [8], [], [8.0, 32], [True, 32], 32, {"8": 32}, [40, 32]], ids=repr
)
def test_matryoshka_widths_are_ints_that_ascend_to_d_sae(widths, tmp_path):
    with pytest.raises(ValueError, match=r"cfg\.json: matryoshka_widths: got .*, want ints ascending to d_sae = 32"):
        sf.load(saelens(tmp_path, "matryoshka_batchtopk", plain(), k=4, matryoshka_widths=widths))


def test_layers_are_ints(tmp_path):
    sae = sf.GatedSAE(D, F, seed=0)
    interop.save(sae, tmp_path / "a", "saebench", model_name="m", layer=np.int64(2))
    assert json.loads((tmp_path / "a/config.json").read_text())["trainer"]["layer"] == 2
    for wrong in (True, "2", 2.0, -1):
        with pytest.raises(ValueError, match=r"layer: got .*, want an int from 0"):
            interop.save(sae, tmp_path / "b", "saelens", layer=wrong)


@pytest.mark.parametrize(
    "kept",
    [
        *(3, [], {"metadata": 3}, {"metadata": {"configs": 3}}, {"precision": []}, {"unfold": {}}),
        *({"class": [], "options": 3}, {"class": "BatchTopKSAE", "options": {"zzz": 1}}),
    ],
    ids=str,
)
def test_what_we_keep_in_another_packages_config_may_be_anything(kept, tmp_path):
    for format, sae in (("saelens", sf.JumpReluSAE(D, F)), ("dictionary_learning", sf.GatedSAE(D, F)), ("sparsify", TOPK)):
        interop.save(sae, tmp_path / format, format)
        file = next((tmp_path / format).glob("*.json"))
        config = json.loads(file.read_text())
        config.get("metadata", config)["sae_fast"] = kept
        file.write_text(json.dumps(config))
        again = sf.load(tmp_path / format)
        assert type(again) is type(sae) and again.precision == "exact"
        interop.convert(tmp_path / format, tmp_path / f"{format} again", format)


TOPK = sf.TopKSAE(D, F, 4, seed=0)


WEIRD = [None, True, "x", -1, 1.5, float("nan"), [], ["8", 32], {}, {"a": 1}, 10**30]


def keys(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from keys(inner, (*path, key))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "format, groups", [*((f, None) for f in sorted(FORMATS)), ("sae_fast", [10, 22]), ("saelens", [10, 22])]
)
def test_whatever_a_config_says_it_loads_or_is_a_named_error(format, groups, tmp_path):
    sae: sf.nn.SparseAutoencoder = sf.TopKSAE(D, F, 4, seed=0)
    if groups:
        sae = sf.BatchTopKSAE(D, F, 4, seed=0, group_sizes=groups)
        sae.threshold.fill_(0.5)
    interop.save(sae, tmp_path, format, model_name="m", layer=1)
    file = next(tmp_path.glob("*.json"))
    config = json.loads(file.read_text()) | ({"matryoshka_widths": [10, 32]} if format == "saelens" else {})
    for path in keys(config):
        for value in WEIRD:
            changed = copy.deepcopy(config)
            functools.reduce(lambda inner, key: inner[key], path[:-1], changed)[path[-1]] = value
            file.write_text(json.dumps(changed))
            with contextlib.suppress(ValueError, OSError):
                sf.load(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["sae_fast", "dictionary_learning", "saelens"])
def test_whatever_a_tensor_is_it_loads_or_is_a_named_error(format, tmp_path):
    interop.save(sf.JumpReluSAE(D, F, seed=0, apply_b_dec_to_input=False), tmp_path, format)
    file = next(p for p in tmp_path.iterdir() if p.suffix in (".pt", ".safetensors"))
    tensors = torch.load(file) if file.suffix == ".pt" else load_file(file)
    for name, t in tensors.items():
        dtypes = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16, torch.float8_e4m3fn)
        others = [t.flatten(), t[None], t.new_zeros(()), t.new_zeros(0), t.new_zeros(0, 0), t.new_zeros(1, 1, 1)]
        for other in (*map(t.to, dtypes), *others):
            changed = {**tensors, name: other.contiguous()}
            torch.save(changed, file) if file.suffix == ".pt" else save_file(changed, file)
            with contextlib.suppress(ValueError):
                assert sf.load(tmp_path).threshold.dtype in (torch.float16, torch.float32, torch.float64)


# ---- What is known and refused ----------------------------------------------------------------------------------------

M, T = torch.zeros(F, D), torch.zeros(F, 3, D)
REFUSED: list[
    tuple[str, str, str, dict[str, dict]]
] = [  # format, reason, the file that is named or "" for the folder, files
    ("temporal SAEs", "attend to the tokens before", "", {"conf.yaml": {}, "latest_ckpt.safetensors": {"D": M}}),
    ("temporal SAEs", "attend", "latest_ckpt.safetensors", {"latest_ckpt.safetensors": {"D": M, "E": M}}),
    ("circuit-tracer's cross-layer", "many layers", "", {"W_enc_0.safetensors": {"W_enc_0": M}, "config.yaml": {}}),
    ("circuit-tracer's cross-layer", "many layers", "a.safetensors", {"a.safetensors": {"W_enc_0": M, "b_enc_0": M[0]}}),
    ("Gemma Scope 2's cross-layer", "many layers", "clt/w", {"clt/w/params_layer_0.safetensors": {"w_enc": M}}),
    ("Gemma Scope 2's cross-layer", "many layers", "a.safetensors", {"a.safetensors": {"w_enc": M.T, "w_dec": T}}),
    (
        "Llamascopium's sharded",
        "want sae_weights",
        "",
        {"sae_weights.dcp/__0.distcp": {}, "config.json": {"sae_type": "sae"}},
    ),
]


@pytest.mark.parametrize("name, why, file, files", REFUSED, ids=lambda v: v if isinstance(v, str) else ", ".join(v))
def test_a_format_that_is_known_and_refused_is_named_with_the_reason(name, why, file, files, tmp_path):
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".safetensors"):
            save_file({n: t.contiguous().clone() for n, t in content.items()}, tmp_path / path)
        else:
            (tmp_path / path).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"path: {tmp_path}.* is of {name}.*, which are refused: .*{why}"):
        sf.load(tmp_path / file)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / file), str(tmp_path / "out"), "--to", "sae_fast"])
    assert done.exit_code == 1 and f"is of {name}" in " ".join(done.stderr.split())


def test_training_folders_of_saelens_are_not_taken_for_others(tmp_path):
    saelens(tmp_path, "standard", plain())
    (tmp_path / "runner_cfg.json").write_text("{}")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": null}')
    assert isinstance(sf.load(tmp_path), sf.ReluSAE)


# ---- Files that are not what they say ---------------------------------------------------------------------------------


class Attack:
    def __init__(self, function, *arguments):
        self.said = function, arguments

    def __reduce__(self):
        return self.said


ATTACKS = {
    "posix.system": Attack(os.system, "true"),
    "eval": Attack(eval, "1"),
    "getattr": Attack(getattr, "a", "upper"),
    "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
    "numpy.*_reconstruct": np.array([object], dtype=object),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_code_in_a_pickle_is_named_and_nobody_is_advised_to_run_it(name, new, tmp_path):
    torch.save({**linear(), "x": ATTACKS[name]}, tmp_path / "ae.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(
        ValueError, match=rf"ae\.pt: .*names code, and a pickle is never executed \(GLOBAL {name}\)"
    ) as error:
        sf.load(tmp_path)
    assert "weights_only" not in str(error.value)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_git_lfs_pointer_is_called_so_in_every_file(format, tmp_path):
    interop.save(TOPK, tmp_path / "a", format, model_name="m", layer=1)
    files = sorted(p for p in (tmp_path / "a").iterdir() if p.suffix in (".pt", ".safetensors", ".json"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        file.write_text(LFS)
        with pytest.raises(ValueError, match=rf"{file.name}: a Git LFS pointer, not the file itself"):
            sf.load(tmp_path / "a")
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name, read",
    [
        ("corpus.txt", read_text_file),
        ("activations.npy", open_activations),
        ("activations.safetensors", open_activations),
        ("effects.json", read_effects),
        ("marks.json", sf.analysis.Marks.read),
    ],
)
def test_a_git_lfs_pointer_is_called_so_by_whatever_reads_a_file(name, read, tmp_path):
    (tmp_path / name).write_text(LFS)
    with pytest.raises(ValueError, match=rf"{name}.* is a Git LFS pointer, not the file itself"):
        read(tmp_path / name)


def test_a_git_lfs_pointer_among_a_models_files_is_called_so(tmp_path):
    save_tiny_model(pytest.importorskip("transformers"), "gpt2", tmp_path / "m")
    for file in sorted((tmp_path / "m").iterdir()):
        content = file.read_bytes()
        file.write_text(LFS)
        with pytest.raises(ValueError, match=rf"{file.name}: a Git LFS pointer, not the file itself"):
            harvest(tmp_path / "m", "the gate opens . " * 20, 1, context_length=8, cache=tmp_path / "cache")
        file.write_bytes(content)


def test_a_view_of_one_number_is_no_matrix(tmp_path):
    one = torch.zeros(1)
    shapes = {"encoder.weight": (200_000, 50_000), "encoder.bias": (200_000,), "decoder.weight": (50_000, 200_000)}
    torch.save({name: one.expand(shape) for name, shape in (shapes | {"bias": (50_000,)}).items()}, tmp_path / "ae.pt")
    with pytest.raises(
        ValueError, match=r"encoder.weight: got shape \(200000, 50000\), but the file holds 1 numbers of it"
    ):
        sf.load(tmp_path)
    dictionary(tmp_path, "MatryoshkaBatchTopKSAE", plain(k=torch.tensor(4), group_sizes=torch.ones(1).expand(10**12)), k=4)
    with pytest.raises(ValueError, match=r"group_sizes: got shape .* but the file holds 1 numbers of it"):
        sf.load(tmp_path)
    tied = linear()
    tied["decoder.weight"] = tied["encoder.weight"].T
    tied["encoder.bias"] = one.expand(F)
    sae = sf.load(dictionary(tmp_path, "AutoEncoderTopK", tied, k=4))
    assert same_bits(sae.W_dec, sae.W_enc) and sae.W_dec.data_ptr() != sae.W_enc.data_ptr(), "views are tensors"


def test_tensors_without_numbers_and_packed_archives_are_refused(tmp_path):
    for wrong in (torch.zeros(F, D, device="meta"), torch.zeros(F, D).to_sparse()):
        dictionary(tmp_path, "AutoEncoderTopK", linear(**{"encoder.weight": wrong}), k=4)
        with pytest.raises(ValueError, match=r"encoder.weight: got a torch.* tensor on .*, want plain numbers"):
            sf.load(tmp_path)
    dictionary(tmp_path, "AutoEncoderTopK", linear(**{"encoder.weight": torch.zeros(10**4, D)}), k=4)
    with zipfile.ZipFile(tmp_path / "ae.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"ae\.pt: got \d+ bytes packed into \d+, want what torch.save writes"):
        sf.load(tmp_path)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_weights_that_are_not_finite_are_said(format, tmp_path):
    sae = sf.TopKSAE(D, F, 4, seed=0)
    sae.W_enc.data[3, 3], sae.W_enc.data[4, 1], sae.b_enc.data[5] = torch.nan, torch.inf, -torch.inf
    interop.save(sae, tmp_path / "a", format, model_name="m", layer=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sf.load(tmp_path / "a")
    assert [str(w.message).partition(": ")[2] for w in said] == [
        f"{name}: {n} of its numbers are NaN or infinite" for name, n in (("W_enc", 2), ("b_enc", 1))
    ]
    assert {Path(w.filename).name for w in said} == {Path(__file__).name}
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "sae_fast"])
    assert done.exit_code == 0 and "W_enc: 2 of its numbers are NaN or infinite" in " ".join(done.stderr.split())


def test_a_trainer_says_it_too(tmp_path):
    trainer = sf.Trainer(sf.GatedSAE(D, F, seed=0), l1_coefficient=1.0)
    trainer.sae.b_gate.data[3:5] = torch.nan
    trainer.save(tmp_path)
    with pytest.warns(UserWarning, match="b_gate: 2 of its numbers are NaN or infinite"):
        sf.Trainer.load(tmp_path)


# ---- Scales -----------------------------------------------------------------------------------------------------------


def test_the_scale_of_a_training_checkpoint_is_in_its_files(tmp_path):
    saelens(tmp_path / "a", "standard", plain(), normalize_activations="expected_average_only_in")
    for text in ("{}", '{"scaling_factor": null}'):
        (tmp_path / "a/activation_scaler.json").write_text(text)
        with pytest.raises(ValueError, match="the scale is not in the files; want activation_scale"):
            sf.load(tmp_path / "a")
    given = sf.load(tmp_path / "a", activation_scale=4)
    (tmp_path / "a/activation_scaler.json").write_text('{"scaling_factor": 4.0, "has_whitening": false}')
    for sae in (
        sf.load(tmp_path / "a"),
        sf.load(tmp_path / "a", activation_scale=np.float32(4)),
        interop.convert(tmp_path / "a", tmp_path / "b", "saelens"),
        sf.load(tmp_path / "b"),
    ):
        assert all(same_bits(t, sae.state_dict()[name]) for name, t in given.state_dict().items())
    with pytest.raises(ValueError, match=r"activation_scale: got 2, but the files say 4\.0"):
        sf.load(tmp_path / "a", activation_scale=2)
    for wrong in ("-1", '"4"', "true", "Infinity", "0"):
        (tmp_path / "a/activation_scaler.json").write_text(f'{{"scaling_factor": {wrong}}}')
        with pytest.raises(ValueError, match=r"activation_scaler\.json: scaling_factor: got .*, want a positive number"):
            sf.load(tmp_path / "a")


# ---- Others' files in the way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("overwrite", [False, True])
def test_another_programs_config_is_never_overwritten(format, overwrite, tmp_path):
    for name in ("config.json", "cfg.json"):
        (tmp_path / name).write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileExistsError, match=r"\.json"):
        interop.save(TOPK, tmp_path, format, overwrite=overwrite, model_name="m", layer=1)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("config.json", "cfg.json"), '{"model_type": "gpt2"}'
    )


# ---- Sizes that nothing holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [dict(d_sae=10**7, d_in=1000), dict(d_in=10**12, d_sae=10**12), dict(d_sae=10**30)], ids=str
)
def test_a_manifest_of_absurd_sizes_is_named_and_nothing_of_that_size_allocated(change, tmp_path):
    sf.save(sf.GatedSAE(D, F), tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())
    manifest["sae"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"W_enc: got .*\(32, 8\), want"):
        sf.load(tmp_path)


@pytest.mark.parametrize("scale", ["x", True, 0, -1.0, [], float("inf")], ids=repr)
def test_a_scale_of_a_training_that_is_none_is_named(scale, tmp_path):
    sae = sf.GatedSAE(D, F)
    sf.save(sae, tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())
    manifest["sae"]["metadata"]["input_scale"] = scale
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"input_scale: got .*, want a positive number"):
        sf.load(tmp_path)


# ---- Dtypes -----------------------------------------------------------------------------------------------------------


def jumprelu(dtype: torch.dtype = torch.bfloat16) -> sf.JumpReluSAE:
    """Weights and examples of small integers, on which bfloat16 is exact; thresholds in float32 that it rounds."""
    sae, g = sf.JumpReluSAE(D, F, seed=0, dtype=dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=g))
    sae.threshold.data = torch.randint(0, 4, (F,), generator=g) + 2.0**-12  # the integer itself, in bfloat16
    return sae


def integers() -> torch.Tensor:
    return torch.randint(-2, 3, (64, D), generator=torch.Generator().manual_seed(1)).float()


def test_a_threshold_in_float32_beside_bfloat16_is_rounded_where_it_is_used_and_saved_as_it_is(tmp_path):
    sae, x = jumprelu(), integers()
    plain = sf.JumpReluSAE(D, F, dtype=torch.bfloat16)
    plain.load_state_dict(sae.state_dict())
    assert plain.threshold.dtype == torch.bfloat16 and sae.threshold.dtype == torch.float32
    pi = (x - sae.b_dec.float()) @ sae.W_enc.float().T + sae.b_enc.float()
    assert torch.equal(sae.encode(x).float(), pi.relu() * (pi > sae.threshold.detach().round()))
    assert torch.equal(sae.encode(x), plain.encode(x)) and torch.equal(sae(x), plain(x))
    sf.save(sae, tmp_path)
    again = sf.load(tmp_path)
    assert all(same_bits(t, again.state_dict()[name]) for name, t in sae.state_dict().items())
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("name", ["b_enc", "b_dec", "W_dec"])
def test_other_mixtures_compute_nothing_and_are_not_saved(name, tmp_path):
    sae = jumprelu()
    sae.get_parameter(name).data = sae.get_parameter(name).data.float()
    with pytest.raises((ValueError, RuntimeError)):
        sae(integers())
    with pytest.raises(ValueError, match=rf"sae: got .*{name} float32.*want one floating-point dtype"):
        sf.save(sae, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Mine(sf.GatedSAE):
    pass


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("wrong", [Mine(D, F), torch.nn.Linear(D, F), "sae"], ids=lambda w: type(w).__name__)
def test_what_is_no_layer_of_ours_is_not_written_as_one(wrong, format, tmp_path):
    with pytest.raises(ValueError, match=rf"sae: got {type(wrong).__name__}, want one of"):
        interop.save(wrong, tmp_path / "a", format, model_name="m", layer=1)
    assert not (tmp_path / "a").exists()


# ---- Any layer, there and back ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OURS = {"format", "configs", "threshold", "layer", "model_name", "hook_name"}


@st.composite
def layers(draw) -> sf.nn.SparseAutoencoder:
    """Any layer with any options, and random weights of which some rows may be 0."""
    cls = draw(st.sampled_from([sf.GatedSAE, sf.ReluSAE, sf.JumpReluSAE, sf.TopKSAE, sf.BatchTopKSAE]))
    d, features = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    options = dict(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        precision=draw(st.sampled_from(["exact", "fp32", "bf16", "tf32"])),
        apply_b_dec_to_input=draw(st.booleans()),
    )
    if cls in (sf.TopKSAE, sf.BatchTopKSAE):
        options["k"] = draw(st.integers(1, features))
        if features > 1 and draw(st.booleans()):
            first = draw(st.integers(1, features - 1))
            options |= dict(group_sizes=[first, features - first], active_groups=draw(st.integers(1, 2)))
    if cls is sf.BatchTopKSAE and draw(st.booleans()):
        options["k"] = draw(st.floats(0.1, features))
    sae, g = cls(d, features, seed=0, **options), torch.Generator().manual_seed(draw(st.integers(0, 9)))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
        if draw(st.booleans()):
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        if draw(st.booleans()):
            sae.W_dec[0] = 0
        if cls is sf.JumpReluSAE and draw(st.booleans()):
            sae.threshold.data = sae.threshold.data.float() + 2.0**-20
        if cls is sf.BatchTopKSAE and (draw(st.booleans()) or not isinstance(sae.k, int)):
            sae.threshold.fill_(draw(st.floats(0, 2, width=32)))
    sae.metadata = {k: v for k, v in draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)).items() if k not in OURS}
    return sae


@given(sae=layers(), format=st.sampled_from(["sf.save", *sorted(FORMATS)]))
def test_any_layer_comes_back_the_same_from_every_format_that_holds_it(sae, format):
    with TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary) / "a"
        if format == "sf.save":
            sf.save(sae, folder)
        else:
            try:
                interop.save(sae, folder, format, model_name="m", layer=1)
            except ValueError as error:
                assert ("cannot hold this" in str(error) or "to fold" in str(error)) and format != "sae_fast"
                assert not folder.exists()
                return
        again = sf.load(folder)
        if (folder / "sae_fast_unfold.safetensors").exists():
            again = interop.convert(folder, Path(temporary) / "b", "sae_fast")
    assert type(again) is type(sae) and again.options() == sae.options()
    assert again.metadata.items() >= sae.metadata.items()
    assert {name: t.dtype for name, t in again.state_dict().items()} == {n: t.dtype for n, t in sae.state_dict().items()}
    assert all(same_bits(t, again.state_dict()[name]) for name, t in sae.state_dict().items())
    assert again.precision == sae.precision
    x = torch.randn(7, sae.d_in, generator=torch.Generator().manual_seed(3)).to(sae.W_enc.dtype)
    again.precision = sae.precision = "exact"
    assert same_bits(again(x), sae(x))


@settings(max_examples=30)
@given(sae=layers(), chain=st.lists(st.sampled_from(sorted(set(FORMATS) - {"saebench"})), min_size=2, max_size=4))
def test_any_chain_of_conversions_ends_in_the_same_bits_or_is_refused(sae, chain):
    with TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = [Path(temporary) / str(i) for i in range(len(chain) + 1)]
        try:
            interop.save(sae, places[0], chain[0])
            for i, format in enumerate([*chain[1:], "sae_fast"]):
                last = interop.convert(places[i], places[i + 1], format)
        except ValueError as error:
            assert "cannot hold this" in str(error) or "to fold" in str(error)
            return
    assert type(last) is type(sae) and last.options() == sae.options() and last.precision == sae.precision
    assert all(same_bits(t, last.state_dict()[name]) for name, t in sae.state_dict().items())
