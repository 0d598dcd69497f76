"""Published SAEs' formats: the real layout of each, with small numbers, gives what the format's formula gives."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import warnings
import zipfile
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close_2x
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems.published import PUBLISHED, D, Published, inputs, llamascopium, openai, openmoss, write
from torch import Tensor
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast.cli import app
from sae_fast.interop._refused import REFUSED
from sae_fast.interop.formats import FORMATS, READERS
from sae_fast.interop.formats.llama_scope import RECIPES


def load(place: Path | str, published: Published, **options: Any) -> sf.nn.SparseAutoencoder:
    """What is loaded, with no warning but the one that is expected."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sae = sf.load(place, **{**published.options, **options})
    assert [published.note] * len(said) == [published.note for w in said if published.note in str(w.message)], said
    assert bool(said) == bool(published.note)
    return sae


def judge(sae: sf.nn.SparseAutoencoder, published: Published) -> None:
    """Support, features and reconstructions by the 2× rule against the formula in float64."""
    x = inputs()
    (f, x_hat), (f64, x_hat64) = published.gives(x, torch.float32), published.gives(x, torch.float64)
    got = sae.encode(x)
    assert 2 < float((f64 != 0).sum(1).double().mean()) < f64.shape[1] - 2, "some are active and some are not"
    assert torch.equal(got != 0, f64 != 0)
    assert_close_2x(got, f, f64, "f")
    assert_close_2x(sae(x), x_hat, x_hat64, "x̂")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_give_what_their_format_says(name, tmp_path):
    published = PUBLISHED[name]
    sae = load(published.write(tmp_path), published)
    assert type(sae).__name__ == published.kind
    assert sae.metadata.items() >= {**published.metadata, "format": published.format}.items()
    judge(sae, published)


def test_every_format_that_is_only_read_has_such_files():
    assert {p.format for p in PUBLISHED.values()} >= {
        name for name, format in READERS.items() if not hasattr(format, "write")
    }


# ---- Bad input ------------------------------------------------------------------------------------------------------

STATISTICS = ("stats_last_nonzero", "latents_mean_square", "latents_activation_frequency")  # which may be missing
ONE_EACH = {p.format: name for name, p in reversed(PUBLISHED.items())}  # a case of each format


def changed(name: str, **tensors: Tensor | None) -> Published:
    """A published SAE with other tensors; None takes one away."""
    published = PUBLISHED[name]
    kept = {n: t for n, t in {**published.tensors, **tensors}.items() if t is not None}
    return dataclasses.replace(published, tensors=kept)


@settings(max_examples=120)
@given(data=st.data())
def test_a_key_that_is_dropped_renamed_retyped_or_transposed_is_named(data):
    name = data.draw(st.sampled_from(sorted(ONE_EACH.values())))
    published = PUBLISHED[name]
    needed = [n for n, t in published.tensors.items() if isinstance(t, Tensor) and t.dim() and n not in STATISTICS]
    key = data.draw(st.sampled_from(needed))
    tensor = published.tensors[key]
    how = data.draw(st.sampled_from(["dropped", "renamed", "retyped", "transposed", "shorter", "deeper"]))
    other = {
        "retyped": {key: tensor.to(torch.int32)},
        "transposed": {key: tensor.T if tensor.dim() == 2 else tensor[None]},
        "shorter": {key: tensor[:-1]},
        "deeper": {key: tensor[..., None]},
        "renamed": {key: None, f"{key}_": tensor},
        "dropped": {key: None},
    }[how]
    assume(not (how == "transposed" and tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]))
    assume((how, key) != ("dropped", "activation_function.threshold"))  # by circuit-tracer's own rule that is a ReLU
    with TemporaryDirectory() as temporary:
        place = changed(name, **other).write(Path(temporary))
        with warnings.catch_warnings(), pytest.raises(ValueError) as error:
            warnings.simplefilter("ignore")
            sf.load(place, **published.options)
    said = str(error.value).removeprefix(temporary)
    assert Path(published.file).name in said or "path: " in said
    if how == "retyped" and "want one floating-point dtype" in said:
        assert "int32" in said
    elif how == "dropped" and "which is of no format that is known" in said:  # it lists what there is
        assert f"'{key}'" not in said and all(f"'{n}'" in said for n in needed if n != key)
    else:  # of a length that is wrong either of two may be named, or the size in the config
        others = (*needed, f"but {Path(published.file).name} holds")
        assert key in said or (how in ("shorter", "transposed") and any(n in said for n in others)), said


