"""ops.encode: the support and the values on it."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    FEW_SHAPES,
    SHAPES,
    Judge,
    assert_is_code,
    assert_repeats,
    assert_same_bits,
    dense,
    make_inputs,
    op_module,
    opcheck,
    raises_and_changes_nothing,
    seeds,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from problems.encode import ACTIVATIONS, arguments, assert_exact, double, exact_problem, judge, plain

from sae_fast import ops, reference, use_backend
from sae_fast.ops.encode import cpu

module = op_module("encode")


# ---- Values and support ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_code_is_as_near_to_float64_as_torchs(shape, isa):
    trials = Judge()
    for seed in seeds(shape[0] * shape[2] // 4):
        kwargs = arguments(make_inputs(*shape, seed=seed), "gated")
        judge(ops.encode(**kwargs), kwargs, trials)
    trials.verdict()


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_relu_and_jumprelu_codes_are_as_near_to_float64_as_torchs(activation, shape):
    trials = Judge()
    for seed in seeds(shape[0] * shape[2] // 4):
        kwargs = arguments(make_inputs(*shape, seed=seed), activation)
        judge(ops.encode(**kwargs), kwargs, trials)
    trials.verdict()


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_reference_body_meets_the_same_contract(shape):
    for activation in ACTIVATIONS:
        kwargs = arguments(make_inputs(*shape), activation)
        with use_backend("reference"):
            judge(ops.encode(**kwargs), kwargs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 63, 31), (257, 100, 100), (257, 1, 33), (3, 63, 4099)], ids=str)
def test_ties_at_zero_are_not_members(shape, activation, isa):
    kwargs = exact_problem(*shape, activation)
    pi = kwargs["x"] @ kwargs["W_enc"].T + kwargs["bias"]
    assert (pi == 0).any(0).all() or activation == "jumprelu"
    assert_exact(ops.encode(**kwargs), kwargs)


def test_ties_at_a_jumprelu_threshold_are_not_members(isa):
    kwargs = exact_problem(257, 63, 33, "jumprelu")
    pi = kwargs["x"] @ kwargs["W_enc"].T + kwargs["bias"]
    assert ((pi == kwargs["threshold"]) & (pi > 0)).any() and (kwargs["threshold"] < 0).any()
    assert_exact(ops.encode(**kwargs), kwargs)


@pytest.mark.parametrize("tile", [1, 256 * 100, 300 * 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tiles_and_row_blocks_join_without_a_seam(activation, tile, isa, monkeypatch):
    """257 rows in blocks of 100, 100, 57 and 4099 features in tiles of at least 256 with a ragged last one."""
    monkeypatch.setattr(cpu, "ROWS", 100)
    monkeypatch.setattr(cpu, "TILE", tile)
    exact = exact_problem(257, 63, 4099, activation)
    assert_exact(ops.encode(**exact), exact)
    rounded = arguments(make_inputs(257, 63, 4099), activation)
    judge(ops.encode(**rounded), rounded)


def test_a_gate_open_at_magnitude_zero_is_kept():
    """S \\ S′ of MATH.md §2: these entries carry the auxiliary and the sparsity gradient."""
    p = make_inputs(257, 63, 100)
    code = ops.encode(**arguments(p, "gated"))
    exact = reference.gated_encode(*p.to(torch.float64).gated())
    outside = (exact.pi_gate > 0) & (exact.pi_mag <= 0)
    assert outside.sum() > 100
    assert int((code.magnitudes == 0).sum()) == int(outside.sum())
    assert bool((code.gates > 0).all())


def test_rows_may_be_empty_or_full(isa):
    kwargs = exact_problem(9, 63, 100, "gated")
    kwargs["x"][4] = 0
    kwargs["bias"] = torch.full((100,), -1000.0)
    none = ops.encode(**kwargs)
    assert none.nnz == 0 and none.values.shape == (2, 0) and torch.equal(none.indptr, torch.zeros(10, dtype=torch.int64))
    kwargs["bias"] = torch.full((100,), 1000.0)
    every = ops.encode(**kwargs)
    assert every.nnz == 900
    assert_exact(every, kwargs)
    kwargs["bias"] = torch.zeros(100)
    some = ops.encode(**kwargs)
    assert some.indptr[4] == some.indptr[5] and some.nnz > 0
    assert_exact(some, kwargs)


@pytest.mark.parametrize("support", ["threshold", "topk", "batch_topk"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_rows_give_an_empty_code(activation, support):
    kwargs = exact_problem(0, 63, 33, activation)
    code = ops.encode(**kwargs, support=support, k=0 if support == "threshold" else 3)
    assert_is_code(code)
    assert code.shape == (0, 33) and code.nnz == 0 and code.values.shape == (2 if activation == "gated" else 1, 0)


# ---- Nothing non-finite vanishes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_preactivation_is_a_member_with_nan_values(activation, backend, isa):
    kwargs = exact_problem(5, 63, 35, activation)
    kwargs["x"][1, 7] = float("nan")
    with use_backend(backend):
        code = ops.encode(**kwargs)
    row = slice(int(code.indptr[1]), int(code.indptr[2]))
    assert torch.equal(code.indices[row], torch.arange(35, dtype=torch.int32))
    assert bool(code.u[row].isnan().all()) and bool(code.values[:, row].isnan().all())
    assert int(code.u.isnan().sum()) == 35, "only that row"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plus_infinity_is_a_member_and_minus_infinity_is_not(activation, isa):
    kwargs = exact_problem(5, 1, 40, activation)
    kwargs["W_enc"][:20], kwargs["W_enc"][20:] = 1, -1
    kwargs["x"][3] = float("inf")
    code = ops.encode(**kwargs)
    row = slice(int(code.indptr[3]), int(code.indptr[4]))
    assert torch.equal(code.indices[row], torch.arange(20, dtype=torch.int32))
    assert bool((code.values[:, row] == float("inf")).all())


@pytest.mark.parametrize("support", ["topk", "batch_topk"])
def test_a_nan_is_chosen_by_topk(support):
    kwargs = exact_problem(5, 63, 35, "relu")
    kwargs["x"][1, 7] = float("nan")
    code = ops.encode(**kwargs, support=support, k=4)
    assert bool(code.values.isnan().any())


# ---- Slack, topk and batch_topk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slack_keeps_a_window_below_the_threshold_at_value_zero(activation, backend, isa):
    kwargs = exact_problem(257, 63, 100, activation) | dict(slack=0.75)
    with use_backend(backend):
        code = ops.encode(**kwargs)
    assert_exact(code, kwargs)
    tight = ops.encode(**{**kwargs, "slack": 0.0})
    window = code.nnz - tight.nnz
    assert window > 0
    assert int((code.gates == 0).sum()) == window + int((tight.gates == 0).sum())


def by_rank(pi: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest positive entries of each row, by a full sort."""
    member = torch.zeros_like(pi, dtype=torch.bool)
    order = pi.sort(dim=1, descending=True).indices[:, :k]
    return member.scatter_(1, order, True) & (pi > 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [1, 8, 33])
