"""GatedSAE, ReluSAE and JumpReluSAE against sae_fast.reference, and what a layer promises besides numbers."""

from __future__ import annotations

import copy
import io
import itertools
from functools import partial

import pytest
import torch
from helpers import Judge, assert_close_2x, assert_is_code, make_inputs, raises_and_changes_nothing, randn, same_bits
from torch import Tensor

import sae_fast as sf
from sae_fast import reference

CLASSES = [sf.GatedSAE, sf.ReluSAE, sf.JumpReluSAE]
TRAINABLE = [sf.GatedSAE, sf.ReluSAE]
INPUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
L1 = 0.7
classes = pytest.mark.parametrize("cls", CLASSES)
trainable = pytest.mark.parametrize("cls", TRAINABLE)
dialects = pytest.mark.parametrize("dialect", ["paper", "saelens"])
input_dtypes = pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # these problems are small: threads would only wait for each other


def make(cls, B=33, d=19, F=130, density=0.1, dtype=torch.float32, seed=0):
    """A layer with random parameters (no two alike, decoder rows of any norm) and a float32 input away from its kinks."""
    p = make_inputs(B, d, F, density, seed)
    W_dec = p.W_dec * (0.5 + torch.rand(F, 1, generator=torch.Generator().manual_seed(seed)))
    values = {"W_enc": p.W_enc, "W_dec": W_dec, "b_dec": p.b_dec}
    if cls is sf.GatedSAE:
        values |= {"b_gate": p.b_gate, "b_mag": p.b_mag, "r_mag": p.r_mag}
    elif cls is sf.ReluSAE:
        values |= {"b_enc": p.b_gate}
    else:
        values["W_enc"], values["b_enc"], values["threshold"] = reference.gated_to_jumprelu(
            p.W_enc, p.b_gate, p.b_mag, p.r_mag
        )
        assert (values["threshold"] > 0).any() and (values["threshold"] < 0).any()
    sae = cls(d, F, dtype=dtype)
    assert set(values) == {name for name, _ in sae.named_parameters()}
    with torch.no_grad():
        for name, value in values.items():
            sae.get_parameter(name).copy_(value)
    return sae, p.x.clone()


