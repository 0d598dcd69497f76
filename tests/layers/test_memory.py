"""Weights that are read: once, into memory that the layer keeps."""

from __future__ import annotations

import pytest
import torch
from helpers import randn, same_bits
from safetensors.torch import save_file

import sae_fast as sf
from sae_fast import files


def state(sae) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in sae.state_dict().items()}


def test_what_is_in_memory_of_its_own_is_kept_and_the_rest_copied():
    given = state(sf.ReluSAE(6, 9, seed=0))
    both = torch.cat([randn(9, 6), randn(9, 6)])
    for name, value in {"b_dec": randn(6)[::1], "W_enc": both[:9], "b_enc": randn(9), "W_dec": randn(6, 9).T}.items():
        given[name] = value
    sae = sf.ReluSAE.of_state("here", 6, 9, torch.float32, given, copy=False)
    kept = {name for name, t in sae.state_dict().items() if t.data_ptr() == given[name].data_ptr()}
    assert kept == {"b_dec", "b_enc"}, "a part of another's memory and a transpose are copied"
    assert all(t.is_contiguous() and same_bits(t, given[name]) for name, t in sae.state_dict().items())
    given["W_dec"] = given["W_enc"] = randn(9, 6)
    tied = sf.ReluSAE.of_state("here", 6, 9, torch.float32, given, copy=False)
    assert tied.W_dec.data_ptr() != tied.W_enc.data_ptr(), "two parameters share no memory"
    copied = sf.ReluSAE.of_state("here", 6, 9, torch.float32, given)
    assert not {t.data_ptr() for t in copied.state_dict().values()} & {t.data_ptr() for t in given.values()}


def test_tensors_of_a_file_are_in_memory_of_their_own(tmp_path):
    wanted = {
        "matrix": randn(5, 7), "half": randn(3).half(), "bf16": randn(4, 2).bfloat16(), "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4), "counts": torch.arange(5), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(wanted, tmp_path / "x.safetensors")
    found = files.read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in wanted.items())


@pytest.mark.parametrize("shape", [(2 * files.TURNED + 3, 5), (5, 7), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_turned_matrix_has_the_memory_of_its_transpose(tmp_path, shape, dtype):
    wanted = {"before": randn(3), "matrix": randn(*shape).to(dtype), "vector": randn(6), "weight": randn(4, 2)}
    save_file(wanted, tmp_path / "x.safetensors")
    found = files.read_safetensors(tmp_path / "x.safetensors", ("matrix", "vector", "absent"))
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in wanted.items())
    assert found["matrix"].T.is_contiguous() and found["weight"].is_contiguous()


def test_an_encoder_that_a_file_has_as_columns_is_not_copied(tmp_path, monkeypatch):
    sae = sf.JumpReluSAE(6, 9, seed=0)
    sf.interop.save(sae, tmp_path / "sae", "saelens")
    of_file, read = {}, files.read_safetensors
    monkeypatch.setattr(files, "read_safetensors", lambda *given: of_file.update(read(*given)) or of_file)
    loaded = sf.load(tmp_path / "sae")
    assert same_bits(loaded.W_enc, sae.W_enc)
    assert {name: of_file[name].data_ptr() for name in ("W_enc", "W_dec")} == {
        name: loaded.get_parameter(name).data_ptr() for name in ("W_enc", "W_dec")
    }


def test_what_is_not_finite_is_counted_where_sums_overflow_too():
    sae = sf.ReluSAE(6, 9, seed=0)
    with torch.no_grad():
        sae.W_dec.fill_(3e38)
        sae.W_enc[2, 3], sae.W_enc[1, 1], sae.b_enc[4] = torch.nan, torch.inf, -torch.inf
    assert sae.not_finite() == {"W_enc": 2, "b_enc": 1}
