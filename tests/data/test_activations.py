"""Activation stores: the order of batches, the held-out part, and what is not a store."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_fast.data import activations
from sae_fast.data.activations import ActivationStore


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    """A store of 10 contexts of 4 tokens, made without a model: activation i is [i, -i]."""
    n_tokens = 40
    text = "".join(f"w{i:02d} " for i in range(n_tokens))
    info = dict(d=2, n_tokens=n_tokens, context_length=4, layer=0, model="none", key="k", version=activations.VERSION)
    rows = np.arange(n_tokens, dtype=np.float32)
    np.save(tmp_path / "activations.npy", np.stack([rows, -rows], axis=1))
    np.save(tmp_path / "tokens.npy", rows.astype(np.int32))
    np.save(tmp_path / "spans.npy", np.array([[4 * i, 4 * i + 3] for i in range(n_tokens)]))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "store.json").write_text(json.dumps(info))
    return ActivationStore.open(tmp_path)


def test_each_pass_is_a_fresh_permutation(store):
    passes = [torch.cat(list(store.batches(8, epochs=1, seed=s)))[:, 0] for s in (0, 0, 1)]
    assert torch.equal(passes[0].sort().values, torch.arange(40.0))
    assert torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], passes[2])
    both = torch.cat(list(store.batches(8, epochs=2)))[:, 0]
    assert torch.equal(both[:40], passes[0])
    assert torch.equal(both[40:].sort().values, torch.arange(40.0))
    assert not torch.equal(both[40:], both[:40])


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_batches_resume_from_any_step(store, start):
    whole = list(store.batches(12, steps=10, seed=3))
    rest = list(store.batches(12, steps=10, seed=3, start_step=start))
    assert len(whole) == 10 and len(rest) == 10 - start
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert all(batch.shape == (12, 2) and batch.dtype == torch.float32 for batch in whole)


def test_batches_without_end(store):
    assert len(list(itertools.islice(store.batches(40), 5))) == 5


@pytest.mark.parametrize("arguments", [dict(batch_size=0), dict(batch_size=41), dict(batch_size=4, steps=1, epochs=1)])
def test_batches_that_cannot_be(store, arguments):
    with pytest.raises(ValueError, match=r"(batch_size|steps, epochs): got"):
        store.batches(**arguments)


def test_the_last_contexts_are_held_out(store):
    train, held = store.split(0.2)
    assert (train.n_tokens, held.n_tokens) == (32, 8)
    assert np.array_equal(np.concatenate([train.activations, held.activations]), store.activations)
    assert held.tokens.tolist() == list(range(32, 40))
    assert held.around(0, before=3, after=1) == ("", "w32", " w33")
    assert {int(i) for batch in train.batches(8, epochs=3) for i in batch[:, 0]} == set(range(32))
    assert torch.equal(torch.cat(list(held.chunks(3))), torch.tensor(held.activations))


@pytest.mark.parametrize("holdout", [0.0, 0.01, 1.0, 0.99])
def test_nothing_to_hold_out(store, holdout):
    with pytest.raises(ValueError, match="holdout: got"):
        store.split(holdout)


def test_opening_what_is_not_a_store(store, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no store\.json"):
        ActivationStore.open(Path(tmp_path, "elsewhere"))
    (store.folder / "store.json").write_text(json.dumps(store.info | {"version": 0}))
    with pytest.raises(ValueError, match="version 0, want"):
        ActivationStore.open(store.folder)