@pytest.mark.parametrize("support", ["topk", "batch_topk"])
def test_topk_supports_are_the_largest_positive_preactivations(support, k, activation):
    kwargs = arguments(make_inputs(57, 63, 33, density=0.3), activation)
    code = ops.encode(**kwargs, support=support, k=k)
    assert_is_code(code)
    _, u64, values64 = plain(**double(kwargs))
    _, u32, values32 = plain(**kwargs)
    pi = u64 + kwargs["bias"].double()
    member = by_rank(pi, k) if support == "topk" else by_rank(pi.reshape(1, -1), k * 57).view_as(pi)
    assert k == 33 or member.sum() < (pi > 0).sum(), "k matters"
    assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member)
    trials = Judge()
    trials.add("u", dense(code, code.u), u32 * member, u64 * member)
    trials.add("values", dense(code, code.values), values32 * member, values64 * member)
    trials.verdict()


# ---- Strides, dtypes, repeatability ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strides_do_not_matter(activation):
    kwargs = exact_problem(57, 63, 100, activation)
    apart = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert not apart["x"].is_contiguous() and not apart["bias"].is_contiguous()
    assert_same_bits(ops.encode(**kwargs), ops.encode(**apart))
    apart["W_enc"] = kwargs["W_enc"].T.contiguous().T
    assert_same_bits(ops.encode(**kwargs), ops.encode(**apart))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_repeats_bit_for_bit(activation, isa, monkeypatch):
    """At every thread count, where the product itself is exact."""
    monkeypatch.setattr(cpu, "ROWS", 100)
    monkeypatch.setattr(cpu, "TILE", 100 * 256)
    kwargs = exact_problem(257, 63, 1000, activation)
    assert_repeats(lambda: ops.encode(**kwargs), threads=(1, 2, 3, 7))
    rounded = arguments(make_inputs(257, 100, 100), activation)
    assert_repeats(lambda: ops.encode(**rounded), threads=())


def test_more_threads_than_rows(isa):
    torch.set_num_threads(5)
    kwargs = exact_problem(2, 63, 100, "gated")
    assert_exact(ops.encode(**kwargs), kwargs)