def plain_encode(sae, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    if isinstance(sae, sf.GatedSAE):
        return reference.gated_encode(x, p["W_enc"], p["b_gate"], p["b_mag"], p["r_mag"], p["b_dec"]).f
    if isinstance(sae, sf.ReluSAE):
        return reference.relu_encode(x, p["W_enc"], p["b_enc"], p["b_dec"])
    return reference.jumprelu_encode(x, p["W_enc"], p["b_enc"], p["threshold"], p["b_dec"])


def plain_loss(sae, x: Tensor, p: dict[str, Tensor], dialect: str, target: Tensor | None) -> reference.Loss:
    if isinstance(sae, sf.GatedSAE):
        names, loss = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"), reference.gated_loss
    else:
        names, loss = ("W_enc", "b_enc", "W_dec", "b_dec"), reference.relu_loss
    return loss(x, *(p[name] for name in names), L1, dialect, target)


def parameters(sae, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh leaves with the values of the layer's parameters."""
    return {name: p.detach().to(dtype, copy=True).requires_grad_() for name, p in sae.named_parameters()}


def assert_away_from_kinks(sae, x: Tensor) -> None:
    p = {name: t.detach().double() for name, t in sae.named_parameters()}
    u = reference.pre_activation(x.double(), p["W_enc"], p["b_dec"])
    if isinstance(sae, sf.GatedSAE):
        kinks = torch.stack([u + p["b_gate"], p["r_mag"].exp() * u + p["b_mag"]])
    elif isinstance(sae, sf.ReluSAE):
        kinks = u + p["b_enc"]
    else:
        kinks = torch.stack([u + p["b_enc"], u + p["b_enc"] - p["threshold"]])
    assert kinks.abs().min() > 3e-6, "choose another seed: an input is at a kink, where float32 and float64 may differ"


# ---- Numbers --------------------------------------------------------------------------------------------------------


@classes
@input_dtypes
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_encode_decode_and_forward_are_the_reference_within_twice_torchs_own_error(cls, dtype, density, route):
    sae, x = make(cls, density=density)
    x = x.to(dtype)
    assert_away_from_kinks(sae, x)
    p32, p64 = parameters(sae, torch.float32), parameters(sae, torch.float64)
    f32, f64 = plain_encode(sae, x.float(), p32), plain_encode(sae, x.double(), p64)
    x32, x64 = (reference.decode(f, p["W_dec"], p["b_dec"]) for f, p in ((f32, p32), (f64, p64)))
    assert 0 < (f64 != 0).float().mean() < 2 * density

    f, code = sae.encode(x), sae.encode_sparse(x)
    assert f.dtype == torch.float32 and torch.equal(f != 0, f64 != 0)
    assert_close_2x(f, f32, f64, "encode")
    assert_is_code(code)
    assert torch.equal(code.to_dense(), f)
    assert torch.equal(code.l0(), (f64 != 0).sum(-1))
    assert_close_2x(sae.decode(code), x32, x64, "decode(code)")
    assert_close_2x(sae.decode(f), x32, x64, "decode(f)")
    x_hat = sae(x)
    assert x_hat.dtype == dtype
    assert_close_2x(x_hat, x32.to(dtype), x64, "forward")


def test_a_gated_code_holds_the_gates_and_the_pre_activations_too():
    sae, x = make(sf.GatedSAE, density=0.3)
    code, p64, p32 = sae.encode_sparse(x), parameters(sae, torch.float64), parameters(sae, torch.float32)
    dense = [
        reference.gated_encode(x.to(p["b_dec"].dtype), *(p[n] for n in ("W_enc", "b_gate", "b_mag", "r_mag", "b_dec")))
        for p in (p32, p64)
    ]
    open_gates = dense[1].gate.bool()
    assert torch.equal(code.to_dense(torch.ones_like(code.u)) != 0, open_gates), "the support is where the gates are open"
    assert (code.magnitudes == 0).any() and (code.magnitudes != 0).any(), "the case S \\ S′ is in the data"
    assert_close_2x(code.to_dense(code.gates), dense[0].pi_gate.relu(), dense[1].pi_gate.relu(), "gates")
    assert_close_2x(code.to_dense(code.u), dense[0].u * open_gates, dense[1].u * open_gates, "u")


@trainable
@dialects
@input_dtypes
@pytest.mark.parametrize("transcoder", [False, True], ids=["target is x", "target is another"])
def test_the_loss_and_its_gradients_are_the_references_within_twice_torchs_own_error(cls, dialect, dtype, transcoder):
    def run(loss, x, target, at, p):
        """The terms, and the gradients of their sum."""
        x = x.detach().clone().requires_grad_()
        leaves = {"x": x, **p}
        if target is not None:
            target = leaves["target"] = target.detach().clone().requires_grad_()
        terms = loss(at(x), None if target is None else at(target))
        gradients = torch.autograd.grad(terms.total, list(leaves.values()))
        named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return named | {"terms": torch.stack(terms).detach()}

    trials = Judge()
    for density, seed in itertools.product((0.02, 0.5), range(4)):
        sae, x = make(cls, density=density, seed=seed)
        x = x.to(dtype)
        target = randn(*x.shape, seed=5).to(dtype) if transcoder else None
        assert_away_from_kinks(sae, x)
        p32, p64 = parameters(sae, torch.float32), parameters(sae, torch.float64)
        plain = partial(plain_loss, sae, dialect=dialect)
        ours = run(lambda x, t, sae=sae: sae.loss(x, L1, dialect, t), x, target, lambda t: t, dict(sae.named_parameters()))
        torchs = run(lambda x, t, f=plain, p=p32: f(x, p, target=t), x, target, Tensor.float, p32)
        x64, target64 = x.double(), None if target is None else target.double()
        exact = run(lambda x, t, f=plain, p=p64: f(x, p, target=t), x64, target64, lambda t: t, p64)
        assert ours.keys() == exact.keys()
        for name in exact:
            assert ours[name].dtype == torchs[name].dtype
            trials.add(f"density {density}: {name}", ours[name], torchs[name], exact[name])
    trials.verdict()


@trainable
@dialects
@pytest.mark.parametrize("term", ["reconstruction", "sparsity", "auxiliary", "weighted"])
def test_every_term_of_the_loss_has_its_own_gradient(cls, dialect, term):
    sae, x = make(cls, density=0.2, dtype=torch.float64)
    x, target = x.double().requires_grad_(), randn(*x.shape, seed=3, dtype=torch.float64).requires_grad_()
    assert_away_from_kinks(sae, x.detach())
    p = parameters(sae, torch.float64)

    def of(loss):
        if term == "weighted":
            return loss.reconstruction * 0.3 - loss.sparsity * 2.0 + loss.auxiliary * 5.0
        return getattr(loss, term)

    wanted_term, our_term = of(plain_loss(sae, x, p, dialect, target)), of(sae.loss(x, L1, dialect, target))
    if cls is sf.ReluSAE and term == "auxiliary":
        assert wanted_term == our_term == 0
        return
    grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    wanted = grad(wanted_term, [x, target, *p.values()])
    ours = grad(our_term, [x, target, *(sae.get_parameter(name) for name in p)])
    for name, got, want in zip(["x", "target", *p], ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@classes
def test_a_float64_layer_computes_in_float64(cls):
    sae, x = make(cls, dtype=torch.float64)
    p = parameters(sae, torch.float64)
    x = x.double() + 1e-9 * randn(*x.shape, seed=2, dtype=torch.float64)  # no float32 holds it
    f = plain_encode(sae, x, p)
    for got, want in ((sae.encode(x), f), (sae(x), reference.decode(f, p["W_dec"], p["b_dec"]))):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@classes
@input_dtypes
def test_a_bf16_layer_infers_as_well_as_torch_in_bf16(cls, dtype):
    sae, x = make(cls, B=40)
    sae, x = sae.to(torch.bfloat16), x.to(dtype)
    own, exact = parameters(sae, torch.bfloat16), parameters(sae, torch.float64)
    f_own, f_exact = plain_encode(sae, x.bfloat16(), own), plain_encode(sae, x.bfloat16().double(), exact)
    assert sae.encode(x).dtype == torch.bfloat16
    assert_close_2x(sae.encode(x), f_own, f_exact, "encode")
    own_hat, hat = (reference.decode(f, p["W_dec"], p["b_dec"]) for f, p in ((f_own, own), (f_exact, exact)))
    assert sae(x).dtype == dtype
    assert_close_2x(sae(x), own_hat.to(dtype), hat, "forward")


@classes
def test_a_layer_of_one_feature_and_one_dimension_works(cls):
    sae = cls(1, 1, seed=0)
    x = torch.tensor([[2.0], [-3.0], [0.5]])
    torch.testing.assert_close(sae.encode(x), plain_encode(sae, x, dict(sae.named_parameters())))
    torch.testing.assert_close(sae(x), sae.encode(x) * sae.W_dec)


def test_the_strict_heaviside_step_keeps_an_exact_tie_closed():
    sae = sf.GatedSAE(2, 3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        sae.b_gate.copy_(torch.tensor([-1.0, -0.5, -1.5]))
        sae.b_mag.fill_(1.0)
    assert torch.equal(sae.encode(torch.tensor([[1.0, 0.5]])), torch.zeros(1, 3)), "π_gate = 0: closed, though π_mag > 0"
    assert (sae.encode(torch.tensor([[1.25, 0.75]])) > 0).all()


# ---- Shapes and strides ---------------------------------------------------------------------------------------------


def views(x: Tensor) -> dict[str, Tensor]:
    """x [24, d] in other shapes and strides."""
    B, d = x.shape
    wide = torch.full((B, 2 * d), float("nan"))
    wide[:, ::2] = x
    return {
        "leading dimensions": x.reshape(2, 3, 4, d),
        "a dimension of 1": x.reshape(B, 1, d),
        "last dimension strided": wide[:, ::2],
        "transposed memory": x.t().contiguous().t(),
        "permuted leading dimensions": x.reshape(4, 6, d).transpose(0, 1).contiguous().transpose(0, 1),
        "an offset": torch.cat([torch.full((5, d), float("nan")), x])[5:],
    }


@classes
def test_any_leading_dimensions_and_strides_give_the_bits_of_the_contiguous_rows(cls):
    sae, x = make(cls, B=24)
    f, x_hat, code = sae.encode(x), sae(x), sae.encode_sparse(x)
    for name, view in views(x).items():
        lead = view.shape[:-1]
        assert torch.equal(view.reshape(x.shape), x), name
        assert same_bits(sae.encode(view), f.reshape(*lead, -1)), name
        assert same_bits(sae(view), x_hat.reshape(*lead, -1)), name
        ours = sae.encode_sparse(view)
        assert ours.shape == (*lead, sae.d_sae) and torch.equal(ours.indptr, code.indptr), name
        assert torch.equal(ours.l0(), code.l0().reshape(lead)), name
        assert same_bits(ours.to_dense(), f.reshape(*lead, -1)), name
        assert same_bits(sae.decode(ours), x_hat.reshape(*lead, -1)), name
        if cls is not sf.JumpReluSAE:
            target = view * 2
            assert same_bits(sae.loss(view, L1, target=target).total, sae.loss(x, L1, target=x * 2).total), name


@classes
def test_a_repeated_row_of_stride_zero_a_single_vector_and_an_empty_batch_work(cls):
    sae, x = make(cls, B=24)
    expanded = x[:1].expand(4, 19)
    assert expanded.stride(0) == 0
    torch.testing.assert_close(sae.encode(expanded), sae.encode(x[:1]).expand(4, -1))
    vector = sae.encode_sparse(x[0])
    assert vector.shape == (130,) and vector.l0().shape == () and int(vector.l0()) == int((sae.encode(x[0]) != 0).sum())
    assert sae.encode(x[0]).shape == (130,) and sae(x[0]).shape == (19,)
    torch.testing.assert_close(sae(x[0]), sae(x[:1])[0])
    for lead in ((0,), (0, 3), (2, 0)):
        nothing = torch.empty(*lead, 19)
        assert sae.encode(nothing).shape == (*lead, 130) and sae(nothing).shape == nothing.shape
        assert sae.encode_sparse(nothing).l0().shape == lead


@trainable
def test_gradients_flow_through_encode_and_decode_with_leading_dimensions(cls):
    sae, x = make(cls, B=24, density=0.2, dtype=torch.float64)
    x = x.double().reshape(2, 12, 19).requires_grad_()
    p, weight = parameters(sae, torch.float64), randn(2, 12, 19, seed=9, dtype=torch.float64)

    wanted_hat = reference.decode(plain_encode(sae, x, p), p["W_dec"], p["b_dec"])
    grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    wanted = grad((wanted_hat * weight).sum(), [x, *p.values()])
    for x_hat in (sae(x), sae.decode(sae.encode(x))):
        ours = grad((x_hat * weight).sum(), [x, *(sae.get_parameter(name) for name in p)])
        for name, got, want in zip(["x", *p], ours, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_target_of_other_strides_and_dtype_is_converted_like_x():
    sae, x = make(sf.GatedSAE, B=24)
    target = randn(24, 19, seed=4).bfloat16()
    wanted = sae.loss(x, L1, target=target.float()).total
    assert torch.equal(sae.loss(x, L1, target=target.t().contiguous().t()).total, wanted)


# ---- SparseCode -----------------------------------------------------------------------------------------------------


def test_a_sparse_code_counts_only_what_fires_and_densifies_any_values():
    code = sf.SparseCode(
        shape=torch.Size((2, 2, 5)),
        indptr=torch.tensor([0, 2, 2, 5, 6]),
        indices=torch.tensor([1, 4, 0, 2, 3, 4], dtype=torch.int32),
        u=torch.arange(6.0),
        values=torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.0, 0.0], [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]]),
    )
    assert (code.nnz, code.batch, code.d_sae) == (6, 4, 5)
    assert code.l0().tolist() == [[1, 0], [2, 0]] and code.l0().dtype == torch.int64
    assert code.to_dense().tolist() == [[[0, 1, 0, 0, 0], [0] * 5], [[2, 0, 3, 0, 0], [0] * 5]]
    assert code.to_dense(code.gates).tolist() == [[[0, 5, 0, 0, 6], [0] * 5], [[7, 0, 8, 9, 0], [0, 0, 0, 0, 10]]]
    assert code.row_ids().tolist() == [0, 0, 2, 2, 2, 3]
    other = code.with_values(code.values * 2)
    assert other.to_dense().sum() == 12 and code.to_dense().sum() == 6


def test_stacked_codes_are_the_code_of_the_stacked_rows():
    sae, x = make(sf.GatedSAE, B=24)
    parts = [sae.encode_sparse(x[:10].reshape(2, 5, 19)), sae.encode_sparse(x[10:10]), sae.encode_sparse(x[10:])]
    whole, stacked = sae.encode_sparse(x), sf.SparseCode.cat(parts)
    assert stacked.shape == (24, 130)
    assert torch.equal(stacked.indptr, whole.indptr) and torch.equal(stacked.indices, whole.indices)
    torch.testing.assert_close(stacked.values, whole.values)
    torch.testing.assert_close(stacked.u, whole.u)
    with pytest.raises(ValueError, match=r"codes: .*empty"):
        sf.SparseCode.cat([])
    with pytest.raises(ValueError, match=r"codes: .*\[3, 130\]"):
        sf.SparseCode.cat([whole, sf.GatedSAE(19, 3).encode_sparse(x)])


# ---- Refusals -------------------------------------------------------------------------------------------------------


def spoiled(value: float, *index: int, dtype=torch.float32, shape=(3, 4, 19)) -> Tensor:
    x = randn(*shape, seed=6).to(dtype)
    x[index] = value
    return x


BAD_INPUTS = {
    "last dimension": (torch.zeros(4, 18), r"{}: got shape \(4, 18\), want \[\.\.\., d_in\] with d_in = 19"),
    "last dimension of three": (torch.zeros(19, 2, 1), r"{}: got shape \(19, 2, 1\).*19"),
    "no dimension": (torch.tensor(1.0), r"{}: got shape \(\).*19"),
    "int64": (torch.zeros(4, 19, dtype=torch.int64), r"{}: got torch.int64.*float32.*bfloat16.*float16"),
    "int32": (torch.zeros(4, 19, dtype=torch.int32), r"{}: got torch.int32"),
    "uint8": (torch.zeros(4, 19, dtype=torch.uint8), r"{}: got torch.uint8"),
    "bool": (torch.zeros(4, 19, dtype=torch.bool), r"{}: got torch.bool"),
    "complex": (torch.zeros(4, 19, dtype=torch.complex64), r"{}: got torch.complex64"),
    "float64": (torch.zeros(4, 19, dtype=torch.float64), r"{}: got torch.float64"),
    "a list": ([[0.0] * 19] * 4, r"{}: got list, want a tensor"),
    "NaN": (spoiled(float("nan"), 1, 2, 3), r"{}: got nan at index \(1, 2, 3\) of shape \(3, 4, 19\)"),
    "inf": (spoiled(float("inf"), 2, 0, 18), r"{}: got inf at index \(2, 0, 18\) of shape \(3, 4, 19\)"),
    "-inf": (spoiled(-float("inf"), 0, 0, 0), r"{}: got -inf at index \(0, 0, 0\) of shape \(3, 4, 19\)"),
    "bf16 NaN": (spoiled(float("nan"), 3, 7, dtype=torch.bfloat16, shape=(5, 19)), r"{}: got nan at index \(3, 7\) of"),
    "fp16 inf": (
        spoiled(1e9, 4, 1, dtype=torch.float16, shape=(5, 19)),
        r"{}: got inf at index \(4, 1\) of shape \(5, 19\)",
    ),
    "a strided NaN": (
        spoiled(float("nan"), 3, 2, 7, shape=(19, 5, 19)).transpose(0, 1),
        r"{}: got nan at index \(2, 3, 7\) of shape \(5, 19, 19\)",
    ),
    "a NaN vector": (spoiled(float("nan"), 7, shape=(19,)), r"{}: got nan at index \(7,\) of shape \(19,\)"),
}


@classes
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_bad_input_is_a_value_error_that_names_it_and_changes_nothing(cls, case):
    x, message = BAD_INPUTS[case]
    sae, _ = make(cls)
    weights = list(sae.parameters())
    for method in (sae.encode, sae.encode_sparse, sae, partial(sae.calibrate_, l0=4)):
        with raises_and_changes_nothing("^" + message.format("x"), weights, x):
            method(x)
    if cls is not sf.JumpReluSAE:
        good = randn(4, 19)
        with raises_and_changes_nothing("^" + message.format("x"), weights, x):
            sae.loss(x, L1)
        with raises_and_changes_nothing("^" + message.format("target"), weights, x):
            sae.loss(good, L1, target=x)


def test_of_several_bad_values_the_first_is_named():
    x = randn(6, 19)
    x[4, 1], x[2, 5], x[2, 9] = float("nan"), float("-inf"), float("nan")
    with pytest.raises(ValueError, match=r"x: got -inf at index \(2, 5\)"):
        make(sf.GatedSAE)[0].encode(x)


def test_the_largest_finite_value_is_not_taken_for_an_infinity():
    largest = torch.finfo(torch.float16).max
    assert sf.GatedSAE(4, 8, seed=0).encode(torch.full((2, 4), largest, dtype=torch.float16)).isfinite().all()


@classes
def test_decode_refuses_what_is_not_a_code_of_this_layer(cls):
    sae, x = make(cls)
    with pytest.raises(ValueError, match=r"^f: got shape \(3, 129\), want a SparseCode or .*d_sae = 130"):
        sae.decode(torch.zeros(3, 129))
    with pytest.raises(ValueError, match=r"^f: got shape \(\)"):
        sae.decode(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^f: got list"):
        sae.decode([1.0] * 130)
    with pytest.raises(ValueError, match=r"^f: got a code of 7 features, want 130"):
        sae.decode(sf.ReluSAE(19, 7).encode_sparse(x))


@trainable
def test_the_loss_refuses_an_unknown_dialect_and_a_target_of_another_batch(cls):
    sae, x = make(cls)
    with pytest.raises(ValueError, match="dialect: got 'papers'"):
        sae.loss(x, L1, "papers")
    with pytest.raises(ValueError, match=r"target: got shape \(5, 19\), want \[33, 19\]"):
        sae.loss(x, L1, target=x[:5])


@classes
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4), "d_in: got 0"),
        ((4, -1), "d_sae: got -1"),
        ((4.0, 4), "d_in: got 4.0"),
        ((4, 4, torch.int32), "dtype: got torch.int32"),
    ],
)
def test_a_layer_refuses_impossible_sizes_and_dtypes(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(*arguments)


# ---- Initialisation, copies, state ----------------------------------------------------------------------------------


@classes
def test_a_new_layer_has_unit_decoder_rows_an_encoder_equal_to_them_and_zero_biases(cls):
    sae = cls(19, 130)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(130))
    assert same_bits(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    names = {name for name, _ in sae.named_parameters()}
    extra = {"GatedSAE": {"b_gate", "b_mag", "r_mag"}, "ReluSAE": {"b_enc"}, "JumpReluSAE": {"b_enc", "threshold"}}
    assert names == {"W_enc", "W_dec", "b_dec"} | extra[cls.__name__]
    for name in names - {"W_enc", "W_dec"}:
        assert sae.get_parameter(name).shape == ((19,) if name == "b_dec" else (130,))
        assert (sae.get_parameter(name) == 0).all()
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in sae.parameters())
    assert sae.W_enc.shape == sae.W_dec.shape == (130, 19)
    assert "d_in=19" in repr(sae) and "d_sae=130" in repr(sae)


