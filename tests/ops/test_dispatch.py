"""Which body of an op runs, and why; and the checks that the ops share."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import assert_same_bits, make_inputs, op_module, randn, random_code

import sae_fast
from sae_fast import ops, use_backend
from sae_fast.code import RowGradient
from sae_fast.ops import checks, crossovers, dispatch

CODE = random_code(9, 33)
CSC = ops.transpose(CODE)


def state(dtype=torch.float32):
    return randn(33, 5, dtype=dtype), torch.ones(33, 5, dtype=dtype), torch.zeros(33, dtype=torch.int64)


def gradient(dtype=torch.float32) -> RowGradient:
    return RowGradient(CSC, [CODE.magnitudes.to(dtype)], [randn(9, 5, dtype=dtype)])


ADAM = dict(step=1, lr=0.1, beta2=0.9, eps=1e-3)
# Every op, with arguments in any dtype.
CALLS = {
    "encode": lambda t: ops.encode(randn(9, 5, dtype=t), randn(33, 5, dtype=t), randn(33, dtype=t), activation="relu"),
    "decode": lambda t: ops.decode(CODE, randn(33, 5, dtype=t), CODE.magnitudes.to(t)),
    "sampled_dots": lambda t: ops.sampled_dots(CODE, randn(9, 5, dtype=t), randn(33, 5, dtype=t)),
    "decode_loss": lambda t: ops.decode_loss(CODE.with_values(CODE.values.to(t)), randn(33, 5, dtype=t), randn(5, dtype=t),
                                             randn(9, 5, dtype=t), randn(33, dtype=t), 9.0),
    "transpose": lambda t: ops.transpose(CODE),
    "outer": lambda t: ops.outer(CSC, gradient(t).values, gradient(t).A),
    "weight_step": lambda t: ops.weight_step(*state(t), gradient(t), **ADAM),
    "row_step": lambda t: ops.row_step(*state(t), randn(33, 5, dtype=t), **ADAM),
    "grad_sqnorm": lambda t: ops.grad_sqnorm(gradient(t), randn(33, 5, dtype=t)),
}  # fmt: skip
BODIES = {op: ("weight_step", "_cpu_rows", "_reference_rows") if op == "row_step" else (op, "_cpu", "_reference")
          for op in CALLS}  # fmt: skip


def body_taken(op: str, monkeypatch, dtype=torch.float32) -> str:
    """Calls an op and says which of its bodies ran first."""
    taken = []
    module_name, *names = BODIES[op]
    module = op_module(module_name)
    for name, function in ((n, getattr(module, n)) for n in names):

        def spy(*args, _name=name, _function=function):
            taken.append(_name)
            return _function(*args)

        monkeypatch.setattr(module, name, spy)
    CALLS[op](dtype)
    return "cpu" if taken[0].startswith("_cpu") else "reference"


@pytest.mark.parametrize("op", CALLS)
def test_float32_on_the_cpu_takes_the_engine(op, monkeypatch):
    assert body_taken(op, monkeypatch) == "cpu"


@pytest.mark.parametrize("op", [op for op in CALLS if op != "transpose"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_other_dtype_takes_the_reference(op, dtype, monkeypatch):
    assert body_taken(op, monkeypatch, dtype) == "reference"


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_use_backend_forces_a_body(backend, op, monkeypatch):
    with use_backend(backend):
        assert body_taken(op, monkeypatch) == backend


@pytest.mark.parametrize("op", CALLS)
def test_an_unbuilt_engine_leaves_the_reference(op, monkeypatch):
    monkeypatch.setattr(dispatch, "_C", None)
    assert body_taken(op, monkeypatch) == "reference"
    with use_backend("cpu"), pytest.raises(ValueError, match="_C is not built"):
        CALLS[op](torch.float32)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_body_that_an_op_lacks_or_that_wants_a_gpu_cannot_be_forced_on_the_cpu(backend, op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # whose interpreter would take these tensors
    reason = "it has the bodies .*'cpu', 'triton', 'reference'|a tensor is on cpu|the extension .* is not built"
    with use_backend(backend), pytest.raises(ValueError, match=rf"use_backend\('{backend}'\): {op} .* there: ({reason})"):
        CALLS[op](torch.float32)


def test_a_forced_body_that_cannot_take_the_arguments_says_why():
    with use_backend("cpu"), pytest.raises(ValueError, match=r"decode cannot run there: .*float64.*float32"):
        CALLS["decode"](torch.float64)
    with use_backend("cpu"), pytest.raises(ValueError, match=r"encode cannot run there: .*float64.*float32"):
        CALLS["encode"](torch.float64)


def test_use_backend_nests_and_ends_with_its_block(monkeypatch):
    with use_backend("reference"):
        with use_backend("cpu"):
            assert body_taken("decode", monkeypatch) == "cpu"
        assert body_taken("decode", monkeypatch) == "reference"
    assert body_taken("decode", monkeypatch) == "cpu"


def test_use_backend_ends_with_an_exception_too(monkeypatch):
    with pytest.raises(RuntimeError, match="from inside"), use_backend("reference"):
        raise RuntimeError("from inside")
    assert body_taken("decode", monkeypatch) == "cpu"


def test_an_unknown_backend_is_a_value_error_that_lists_them():
    with (
        pytest.raises(ValueError, match=r"name: got 'gpu', want one of .*reference.*cpu.*triton.*cuda"),
        use_backend("gpu"),
    ):
        pass
    assert sae_fast.use_backend is use_backend


def test_backward_passes_run_on_the_forced_body_as_well(monkeypatch):
    """Autograd's threads see the choice."""
    engine = op_module("outer")
    monkeypatch.setattr(engine, "_cpu", lambda *a: pytest.fail("the engine ran"))
    W = randn(33, 5).requires_grad_()
    with use_backend("reference"):
        ops.decode(CODE, W).sum().backward()
    assert W.grad is not None


