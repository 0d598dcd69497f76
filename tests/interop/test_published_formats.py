"""Published SAEs' formats: the real layout of each, with small numbers, gives what the format's formula gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close_2x
from problems.published import PUBLISHED, Published, inputs

import sae_fast as sf
from sae_fast.interop.formats import READERS


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