@pytest.mark.parametrize("name", ["gemma scope", "gemma scope 2", "circuit-tracer"])
def test_a_negative_threshold_is_named(name, tmp_path):
    key = next(n for n in PUBLISHED[name].tensors if "threshold" in n)
    threshold = PUBLISHED[name].tensors[key].clone()
    threshold[3:5] = -0.5
    with pytest.raises(ValueError, match=rf"{key}: 2 of its numbers are negative, want thresholds of at least 0"):
        sf.load(changed(name, **{key: threshold}).write(tmp_path))


@pytest.mark.parametrize("name", ONE_EACH.values())
def test_weights_that_are_not_finite_are_said(name, tmp_path):
    published = PUBLISHED[name]
    key = next(n for n in ("b_enc", "b_E", "encoder.bias", "encoder_linear.bias", "latent_bias") if n in published.tensors)
    bias = published.tensors[key].clone()
    bias[7] = torch.nan
    with pytest.warns(UserWarning, match="b_enc: 1 of its numbers are NaN or infinite"):
        sf.load(changed(name, **{key: bias}).write(tmp_path), **published.options)


@pytest.mark.parametrize("name", ONE_EACH.values())
@pytest.mark.parametrize("keep", [0, 4, 0.3, 0.9])
def test_a_truncated_file_is_named(name, keep, tmp_path):
    published = PUBLISHED[name]
    place = published.write(tmp_path)
    file = tmp_path / published.repo / published.file
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"{re.escape(file.name)}: truncated or damaged"):
        sf.load(place, **published.options)


@pytest.mark.parametrize("name", ONE_EACH.values())
def test_a_git_lfs_pointer_is_called_so_in_every_file(name, tmp_path):
    published = PUBLISHED[name]
    place = published.write(tmp_path)
    for path in (published.file, *published.beside):
        file = tmp_path / published.repo / path
        content = file.read_bytes()
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        with pytest.raises(ValueError, match=rf"{re.escape(file.name)}: a Git LFS pointer, not the file itself"):
            sf.load(place, **published.options)
        file.write_bytes(content)


WEIRD = [None, True, "x", -1, 0, 1.5, float("nan"), [], {}, {"value": 3}, 10**30]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ONE_EACH.values() if PUBLISHED[name].beside])
def test_whatever_a_config_says_it_loads_as_the_same_or_is_a_named_error(name, tmp_path):
    published = PUBLISHED[name]
    place = published.write(tmp_path)
    for path, config in published.beside.items():
        file = tmp_path / published.repo / path
        for key in config:
            for value in WEIRD:
                file.write_text(json.dumps(config | {key: value}))
                try:
                    sae = sf.load(place, **published.options)
                except ValueError as error:
                    assert file.name in str(error) or key in str(error), f"{key}: {value!r}: {error}"
                else:
                    assert type(sae).__name__ == published.kind or key in ("act_fn", "activation"), f"{key}: {value!r}"
        file.write_text(json.dumps(config))


def test_a_square_sae_is_read_by_its_formats_orientation_and_never_by_a_guess(tmp_path):
    W_enc, W_dec = torch.randn(2, D, D, generator=torch.Generator().manual_seed(0))
    square = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(D), "b_dec": torch.zeros(D)}
    write(tmp_path / "layer3.sae.pt", square)
    qwen = sf.load(tmp_path / "layer3.sae.pt", k=2)
    assert torch.equal(qwen.W_enc, W_enc) and torch.equal(qwen.W_dec, W_dec.T)
    write(tmp_path / "X.pt", square)
    with pytest.raises(ValueError, match=r"X\.pt holds .*, which is of no format that is known"):
        sf.load(tmp_path / "X.pt")
    write(tmp_path / "X_cfg.json", {"act_size": D, "dict_size": D, "act_name": "blocks.0.attn.hook_z"})
    with pytest.warns(UserWarning, match="side by side"):
        hook_z = sf.load(tmp_path / "X.pt")
    assert torch.equal(hook_z.W_enc, W_enc.T) and torch.equal(hook_z.W_dec, W_dec)


