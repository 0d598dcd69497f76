"""The C++ engine walks a code by runs of features, or of examples, where their rows come often, and changes no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_repeats, assert_same_bits, code_of, randn
from problems import bodies

from sae_fast import ops
from sae_fast.code import SparseCode

B, D, F = 30, 2**14, 30  # runs of 24 rows of W
SPARSE = [body for body in bodies.ENGINE if body.route == "sparse"]
ENDS = {"whole": None, "prefixes": [1, 7, 26, F]}


def codes(V: int = 1) -> tuple[SparseCode, SparseCode]:
    """A code of which runs pay, and the same with so many more examples and features, without entries, that they don't."""
    member = torch.rand(B, F, generator=torch.Generator().manual_seed(0)) < 0.6
    member[1], member[:, 3], member[2] = False, False, True
    code, more = code_of(member, V, torch.Generator().manual_seed(1)), 20 * B
    indptr = torch.cat([code.indptr, code.indptr[-1:].expand(more)])
    return code, replace(code, shape=torch.Size((B + more, F + more)), indptr=indptr)


def check(body: bodies.Body, call) -> None:
    """The same bits of call(code, rows) with both codes; ``rows`` lengthens what has a row an example or a feature."""
    code, longer = codes(2)
    assert code.nnz > 4 * 2 * B and longer.nnz < 4 * longer.batch

    def grown(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t.new_zeros(20 * B, *t.shape[1:])])

    found = body.run(call, code, lambda t: t)
    for mine, plain in zip(found, body.run(call, longer, grown), strict=True):
        assert_same_bits(mine, plain)
    assert_repeats(lambda: body.run(call, code, lambda t: t), body.threads)


@pytest.mark.parametrize("body", SPARSE, ids=str, indirect=True)
def test_decode(body):
    W = randn(F, D)
    check(body, lambda code, rows: (ops.decode(code, rows(W), code.values)[:, :B],))
    check(body, lambda code, rows: (ops.decode(code, rows(W), code.values, groups=[1, 1, 26, F])[:, :, :B],))


@pytest.mark.parametrize("body", SPARSE, ids=str, indirect=True)
def test_sampled_dots(body):
    A, W = randn(B, D, seed=1), randn(F, D)
    check(body, lambda code, rows: (ops.sampled_dots(code, rows(A), rows(W)),))


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("body", SPARSE, ids=str, indirect=True)
def test_decode_loss(body, ends):
    W, x, weight = randn(F, D), randn(B, D, seed=1), randn(F, seed=2).abs()

    def call(code, rows):
        last = None if ENDS[ends] is None else [*ENDS[ends][:-1], code.d_sae]
        out = ops.decode_loss(code, rows(W), torch.zeros(D), rows(x), rows(weight), 1.0, prefixes=last)
        return out.losses, out.residual[..., :B, :], out.residual_aux[..., :B, :], out.grads

    check(body, call)


@pytest.mark.parametrize("body", SPARSE, ids=str, indirect=True)
def test_outer(body):
    A = [randn(B, D, seed=s) for s in (1, 2)]

    def call(code, rows):
        whole = ops.outer(ops.transpose(code), list(code.values), [rows(a) for a in A])
        listed = ops.outer(ops.transpose(code), list(code.values), [rows(a) for a in A], features=torch.arange(F))
        return whole[:F], listed

    check(body, call)