@given(
    B=st.integers(0, 20), d=st.integers(1, 40), F=st.integers(1, 70), seed=st.integers(0, 1000),
    activation=st.sampled_from(ACTIVATIONS), apart=st.booleans(), slack=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_shape_stride_and_dtype_on_the_grid_is_exact(B, d, F, seed, activation, apart, slack, dtype):
    """Sums up to 40 · 1 in eighths are exact even in bfloat16 when the factors are kept to ±1 and few."""
    kwargs = exact_problem(B, d, F, activation, seed)
    if dtype in (torch.bfloat16, torch.float16):  # 8 bits: multiples of 1 up to 3 · 40 each side
        kwargs = {k: v.round().clamp(-3, 3) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        kwargs["x"], kwargs["W_enc"] = kwargs["x"].clamp(-1, 1), kwargs["W_enc"].clamp(-1, 1)
    kwargs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()} | dict(slack=slack)
    given_ = {k: strided(v) if apart and isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    code = ops.encode(**given_)
    assert code.values.dtype == dtype
    assert_exact(code, kwargs)


# ---- Bad input -------------------------------------------------------------------------------------------------------

SOUND = arguments(make_inputs(3, 63, 33), "gated")
JUMP = arguments(make_inputs(3, 63, 33), "jumprelu")
BAD = {
    "wrong width": (SOUND, dict(x=torch.zeros(3, 62)), r"x: got shape \(3, 62\), want \[B, 63\]"),
    "x of one dimension": (SOUND, dict(x=torch.zeros(63)), "x: got shape"),
    "integer x": (SOUND, dict(x=torch.zeros(3, 63, dtype=torch.int64)), "x: got torch.int64"),
    "x of another dtype": (SOUND, dict(x=torch.zeros(3, 63, dtype=torch.float64)), "x: got torch.float64"),
    "weights of three dimensions": (SOUND, dict(W_enc=torch.zeros(2, 33, 63)), "W_enc: got shape"),
    "bias too long": (SOUND, dict(bias=torch.zeros(34)), "bias: got shape"),
    "bias of another dtype": (SOUND, dict(bias=torch.zeros(33, dtype=torch.float64)), "bias: got torch.float64"),
    "no r_mag": (SOUND, dict(r_mag=None), "r_mag: got None"),
    "no b_mag": (SOUND, dict(b_mag=None), "b_mag: got None"),
    "r_mag too short": (SOUND, dict(r_mag=torch.zeros(32)), "r_mag: got shape"),
    "b_mag as a matrix": (SOUND, dict(b_mag=torch.zeros(33, 1)), "b_mag: got shape"),
    "no threshold": (JUMP, dict(threshold=None), "threshold: got None"),
    "integer threshold": (JUMP, dict(threshold=torch.zeros(33, dtype=torch.int32)), "threshold: got torch.int32"),
    "unknown activation": (SOUND, dict(activation="gelu"), "activation: got 'gelu'"),
    "unknown support": (SOUND, dict(support="top"), "support: got 'top'"),
    "k of zero": (SOUND, dict(support="topk", k=0), "k: got 0"),
    "k above F": (SOUND, dict(support="batch_topk", k=34), "k: got 34"),
    "negative slack": (SOUND, dict(slack=-0.1), "slack: got -0.1"),
    "slack that is not a number": (SOUND, dict(slack=float("nan")), "slack: got nan"),
    "slack with topk": (SOUND, dict(support="topk", k=3, slack=0.1), "slack: got 0.1"),
    "no features": (SOUND, {k: torch.zeros(0, 63) if k == "W_enc" else torch.zeros(0)
                            for k in ("W_enc", "bias", "r_mag", "b_mag")}, "W_enc: got shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_value_error_that_names_it(case):
    sound, change, message = BAD[case]
    kwargs = sound | change
    with raises_and_changes_nothing(message, [v for v in kwargs.values() if getattr(v, "is_cpu", False)]):
        ops.encode(**kwargs)


# ---- torch.library ---------------------------------------------------------------------------------------------------


def positional(p, activation: str = "gated") -> tuple:
    return (p.x_c, p.W_enc, p.b_gate, p.r_mag, p.b_mag, activation, "threshold", 0, 0.0)


def test_opcheck():
    """All but test_aot_dispatch_static: nnz depends on the data, and a static trace has no size for it."""
    p = make_inputs(3, 63, 33)
    op = torch.ops.sae_fast.encode.default
    opcheck(
        op, positional(p), ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    )
    # opcheck's dynamic test adds up all outputs in place, from the first, an integer: it cannot run with gradients.
    opcheck(op, positional(p.leaves()), ["test_schema", "test_autograd_registration", "test_faketensor"])


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # torch 2.8 does not take it from fullgraph
def test_compiles_as_one_graph_with_gradients():
    def loss(p):
        code = ops.encode(p.x - p.b_dec, p.W_enc, p.b_gate, activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)
        return ops.decode(code, p.W_dec).square().sum() + code.gates.sum()

    eager, compiled = make_inputs(3, 63, 33).leaves(), make_inputs(3, 63, 33).leaves()
    loss(eager).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()
    assert_same_bits([t.grad for t in eager.tensors()], [t.grad for t in compiled.tensors()])


UNUSED = {
    "r_mag": ("relu", "jumprelu"), "b_mag": ("relu", "jumprelu"), "threshold": ("gated", "relu"),
}  # fmt: skip


@pytest.mark.parametrize("name, activation", [(name, a) for name, those in UNUSED.items() for a in those])
def test_an_argument_that_the_activation_does_not_use_is_refused_by_name(name, activation):
    kwargs = exact_problem(3, 8, 9, activation)
    with pytest.raises(ValueError, match=rf"^{name}: got a tensor, want None for activation '{activation}'"):
        ops.encode(**{**kwargs, name: torch.zeros(9)})
    with pytest.raises(ValueError, match=r"^k: got 3 with support 'threshold', which does not use it, want 0"):
        ops.encode(**kwargs, k=3)