# ---- numpy's archives -----------------------------------------------------------------------------------------------


def archive(folder: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "params.npz", "w", compression) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return folder / "params.npz"


def npy(array: np.ndarray, **options: bool) -> bytes:
    np.save(into := io.BytesIO(), array, **options)
    return into.getvalue()


def claim(shape: tuple[int, ...], descr: str = "<f4", data: bytes = b"") -> bytes:
    """An array's header, and whatever is to follow."""
    np.lib.format.write_array_header_1_0(into := io.BytesIO(), {"descr": descr, "fortran_order": False, "shape": shape})
    return into.getvalue() + data


class Mark:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_an_archive_of_numpys_is_named_and_not_run(tmp_path):
    pickled = npy(np.array([Mark(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"params\.npz: W_enc: want numbers: it is a pickle, which is never executed"):
        sf.load(archive(tmp_path, {"W_enc.npy": pickled}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"W_enc.npy": claim((10**9, 10**9))}, r"W_enc: got shape \(1000000000, 1000000000\) of float32, .* holds 0 of it"),
        (
            {"W_enc.npy": claim((4, 4), data=bytes(60))},
            r"W_enc: got shape \(4, 4\) of float32, 64 bytes, .* holds 60 of it",
        ),
        (
            {"W_enc.npy": claim((4, 4), data=bytes(68))},
            r"W_enc: got shape \(4, 4\) of float32, 64 bytes, .* holds 68 of it",
        ),
        ({"W_enc.npy": claim((-1, 4), data=bytes(16))}, r"W_enc: got shape \(-1, 4\)"),
        ({"W_enc.npy": claim((2,), ">f4", bytes(8))}, "W_enc: got an array of >f4, want plain numbers"),
        ({"W_enc.npy": claim((2,), "<c8", bytes(16))}, "W_enc: got an array of complex64, want plain numbers"),
        ({"W_enc.npy": b"\x93NUMPY\x03\x00" + bytes(20)}, r"W_enc: got version \(3, 0\) of numpy's format"),
        ({"W_enc.npy": b"something else"}, "truncated or damaged"),
        ({"W_enc.npy": b""}, "truncated or damaged"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_array_that_is_not_what_its_header_says_is_named_and_takes_no_memory(entries, message, tmp_path):
    with pytest.raises(ValueError, match=rf"params\.npz: {message}"):
        sf.load(archive(tmp_path, entries))


def test_archives_that_are_packed_twice_named_or_whose_sums_are_wrong_are_refused(tmp_path):
    zeros = {"W_enc.npy": npy(np.zeros((1000, 1000), np.float32))}
    with pytest.raises(ValueError, match=r"params\.npz: got \d+ bytes packed into \d+, want what numpy\.savez writes"):
        sf.load(archive(tmp_path, zeros, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own
        file = archive(tmp_path, {"a.npy": npy(np.zeros(3))})
        with zipfile.ZipFile(file, "a") as made:
            made.writestr("a.npy", npy(np.ones(3)))
    with pytest.raises(ValueError, match=r"params\.npz: got 2 entries of 1 names, want one of each"):
        sf.load(file)
    PUBLISHED["gemma scope"].write(tmp_path)
    file = tmp_path / PUBLISHED["gemma scope"].repo / PUBLISHED["gemma scope"].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"params\.npz: truncated or damaged: Bad CRC-32"):
        sf.load(file)


def test_arrays_of_columns_and_lower_case_names_are_read_as_what_they_are(tmp_path):
    published = PUBLISHED["gemma scope"]
    place, wanted = published.write(tmp_path), None
    arrays = {name: t.numpy() for name, t in published.tensors.items()}
    for by_columns in (False, True):
        names = {"W_enc": "w_enc", "W_dec": "w_dec"} if by_columns else {}
        order = "F" if by_columns else "C"
        np.savez(place / "params.npz", **{names.get(n, n): np.asarray(a, order=order) for n, a in arrays.items()})
        sae = sf.load(place)
        wanted = wanted or sae
        assert all(torch.equal(t, wanted.state_dict()[name]) for name, t in sae.state_dict().items())
        assert all(p.is_contiguous() for p in sae.parameters())


# ---- Choices --------------------------------------------------------------------------------------------------------


def test_what_names_of_folders_say_has_to_agree(tmp_path):
    for name, old, new, message in (
        ("gemma scope", "width_4k", "width_16k", r"b_enc: got 4096 features, but its folder says width_16k, 16384"),
        ("gemma scope 2", "width_16k", "width_1m", r"b_enc: got 16384 features, but its folder says width_1m, 1048576"),
        ("gemma scope 2, transcoder", "l0_big", "l0_big_affine", r"'affine_skip_connection' is missing, but its folder"),
        ("qwen scope", "-W1K-", "-W32K-", r"b_enc: got 1024 features, but its repository says W32K"),
    ):
        published = PUBLISHED[name]
        moved = dataclasses.replace(
            published,
            repo=published.repo.replace(old, new),
            place=published.place.replace(old, new),
            file=published.file.replace(old, new),
            beside={},
        )
        with pytest.raises(ValueError, match=message):
            sf.load(moved.write(tmp_path / name))


def test_a_k_that_no_name_says_is_asked_for_and_one_that_contradicts_is_refused(tmp_path):
    published = PUBLISHED["qwen scope"]
    place = published.write(tmp_path)
    with pytest.raises(ValueError, match=r"k: got 7, but the repository of .* says L0_50"):
        sf.load(place, k=7)
    write(tmp_path / "renamed.pt", published.tensors)
    with pytest.raises(ValueError, match=r"renamed\.pt: no folder above it is named as its repository, .* want k"):
        sf.load(tmp_path / "renamed.pt")
    assert sf.load(tmp_path / "renamed.pt", k=50).options() == sf.load(place).options()
    for wrong in (0, 1025, 2.5, "50", True):
        with pytest.raises(ValueError, match="k: got"):
            sf.load(tmp_path / "renamed.pt", k=wrong)
    for name in ("gemma scope", "goodfire"):
        with pytest.raises(ValueError, match="k: got 5, but the files of"):
            sf.load(PUBLISHED[name].write(tmp_path), k=5)


def test_the_command_converts_with_a_k_and_a_recipe(tmp_path):
    write(tmp_path / "renamed.pt", PUBLISHED["qwen scope"].tensors)
    place = PUBLISHED["llama scope, plain"].write(tmp_path)
    for source, options, kind in (
        (tmp_path / "renamed.pt", ["--k", "50"], "topk"),
        (place, ["--recipe", "plain"], "jumprelu"),
    ):
        arguments = ["convert", str(source), str(tmp_path / kind), "--to", "saelens", *options]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.stderr
        assert json.loads((tmp_path / kind / "cfg.json").read_text())["architecture"] == kind


def test_the_scale_and_the_recipe_of_llama_scope_are_choices(tmp_path):
    place = PUBLISHED["llama scope, plain"].write(tmp_path)
    with pytest.raises(ValueError, match=r"recipe: got 'other', want one of \('openmoss', 'plain', 'saelens'\)"):
        sf.load(place, recipe="other")
    with pytest.raises(ValueError, match="recipe: got 'plain', but the files of gemma_scope"):
        sf.load(PUBLISHED["gemma scope"].write(tmp_path), recipe="plain")
    published, x = PUBLISHED["llama scope, plain"], inputs()
    f, x_hat = openmoss(norms=False, scale=4.0)({n: t.double() for n, t in published.tensors.items()}, x.double())
    sae = sf.load(place, recipe="plain", activation_scale=4.0)
    torch.testing.assert_close(sae.encode(x).double(), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x).double(), x_hat, rtol=1e-5, atol=1e-5)


def test_a_norm_that_no_training_set_is_none(tmp_path):
    name = "dataset_average_activation_norm.blocks.15.hook_resid_post"
    for value in (0.0, -1.0, math.nan, math.inf):
        place = changed("llama scope r1", **{name: torch.tensor(value)}).write(tmp_path)
        with pytest.raises(ValueError, match=r"norm_activation: 'dataset-wise': the scale is not in the files"):
            sf.load(place)
    with pytest.warns(UserWarning, match="what activation_scale says"):
        sf.load(place, activation_scale=math.sqrt(D) / 5.5)


def test_a_decoder_row_of_norm_0_never_opens_a_gate_that_counts_norms(tmp_path):
    W_dec = PUBLISHED["llama scope"].tensors["decoder.weight"].clone()
    W_dec[:, 5] = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sae = sf.load(changed("llama scope", **{"decoder.weight": W_dec}).write(tmp_path))
    assert len(said) == 1 and not sae.encode(inputs())[:, 5].any() and bool(torch.isfinite(sae.threshold).all())


@pytest.mark.parametrize("name", ["gemma scope", "qwen scope", "llama scope"])
def test_a_dtype_and_a_device_may_be_asked_for(name, tmp_path):
    place = PUBLISHED[name].write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sf.load(place, "cpu", dtype=torch.bfloat16)
        assert sae.W_enc.dtype == sae.W_dec.dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"dtype: got torch\.int8, want a floating-point dtype"):
            sf.load(place, dtype=torch.int8)


def test_a_folder_whose_names_say_nothing_is_said(tmp_path):
    write(tmp_path / "params.npz", PUBLISHED["gemma scope"].tensors)
    with pytest.warns(UserWarning, match="neither layer_N nor embedding is among its folders' names"):
        assert "layer" not in sf.load(tmp_path).metadata


@pytest.mark.parametrize("activation", ["Identity", "Sigmoid", 3, None])
def test_an_activation_that_no_layer_has_is_named(activation, tmp_path):
    with pytest.raises(ValueError, match=r"6\.pt: activation: got"):
        sf.load(openai(activation).write(tmp_path))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_glu_encoder": True}, "use_glu_encoder: got True, want False"),
        ({"sae_type": "crosscoder"}, "sae_type: got 'crosscoder', want 'sae'"),
        ({"norm_activation": "token-wise"}, "norm_activation: got 'token-wise', want 'dataset-wise' or 'inference'"),
        (
            {"hook_point_out": "blocks.3.hook_mlp_out"},
            r"there is one of blocks\.3\.hook_resid_post, but none of blocks\.3\.hook_mlp",
        ),
    ],
)
def test_what_of_llamascopium_no_layer_holds_is_named(config, message, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        sf.load(llamascopium("relu", **config).write(tmp_path))


# ---- The page -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
FOLDERS = {"sae_fast", "saelens", "sparsify", "saebench", "llama_scope", "llamascopium"}  # whose folders are named


def test_the_table_of_formats_is_the_readers():
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("\n## ")[0], flags=re.M))
    assert list(rows) == [*list(FORMATS), *(name for name in READERS if name not in FORMATS)]
    for name, row in rows.items():
        format = READERS[name]
        assert all(f"`{pattern}`" in row for pattern in format.FILES), name
        assert all(f"`{PurePath(p).name}`" in row for p in format.BESIDE[:1] if "{" not in p), name
        kinds = {p.kind for p in PUBLISHED.values() if p.format == name}
        assert "| any |" in row or all(kind in row for kind in kinds), name
        assert ("(file)" in row) == (name not in FOLDERS), name
    assert [refused.what for refused in REFUSED if refused.what not in page.replace("\n", " ")] == []
    assert all(f'`"{recipe}"`' in page for recipe in RECIPES)