def test_a_rejection_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.DEBUG, logger="sae_fast"):
        CALLS["decode"](torch.float64)
        CALLS["decode"](torch.float64)
        CALLS["sampled_dots"](torch.float64)
    messages = [record.getMessage() for record in caplog.records]
    assert [m.split(": ")[:2] for m in messages] == [
        ["decode", "not cpu"], ["decode", "not triton"], ["sampled_dots", "not cpu"], ["sampled_dots", "not triton"],
    ]  # fmt: skip
    assert "float64" in messages[0] and "a tensor is on cpu" in messages[1]


def test_no_body_at_all_is_an_error_with_every_reason():
    with pytest.raises(RuntimeError, match=r"nothing: no body can take these arguments: .*too big"):
        dispatch.pick("nothing", {"cpu": lambda: None}, {"cpu": "too big"})


# ---- The density switch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode", "sampled_dots", "decode_loss", "outer", "weight_step", "grad_sqnorm"])
def test_the_route_follows_the_density_of_the_code(op, monkeypatch):
    """nnz / (B·F) on either side of the op's crossover, and no clock: the same arguments take the same route."""
    key = "weight_step" if op == "grad_sqnorm" else op
    density, decide = CODE.nnz / (9 * 33), crossovers.is_dense
    for crossover, dense in ((1.001 * density, False), (0.999 * density, True)):
        decisions = []

        def spy(*args, _decisions=decisions):
            _decisions.append((args[0], decide(*args)))
            return _decisions[-1][1]

        monkeypatch.setattr(crossovers, "is_dense", spy)
        monkeypatch.setitem(crossovers.CROSSOVER, key, crossover)
        CALLS[op](torch.float32)
        assert decisions[0] == (key, dense)


@pytest.mark.parametrize("n, width, chunk, expected", [
    (10, 4, 12, [(0, 3), (3, 6), (6, 9), (9, 10)]),
    (10, 4, 1000, [(0, 10)]),
    (3, 100, 10, [(0, 1), (1, 2), (2, 3)]),
    (0, 4, 12, []),
    (2, 0, 12, [(0, 2)]),
])  # fmt: skip
def test_chunks_cover_every_row_once_and_stay_small(n, width, chunk, expected, monkeypatch):
    monkeypatch.setattr(crossovers, "CHUNK", chunk)
    assert list(crossovers.chunks(n, width)) == expected


def test_dense_helpers_agree_with_the_code():
    f = crossovers.to_dense(CODE.indptr, CODE.indices, CODE.magnitudes, 33)
    assert_same_bits(f, CODE.to_dense())
    counts = CODE.indptr.diff().tolist()
    assert CODE.row_ids().tolist() == [row for row, count in enumerate(counts) for _ in range(count)]


# ---- Checks ----------------------------------------------------------------------------------------------------------


def test_a_finite_check_names_the_first_bad_index():
    x = randn(4, 5)
    checks.finite("x", x)
    x[3, 0], x[2, 4] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match=r"x: got -inf at index \(2, 4\) of shape \(4, 5\), want finite values"):
        checks.finite("x", x)


def test_a_tensor_on_another_device_is_a_value_error_that_names_both():
    with pytest.raises(ValueError, match="b: got a tensor on meta, want cpu, the device of W"):
        checks.floating("b", torch.zeros(3, device="meta"), torch.zeros(3), "W")


def test_fresh_memory_is_poisoned_inside_an_op_too():
    """What conftest.py promises to every other test: an element that no kernel wrote is a NaN, or the largest integer."""

    @torch.library.custom_op("sae_fast_tests::fresh", mutates_args=())
    def fresh(like: torch.Tensor) -> list[torch.Tensor]:
        return [torch.empty(1000), like.new_empty(1000), torch.empty_like(like), torch.empty(1000, dtype=torch.int64)]

    *floats, integers = fresh(torch.zeros(1000))
    assert all(bool(t.isnan().all()) for t in floats)
    assert bool((integers == torch.iinfo(torch.int64).max).all())


def test_the_bodies_agree_bit_for_bit_where_arithmetic_is_exact():
    p = make_inputs(57, 63, 33)
    kwargs = dict(activation="relu")
    x, W = p.x.mul(4).round().div(4), p.W_enc.mul(64).round().div(64)
    results = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            results.append(ops.encode(x, W, torch.full((33,), -0.5), **kwargs))
    assert results[0].nnz > 0
    assert_same_bits(*results)


def test_autocast_does_not_reach_into_an_op(monkeypatch):
    code, A, W = random_code(9, 33), randn(9, 5), randn(33, 5)
    for route in (0, 2):
        monkeypatch.setitem(crossovers.CROSSOVER, "sampled_dots", route)
        plain = ops.sampled_dots(code, A, W)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.sampled_dots(code, A, W), plain)


def test_autocast_does_not_change_a_training_step():
    x = randn(64, 8)
    steps = []
    for enabled in (False, True):
        sae = sae_fast.GatedSAE(8, 32, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sae_fast.Trainer(sae, l1_coefficient=1.0, init_l0=4).step(x)
        steps.append(torch.cat([p.detach().flatten() for p in sae.parameters()]))
    assert torch.equal(*steps)
