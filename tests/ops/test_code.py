"""SparseCode and RowGradient: what they store, and what they say about it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
import torch
from helpers import assert_is_code, assert_same_bits, dense, make_inputs, randn, random_code, rows_of

from sae_fast import ops
from sae_fast.code import RowGradient, SparseCode


def by_hand() -> SparseCode:
    """Three rows over five features; the second is empty, and one entry has an open gate at magnitude 0."""
    return SparseCode(
        shape=torch.Size((3, 5)),
        indptr=torch.tensor([0, 2, 2, 5]),
        indices=torch.tensor([1, 4, 0, 2, 3], dtype=torch.int32),
        u=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]),
        values=torch.tensor([[1.0, 2.0, 3.0, 0.0, 5.0], [10.0, 20.0, 30.0, 40.0, 50.0]]),
    )


def test_its_parts_by_name():
    code = by_hand()
    assert_is_code(code)
    assert (code.batch, code.d_sae, code.nnz) == (3, 5, 5)
    assert code.magnitudes.tolist() == [1, 2, 3, 0, 5]
    assert code.gates.tolist() == [10, 20, 30, 40, 50]
    assert code.row_ids().tolist() == [0, 0, 2, 2, 2]


def test_without_gates_the_magnitudes_stand_in():
    code = by_hand().with_values(by_hand().values[:1])
    assert_same_bits(code.gates, code.magnitudes)


def test_l0_counts_magnitudes_not_entries():
    assert by_hand().l0().tolist() == [2, 0, 2]


def test_to_dense_puts_every_entry_in_its_place():
    assert by_hand().to_dense().tolist() == [[0, 1, 0, 0, 2], [0, 0, 0, 0, 0], [3, 0, 0, 5, 0]]
    gates = by_hand().to_dense(by_hand().gates)
    assert gates.tolist() == [[0, 10, 0, 0, 20], [0, 0, 0, 0, 0], [30, 0, 40, 50, 0]]


@pytest.mark.parametrize("B, F", [(0, 33), (1, 1), (3, 100), (257, 33)])
def test_to_dense_of_a_random_code(B, F):
    code = random_code(B, F)
    assert_same_bits(code.to_dense(), dense(code, code.magnitudes))
    assert_same_bits(code.to_dense(code.gates.double()), dense(code, code.gates.double()))
    assert torch.equal(code.l0(), (dense(code, code.magnitudes) != 0).sum(1))


def test_leading_dimensions_are_those_of_the_input():
    code = replace(random_code(6, 33), shape=torch.Size((2, 3, 33)))
    assert code.batch == 6
    assert code.to_dense().shape == (2, 3, 33) and code.l0().shape == (2, 3)
    assert_same_bits(code.to_dense().reshape(6, 33), random_code(6, 33).to_dense())


def test_to_dense_is_differentiable():
    code = by_hand()
    values = code.magnitudes.clone().requires_grad_()
    weights = randn(3, 5)
    (code.to_dense(values) * weights).sum().backward()
    assert_same_bits(values.grad, weights[code.row_ids(), code.indices.long()])


def test_with_values_shares_the_support():
    code = by_hand()
    other = code.with_values(torch.zeros(3, 5))
    assert other.indices is code.indices and other.indptr is code.indptr and other.values.shape == (3, 5)
    assert code.values.shape == (2, 5)


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        by_hand().u = None


@pytest.mark.parametrize("cuts", [[0, 9], [0, 4, 9], [0, 0, 2, 2, 9, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_cat_of_the_parts_is_the_whole(cuts):
    code = random_code(9, 33)
    parts = [rows_of(code, a, b) for a, b in pairwise(cuts)]
    joined = SparseCode.cat(parts)
    assert joined.shape == code.shape
    assert_same_bits(joined, code)


def test_cat_flattens_leading_dimensions():
    code = replace(random_code(6, 33), shape=torch.Size((2, 3, 33)))
    joined = SparseCode.cat([code, code])
    assert joined.shape == (12, 33)
    assert_is_code(joined)
    assert_same_bits(joined.to_dense()[6:], code.to_dense().reshape(6, 33))


def test_cat_of_encoded_halves_is_the_encoded_whole():
    p = make_inputs(257, 63, 100)
    kwargs = dict(activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)
    whole = ops.encode(p.x_c, p.W_enc, p.b_gate, **kwargs)
    halves = [ops.encode(x, p.W_enc, p.b_gate, **kwargs) for x in (p.x_c[:100], p.x_c[100:])]
    joined = SparseCode.cat(halves)
    assert_same_bits([joined.indptr, joined.indices], [whole.indptr, whole.indices])


def test_cat_of_nothing_is_a_value_error():
    with pytest.raises(ValueError, match="codes: got an empty sequence"):
        SparseCode.cat([])


def test_cat_of_different_widths_is_a_value_error():
    with pytest.raises(ValueError, match=r"codes: got feature counts \[33, 34\]"):
        SparseCode.cat([random_code(3, 33), random_code(3, 34)])


def test_cat_of_different_value_sets_is_a_value_error():
    with pytest.raises(ValueError, match="codes: got"):
        SparseCode.cat([random_code(3, 33, 1), random_code(3, 33, 2)])


def test_row_gradient_is_the_formula_it_states():
    """grad[i] = Σ_s Σ_j values[s][perm[j]] · A[s][rows[j]] + self_coefficient[i] · W[i], entry by entry in float64."""
    code, A, W, own = random_code(9, 33), randn(2, 9, 5).double(), randn(33, 5).double(), randn(33).double()
    values = code.values.double()
    gradient = RowGradient(ops.transpose(code), list(values), list(A), own)
    expected = own[:, None] * W
    for i in range(33):
        for j in range(int(gradient.csc.colptr[i]), int(gradient.csc.colptr[i + 1])):
            for v, a in zip(gradient.values, gradient.A, strict=True):
                expected[i] += v[gradient.csc.perm[j]] * a[gradient.csc.rows[j].long()]
    formula = (dense(code, values).mT @ A).sum(0) + own[:, None] * W
    assert (formula - expected).norm() <= 2.0**-40 * expected.norm()
    norm = ops.grad_sqnorm(gradient, W)
    assert (norm - expected.pow(2).sum()).abs() <= 2.0**-40 * norm
