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
from problems import bodies
from problems.bodies import moved
from problems.encode import ACTIVATIONS, arguments, assert_exact, double, exact_problem, judge, plain

from sae_fast import ops, reference, use_backend
from sae_fast.ops.encode import cpu

module = op_module("encode")


# ---- Values and support ---------------------------------------------------------------------------------------------

TINY = [(1, 1, 1), (3, 1, 31), (1, 63, 33), (3, 64, 1), (1, 100, 100), (5, 65, 64)]


def groups_of(body: bodies.Body, activation: str) -> list[list]:
    """Lists of (shape, seed, dtype) that are judged together."""
    if body.backend == "cuda":
        return [[((17, 70, 70), 0, dtype)] for dtype in (torch.float32, torch.float16)]
    if body.backend == "triton":  # at least three tiles of rows, features and slices of columns
        large = [(33, 70, 70), (3, 100, 161), (2, 1030, 33)] if activation == "gated" else []
        some = [[((17, 70, 70), 0, dtype)] for dtype in body.dtypes]
        return [*[[(shape, 0, torch.float32)] for shape in large], [(shape, 0, torch.float32) for shape in TINY], *some]
    shapes = SHAPES if body.isa and activation == "gated" else FEW_SHAPES
    return [[(shape, seed, torch.float32) for seed in seeds(shape[0] * shape[2] // 4)] for shape in shapes]


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.of_encode
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_are_as_near_to_float64_as_torchs(activation, body):
    """Of what is stored in 16 bits too: sums are in float32, and the support is that of float64 on the stored numbers."""
    for group in groups_of(body, activation):
        trials = Judge()
        for shape, seed, dtype in group:
            kwargs = arguments(make_inputs(*shape, seed=seed), activation)
            kwargs = {k: moved(v, "cpu", dtype) for k, v in kwargs.items()}
            code = body.run(ops.encode, **kwargs)
            assert code.u.dtype == code.values.dtype == dtype
            judge(code, kwargs, trials)
        trials.verdict()


def exact_size(body: bodies.Body) -> tuple[int, int, int]:
    return (17, 20, 34) if body.of_gpu else (257, 63, 100)


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.of_encode
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("slack", [0.0, 0.75])
def test_ties_are_not_members_and_slack_keeps_a_window_below_the_threshold_at_value_zero(slack, activation, body):
    few = [(3, 63, 31), (257, 63, 33), (257, 1, 33), (3, 63, 4099)] if slack == 0 and not body.of_gpu else []
    for shape in (*few, exact_size(body)):
        kwargs = exact_problem(*shape, activation)
        pi = kwargs["x"] @ kwargs["W_enc"].T + kwargs["bias"]
        if activation == "jumprelu" and shape[0] > 10 and shape[1] > 1:
            assert ((pi == kwargs["threshold"]) & (pi > 0)).any() and (kwargs["threshold"] < 0).any()
        else:
            assert (pi == 0).any(0).all() or activation == "jumprelu"
        code = body.run(ops.encode, **kwargs, slack=slack)
        assert_exact(code, kwargs | dict(slack=slack))
    assert not slack or (code.gates == 0).any()


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


@bodies.of_encode
def test_rows_may_be_empty_or_full(body):
    B, _, F = shape = (5, 20, 34) if body.of_gpu else (9, 63, 100)
    kwargs = exact_problem(*shape, "gated")
    kwargs["x"][4] = 0
    for bias, nnz in ((-1000.0, 0), (1000.0, B * F), (0.0, None)):
        kwargs["bias"] = torch.full((F,), bias)
        code = body.run(ops.encode, **kwargs)
        assert_exact(code, kwargs)
        assert code.nnz == nnz if nnz is not None else code.indptr[4] == code.indptr[5] and code.nnz > 0


@bodies.of_encode
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_rows_give_an_empty_code(activation, body):
    supports = [dict(precision=name) for name in ("exact", "fp32", "bf16")] if body.of_gpu else [
        dict(), *(dict(support=support, k=3) for support in ("topk", "batch_topk"))
    ]  # fmt: skip
    for support in supports:
        code = body.run(ops.encode, **exact_problem(0, 63, 33, activation), **support)
        assert_is_code(code)
        assert code.shape == (0, 33) and code.nnz == 0 and code.values.shape == (2 if activation == "gated" else 1, 0)


@bodies.of_encode
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_does_not_vanish(activation, body):
    """A NaN in x: every feature with NaN values.  An infinity: the features that it raises to infinity, and no other."""
    kwargs = exact_problem(5, 1, 40, activation)
    kwargs["W_enc"][:20], kwargs["W_enc"][20:] = 1, -1
    kwargs["x"][1], kwargs["x"][3] = float("nan"), float("inf")
    code = body.run(ops.encode, **kwargs)
    nan, inf = (slice(int(code.indptr[b]), int(code.indptr[b + 1])) for b in (1, 3))
    assert code.indices[nan].tolist() == list(range(40)) and code.indices[inf].tolist() == list(range(20))
    assert bool(code.u[nan].isnan().all()) and bool(code.values[:, nan].isnan().all()) and int(code.u.isnan().sum()) == 40
    assert bool((code.values[:, inf] == float("inf")).all())
    sound = [0, 2, 4]
    member, u, _ = plain(**double(kwargs | dict(x=kwargs["x"][sound])))
    assert torch.equal(code.u[code.u.isfinite()].double(), u[member])


@pytest.mark.parametrize("support", ["topk", "batch_topk"])
def test_a_nan_is_chosen_by_topk(support):
    kwargs = exact_problem(5, 63, 35, "relu")
    kwargs["x"][1, 7] = float("nan")
    code = ops.encode(**kwargs, support=support, k=4)
    assert bool(code.values.isnan().any())


# ---- topk and batch_topk ----------------------------------------------------------------------------------------------


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


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.of_encode
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strides_do_not_matter(activation, body):
    kwargs = exact_problem(*((3, 40, 33) if body.of_gpu else (57, 63, 100)), activation)
    apart = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert not apart["x"].is_contiguous() and not apart["bias"].is_contiguous()
    code = body.run(ops.encode, **kwargs)
    assert_same_bits(code, body.run(ops.encode, **apart))
    assert_same_bits(code, body.run(ops.encode, **apart | dict(W_enc=kwargs["W_enc"].T.contiguous().T)))


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.of_encode
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_repeats_bit_for_bit(activation, body, monkeypatch):
    """At every thread count, where the product itself is exact."""
    monkeypatch.setattr(cpu, "ROWS", 100)
    monkeypatch.setattr(cpu, "TILE", 100 * 256)
    kwargs = exact_problem(*((5, 20, 34) if body.of_gpu else (257, 63, 1000)), activation)
    assert_repeats(lambda: body.run(ops.encode, **kwargs), threads=() if body.of_gpu else (1, 2, 3, 7))
    rounded = arguments(make_inputs(*((5, 20, 34) if body.of_gpu else (257, 100, 100))), activation)
    assert_repeats(lambda: body.run(ops.encode, **rounded), threads=())


@pytest.mark.kernels
def test_encode_verifies_in_cuda_in_bf16_too_which_takes_the_scaled_copies(cuda_calls):
    pytest.importorskip("triton")
    cuda, kwargs = bodies.Body("cuda"), arguments(make_inputs(9, 63, 70, density=0.3), "relu")
    code = cuda.run(ops.encode, **kwargs, precision="bf16")
    assert cuda_calls == ["verify"]
    with use_backend("triton"):
        twin = cuda.run(ops.encode, **kwargs, precision="bf16")
    assert cuda_calls == ["verify"]
    assert_same_bits([twin.indptr, twin.indices], [code.indptr, code.indices])
    torch.testing.assert_close(code.u, twin.u, rtol=1e-5, atol=1e-6)


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
