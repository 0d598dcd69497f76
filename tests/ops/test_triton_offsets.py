"""Where the entries of features begin, and the runs of long ones, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits

pytest.importorskip("triton")

from problems.gapped import DEVICE

from sae_fast.kernels import _config
from sae_fast.kernels.offsets import offsets
from sae_fast.kernels.outer import Runs, runs


@pytest.mark.kernels
@pytest.mark.parametrize("features", [1, 2048, 5000])  # of blocks of 2048: one, a full one, three with a ragged last
def test_offsets_and_runs_are_those_of_a_plain_loop(features, monkeypatch):
    for generation in _config.SHIPPED.values():
        monkeypatch.setitem(generation, "outer", {**generation["outer"], "run": 5})
    counts = torch.randint(0, 14, (features,), generator=torch.Generator().manual_seed(features)) - 3
    counts[-1] = 23
    counts.clamp_(min=0)
    colptr = torch.cat([torch.tensor([-7]), counts]).to(DEVICE)
    offsets(colptr, counts=True)
    wanted = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    assert torch.equal(colptr.cpu(), wanted)
    found, first, owner = runs(colptr, int(wanted[-1]) + 40), [0], []
    both = Runs.of(colptr, int(wanted[-1]) + 40)
    again = torch.cat([torch.tensor([-7]), counts]).to(DEVICE)
    offsets(again, *both, 5, counts=True)
    assert_same_bits([again, *both], [colptr, *found])
    for f, count in enumerate(counts.tolist()):
        owner += [f] * (-(-count // 5) if count > 5 else 0)
        first.append(len(owner))
    owner += [features] * (found.owner.shape[0] - len(owner))
    assert found.first.tolist() == first and found.owner.tolist() == owner and owner[-1] == features