@classes
def test_a_seed_repeats_and_leaves_the_global_generator_alone(cls):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (cls(19, 130, seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(first.W_dec, again.W_dec) and not torch.equal(first.W_dec, other.W_dec)
    unseeded = [cls(19, 130) for _ in range(2)]
    assert not torch.equal(unseeded[0].W_dec, unseeded[1].W_dec), "without a seed, the global generator decides"
    torch.manual_seed(1)
    assert same_bits(cls(19, 130).W_dec, unseeded[0].W_dec)


@classes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_layer_is_made_in_the_dtype_that_is_asked_for(cls, dtype):
    sae = cls(19, 13, dtype=dtype, device="cpu", seed=0)
    assert all(p.dtype == dtype for p in sae.parameters())
    assert torch.equal(sae.W_dec, cls(19, 13, seed=0).W_dec.to(dtype))


@classes
def test_a_deep_copy_is_equal_and_independent(cls):
    sae, x = make(cls)
    twin = copy.deepcopy(sae)
    f = sae.encode(x)
    assert same_bits(twin.encode(x), f)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert same_bits(sae.encode(x), f) and not torch.equal(twin.encode(x), f)


@classes
def test_a_state_dict_moves_everything_to_another_layer(cls):
    sae, x = make(cls)
    file = io.BytesIO()
    torch.save(sae.state_dict(), file)
    file.seek(0)
    twin = cls(19, 130)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(twin(x), sae(x)) and same_bits(twin.encode(x), sae.encode(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        cls(19, 131).load_state_dict(sae.state_dict())


@classes
def test_to_float64_and_back_keeps_the_layer_working(cls):
    sae, x = make(cls)
    f = sae.encode(x)
    wide = copy.deepcopy(sae).to(torch.float64)
    assert wide.encode(x).dtype == torch.float64 and wide.encode(x.double()).dtype == torch.float64
    torch.testing.assert_close(wide.encode(x).float(), f)
    assert same_bits(wide.to(torch.float32).encode(x), f)


@classes
def test_autocast_leaves_the_answer_in_full_precision(cls):
    sae, x = make(cls)
    f, x_hat = sae.encode(x), sae(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(sae.encode(x), f) and same_bits(sae(x), x_hat)


# ---- GatedSAE.to_jumprelu -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_jumprelu_form_computes_the_same_function(dtype):
    for density in (0.05, 0.5):
        sae, x = make(sf.GatedSAE, density=density, dtype=dtype)
        assert_away_from_kinks(sae, x)
        jump = sae.to_jumprelu()
        assert type(jump) is sf.JumpReluSAE and jump.W_enc.dtype == dtype
        theta = sae.b_mag - sae.r_mag.exp() * sae.b_gate
        assert (theta < 0).any() and (theta > 0).any(), "both a jump and a plain ReLU are in the data"
        torch.testing.assert_close(jump.threshold, theta.clamp(min=0))

        x = x.to(dtype)
        f, ours = sae.encode(x), jump.encode(x)
        assert torch.equal(ours != 0, f != 0)
        p, p64 = parameters(sae, dtype), parameters(sae, torch.float64)
        exact = plain_encode(sae, x.double(), p64)
        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        else:
            W_enc, b_enc, _ = reference.gated_to_jumprelu(p["W_enc"], p["b_gate"], p["b_mag"], p["r_mag"])
            own = reference.jumprelu_encode(x, W_enc, b_enc, theta.detach(), p["b_dec"])
            assert_close_2x(ours, own, exact, "encode")
        torch.testing.assert_close(jump(x), sae(x))
        for centred in (False, True):  # b_enc takes what changes
            sae.apply_b_dec_to_input = not centred
            other = sae.to_jumprelu(apply_b_dec_to_input=centred)
            torch.testing.assert_close(other(x), sae(x), rtol=1e-4, atol=1e-4)


def test_the_jumprelu_form_is_a_copy_and_draws_nothing():
    sae, x = make(sf.GatedSAE)
    generator = torch.get_rng_state()
    jump = sae.to_jumprelu()
    assert torch.equal(torch.get_rng_state(), generator)
    f = jump.encode(x)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(1)
    assert same_bits(jump.encode(x), f)
    assert all(p.requires_grad for p in jump.parameters())


def test_a_value_beyond_the_modules_dtype_is_refused():
    with pytest.raises(ValueError, match=r"x: got inf at index \(0, 2\)"):
        sf.GatedSAE(4, 8, dtype=torch.float16)(torch.tensor([[0.0, 1.0, 1e6, 0.0]]))
