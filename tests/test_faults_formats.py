"""What others' files, and inputs made like them, have shown to be wrong: the right value of each, in every format."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import same_bits

import sae_fast as sf

D, F = 8, 32


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
