"""What is kept of W_enc between encodings: shadows, who updates them, ``sae.frozen()``, and the Trainer's own.

A shadow that is out of date shows: under the forced screen, the members that it does not know of go missing.
"""

from __future__ import annotations

import copy
import io
import warnings
from functools import cache

import pytest
import torch
from helpers import Judge, assert_repeats, assert_same_bits, code_of, dense, opcheck, randn, random_code, same_bits, strided
from problems.screen import LAYERS
from torch import Tensor
from ways import forced

import sae_fast as sf
from sae_fast import ops, use_backend
from sae_fast.code import RowGradient, Shadow, SparseCode
from sae_fast.ops import crossovers
from sae_fast.ops.encode import shadow as shadowing
from sae_fast.optim import RowAdam

pytestmark = pytest.mark.usefixtures("screened")
ADAM = dict(step=3, lr=0.5, beta2=0.99, eps=1e-3)


def assert_up_to_date(shadow: Shadow | None, W: Tensor) -> None:
    assert shadow is not None
    assert_same_bits(list(shadow), list(ops.make_shadow(W)))


# ---- Shadows ----------------------------------------------------------------------------------------------------------


def test_a_shadow_is_of_the_values_whatever_holds_them(isa):
    W = randn(40, 33)
    shadow = ops.make_shadow(W)
    assert shadow.rows.shape == (40, 33) and shadow.norms.shape == (40, 2)
    for same in (torch.nn.Parameter(W), strided(W), W.T.contiguous().T):
        assert_same_bits(list(shadow), list(ops.make_shadow(same)))
    assert_repeats(lambda: list(ops.make_shadow(W)))


def test_refresh_brings_a_shadow_up_to_date_in_place(isa):
    W, shadow = randn(40, 33), ops.make_shadow(randn(40, 33, seed=1))
    rows, norms = shadow
    ops.refresh_shadow(W, shadow)
    assert shadow.rows is rows and shadow.norms is norms
    assert_up_to_date(shadow, W)


@pytest.mark.parametrize("size", [2.0, 1 + 2.0**-10], ids=["far", "within a rounding"])
def test_stale_rows_counts_the_rows_whose_bound_no_longer_holds(size, isa):
    """A weight that stays within the rounding of its shadow is further from it than the shadow's norms say."""
    W = randn(100, 33).bfloat16().float()
    shadow = ops.make_shadow(W)
    assert ops.stale_rows(W, shadow, 0, 100) == 0
    for row in (0, 50, 99):
        W[row, row % 33] *= size
    for threads in (1, 3):
        torch.set_num_threads(threads)
        counts = [ops.stale_rows(W, shadow, a, b) for a, b in ((0, 100), (0, 50), (50, 51), (51, 99), (99, 100), (7, 7))]
        assert counts == [3, 1, 1, 0, 1, 0]


SOUND = ops.make_shadow(randn(8, 5))
BAD = {
    "rows of another width": (lambda s: Shadow(s.rows[:, :4].contiguous(), s.norms), r"shadow\.rows: got shape \(8, 4\)"),
    "too few rows": (lambda s: Shadow(s.rows[:7], s.norms), r"shadow\.rows: got shape \(7, 5\)"),
    "rows in float32": (
        lambda s: Shadow(s.rows.float(), s.norms),
        r"shadow\.rows: got torch\.float32, want torch\.bfloat16",
    ),
    "rows apart": (lambda s: Shadow(s.rows.T.contiguous().T, s.norms), r"shadow\.rows: got strides"),
    "one norm": (lambda s: Shadow(s.rows, s.norms[:, :1]), r"shadow\.norms: got shape \(8, 1\)"),
    "too few norms": (lambda s: Shadow(s.rows, s.norms[:7]), r"shadow\.norms: got shape \(7, 2\)"),
    "norms in float32": (lambda s: Shadow(s.rows, s.norms.float()), r"shadow\.norms: got torch\.float32"),
    "norms apart": (lambda s: Shadow(s.rows, s.norms.T.contiguous().T), r"shadow\.norms: got strides"),
    "no norms": (lambda s: Shadow(s.rows, None), "shadow: got one of rows and norms"),
    "no rows": (lambda s: Shadow(None, s.norms), "shadow: got one of rows and norms"),
}


@pytest.mark.parametrize("op", ["encode", "weight_step", "row_step"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_shadow_is_a_value_error_that_names_it(case, op):
    make, message = BAD[case]
    W, shadow, code = randn(8, 5), make(SOUND), random_code(3, 8, 1)
    state = W, torch.ones(8, 5), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        if op == "encode":
            ops.encode(randn(3, 5), W, torch.zeros(8), activation="relu", shadow=shadow)
        elif op == "weight_step":
            gradient = RowGradient(ops.transpose(code), list(code.values), [randn(3, 5)])
            ops.weight_step(*state, gradient, shadow=shadow, **ADAM)
        else:
            ops.row_step(*state, randn(8, 5), shadow=shadow, **ADAM)
    assert same_bits(W, randn(8, 5)) and int(state[2].sum()) == 0


def test_a_shadow_of_a_weight_in_float64_is_a_value_error():
    with pytest.raises(ValueError, match=r"shadow: got a weight in torch\.float64"):
        ops.encode(randn(3, 5).double(), randn(8, 5).double(), torch.zeros(8).double(), activation="relu", shadow=SOUND)


@pytest.mark.parametrize("W", [randn(8, 6).double(), randn(8, 6).int(), randn(8, 6)[0]], ids=["float64", "int32", "vector"])
def test_only_a_weight_in_float32_has_a_shadow(W):
    """The engine would read its bits as float32's, or memory that is not there."""
    with pytest.raises(ValueError, match="W: got"):
        ops.make_shadow(W)


def test_a_shadow_of_another_shape_is_not_refreshed():
    big = ops.make_shadow(randn(8, 5))
    part = Shadow(big.rows[:4], big.norms[:4])  # what would be written past its end is ours
    with pytest.raises(ValueError, match="shadow"):
        ops.refresh_shadow(randn(8, 5, seed=1), part)
    with pytest.raises(ValueError, match="shadow"):
        ops.stale_rows(randn(8, 5, seed=1), part, 0, 8)


# ---- The steps that keep one ------------------------------------------------------------------------------------------

HEIGHT, LONG = 5000, 12  # rows; features of which some have more entries than the engine sums in a run (2048)


@cache
def long_code() -> SparseCode:
    g = torch.Generator().manual_seed(0)
    member = torch.rand(HEIGHT, LONG, generator=g) < 0.05
    member[:, 0] = member[:, 7] = True
    for feature, entries in ((1, 2047), (2, 2048), (3, 2049), (4, 4096), (5, 4097), (6, 0)):
        member[:, feature] = torch.arange(HEIGHT) < entries
    return code_of(member, 2, g)


def state_of(n: int, d: int, unit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    W = randn(n, d)
    v = randn(n, d, seed=1).square() + 0.1
    return torch.nn.functional.normalize(W, dim=1) if unit else W, v, torch.arange(n) % 3


def gradient_of(code: SparseCode, d: int) -> RowGradient:
    A = [randn(code.batch, d, seed=seed) for seed in range(code.values.shape[0])]
    return RowGradient(ops.transpose(code), list(code.values - 0.3), A)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize(
    "code", [random_code(57, 1000, 2), random_code(257, 33, 1), long_code()], ids=lambda c: str(c.shape)
)
def test_weight_step_keeps_a_shadow_and_steps_as_without_one(code, unit_rows, route, isa, monkeypatch):
    monkeypatch.setattr(crossovers, "CHUNK", 60_000)  # several blocks in the dense route
    gradient, alone, kept = gradient_of(code, 40), state_of(code.d_sae, 40, unit_rows), state_of(code.d_sae, 40, unit_rows)
    shadow, before = ops.make_shadow(kept[0]), ops.make_shadow(kept[0])
    ops.weight_step(*alone, gradient, unit_rows=unit_rows, **ADAM)
    ops.weight_step(*kept, gradient, unit_rows=unit_rows, shadow=shadow, **ADAM)
    assert_same_bits(alone, kept)
    assert_up_to_date(shadow, kept[0])
    touched = torch.bincount(code.indices.long(), minlength=code.d_sae) > 0
    assert bool((shadow.norms != before.norms).any(1)[touched].all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("first, last", [(0, 33), (10, 20)])
def test_ranges_skips_and_dense_gradients_keep_a_shadow(first, last, backend, isa):
    code = random_code(57, 33, 1)
    whole = state_of(33, 40)
    W, v, last_step = (t[first:last] for t in whole)
    shadow = ops.make_shadow(W)
    with use_backend(backend):
        ops.weight_step(W, v, last_step, gradient_of(code, 40), first_feature=first, shadow=shadow, **ADAM)
        assert_up_to_date(shadow, W)
        adam = ADAM | dict(step=4)
        before = W.clone()
        ops.row_step(W, v, last_step, randn(last - first, 40), skip=torch.tensor(True), shadow=shadow, **adam)
        assert same_bits(W, before)
        assert_up_to_date(shadow, W)
        ops.row_step(W, v, last_step, randn(last - first, 40), unit_rows=True, shadow=shadow, **adam)
    assert not same_bits(W, before)
    assert_up_to_date(shadow, W)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck_with_a_shadow(backend):
    """The schema says that the shadow is written to, and by which ops."""
    code, adam = random_code(9, 33, 1), (3, 0.1, 0.0, 0.99, 1e-8, False, None, None)
    gradient = gradient_of(code, 5)
    csc, (W, v, last_step) = gradient.csc, state_of(33, 5)
    entries = (csc.colptr, csc.rows, csc.perm, gradient.values, gradient.A, None, 0)
    op = torch.ops.sae_fast
    with use_backend(backend):
        opcheck(op.weight_step.default, (W, v, last_step, None, *entries, *adam, *ops.make_shadow(W)))
        opcheck(op.row_step.default, (W, v, last_step * 0, None, randn(33, 5), *adam, *ops.make_shadow(W)))
        arguments = (randn(9, 5), W, randn(33), None, None, "relu", "threshold", 0, 0.0, "exact", *ops.make_shadow(W))
        opcheck(op.encode.default, arguments, ["test_schema", "test_autograd_registration", "test_faketensor"])


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.99)], ids=str)
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("given", ["rows", "grad"])
def test_row_adam_keeps_a_shadow_from_its_first_step(given, unit_rows, betas):
    """Also of idle rows, which the first step of ``unit_rows`` brings to unit norm."""
    p = torch.nn.Parameter(3 * randn(500, 40))
    optimizer, shadow = RowAdam([p], lr=0.1, betas=betas, unit_rows=unit_rows), ops.make_shadow(p)
    for i in range(3):
        gradient = gradient_of(random_code(9, 500, 1, density=0.02, seed=i), 40)
        if given == "rows":
            optimizer.step(rows={p: gradient}, shadows={p: shadow})
        else:
            p.grad = ops.outer(gradient.csc, gradient.values, gradient.A)
            optimizer.step(shadows={p: shadow})
        assert_up_to_date(shadow, p)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_long_features_are_as_near_to_float64_as_torchs_and_the_same_at_any_thread_count(unit_rows, isa, monkeypatch):
    """Features of more entries than one run are summed in shared runs."""
    monkeypatch.setitem(crossovers.CROSSOVER, "weight_step", 2.0)
    monkeypatch.setitem(crossovers.CROSSOVER, "outer", 2.0)
    code, d = long_code(), 33
    gradient = gradient_of(code, d)

    def run():
        state, shadow = state_of(LONG, d, unit_rows), ops.make_shadow(state_of(LONG, d, unit_rows)[0])
        ops.weight_step(*state, gradient, unit_rows=unit_rows, shadow=shadow, **ADAM)
        norms = ops.grad_sqnorm(gradient, state_of(LONG, d)[0])
        return [*state, *shadow, ops.outer(gradient.csc, gradient.values, gradient.A), norms]

    assert_repeats(run, threads=(1, 2, 3, 5))
    W, v, _, _, _, grad, norm2 = run()
    matrices = [dense(code, value) for value in gradient.values]
    csc, bag = gradient.csc, torch.nn.functional.embedding_bag  # torch's own sum of chosen rows: a product adds in blocks
    bags = [
        bag(csc.rows.long(), a, csc.colptr[:-1], mode="sum", per_sample_weights=value[csc.perm])
        for value, a in zip(gradient.values, gradient.A, strict=True)
    ]
    own = sum(bags)
    exact = sum(m.double().T @ a.double() for m, a in zip(matrices, gradient.A, strict=True))
    judge = Judge()
    judge.add("gradient", grad, own, exact)
    (W0, v0, last), long = state_of(LONG, d, unit_rows), [0, 3, 4, 5, 7]
    judge.add("gradient of long features", grad[long], own[long], exact[long])
    steps = []
    for g in (own, exact):
        start, touched = W0.to(g.dtype), torch.arange(LONG) != 6
        if unit_rows:
            g = ops.project_rows(g, start)
        second = v0.to(g.dtype) * (0.99 ** (3 - last).to(g.dtype))[:, None] + 0.01 * g * g
        stepped = start - 0.5 * g / ((second / (1 - 0.99**3)).sqrt() + 1e-3)
        if unit_rows:
            stepped = torch.nn.functional.normalize(stepped, dim=1)
        steps.append((torch.where(touched[:, None], stepped, start), torch.where(touched[:, None], second, v0.to(g.dtype))))
    judge.add("W", W, steps[0][0], steps[1][0])
    judge.add("v", v, steps[0][1], steps[1][1])
    judge.verdict()
    assert float(norm2) == pytest.approx(float(exact.square().sum()), rel=1e-5)


# ---- frozen -----------------------------------------------------------------------------------------------------------


def make(layer=sf.GatedSAE, d: int = 24, F: int = 300, seed: int = 0):
    sae = layer(d, F, seed=seed)
    sae.calibrate_(randn(256, d, seed=seed), F / 25)
    return sae


X = randn(100, 24, seed=9)


def fresh(sae, x: Tensor = X) -> SparseCode:
    """By nothing kept: a copy, whose every entry is dotted."""
    with forced("dots"):
        other = type(sae)(sae.d_in, sae.d_sae)
        other.load_state_dict({name: t.clone() for name, t in sae.state_dict().items()})
        return other.encode_sparse(x)


@pytest.fixture
def made(monkeypatch) -> list:
    """Every shadow that was made, on the way to being kept."""
    shadows, make_shadow = [], shadowing.make_shadow

    def recorded(W):
        shadows.append(make_shadow(W))
        return shadows[-1]

    monkeypatch.setattr(shadowing, "make_shadow", recorded)
    return shadows


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_makes_one_shadow_and_changes_no_bit(layer, made):
    sae = make(layer)
    plain = sae.encode_sparse(X)
    made.clear()
    with sae.frozen(), forced("screen"):
        for x in (X, X[:7], X.bfloat16()):
            code = sae.encode_sparse(x)
            if x is X:
                assert_same_bits(plain, code)
            assert_same_bits(fresh(sae, x), code)
        assert len(made) == 1 and code.nnz > 0
        code.values.sum().backward()
        assert sae.W_enc.grad is not None and sae.W_enc.grad.any()
    with forced("screen"):
        assert_same_bits(plain, sae.encode_sparse(X))
    assert not any("frozen" in name or "shadow" in name for name in sae.state_dict())


def assign(sae, W: Tensor) -> None:
    for value in (W.clone(), W.clone()):
        sae.W_enc = torch.nn.Parameter(value)


def delete_and_assign(sae, W: Tensor) -> None:
    del sae.W_enc
    sae.W_enc = torch.nn.Parameter(W.clone())


def assign_data(sae, W: Tensor) -> None:
    for value in (W.clone(), W.clone()):
        sae.W_enc.data = value


def move_there_and_back(sae, W: Tensor) -> None:
    sae.double()
    sae.W_enc.data.copy_(W)
    sae.float()


def load(sae, W: Tensor) -> None:
    sae.load_state_dict(sae.state_dict() | {"W_enc": W})


def load_assigning(sae, W: Tensor) -> None:
    sae.load_state_dict(sae.state_dict() | {"W_enc": W.clone()}, assign=True)


def in_place(sae, W: Tensor) -> None:
    with torch.no_grad():
        sae.W_enc.copy_(W)


def one_element(sae, W: Tensor) -> None:
    with torch.no_grad():
        sae.W_enc[5, 3] += 100


NOTICED = [assign, delete_and_assign, assign_data, move_there_and_back, load, load_assigning, in_place, one_element]


@pytest.mark.parametrize("change", NOTICED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("d, F", [(24, 300), (64, 512)])
def test_frozen_notices_a_change(change, d, F):
    """Time and again: an address may be given out a second time."""
    sae, x = make(d=d, F=F), randn(100, d, seed=9)
    with torch.no_grad(), sae.frozen(), forced("screen"):
        sae.encode_sparse(x)
        for i in range(12):
            change(sae, randn(F, d, seed=i))
            assert_same_bits(fresh(sae, x), sae.encode_sparse(x))


def test_frozen_notices_a_change_of_an_inference_tensor():
    """Torch counts no changes of these."""
    with torch.inference_mode():
        sae = make()
        with sae.frozen(), forced("screen"):
            sae.encode_sparse(X)
            for i in range(3):
                in_place(sae, randn(300, 24, seed=i))
                assert_same_bits(fresh(sae), sae.encode_sparse(X))


def test_frozen_nests_and_ends_with_its_block(made):
    sae = make()
    with forced("screen"):
        with sae.frozen():
            sae.encode_sparse(X)
            with sae.frozen():
                sae.encode_sparse(X)
                in_place(sae, randn(300, 24, seed=4))
                assert_same_bits(fresh(sae), sae.encode_sparse(X))
            assert_same_bits(fresh(sae), sae.encode_sparse(X))
            with pytest.raises(KeyError), sae.frozen():
                raise KeyError
            count = len(made)
            assert_same_bits(fresh(sae), sae.encode_sparse(X))
            assert len(made) == count, "the outer block's is in force again"
        sae.W_enc.data.copy_(randn(300, 24, seed=5))  # unnoticed in a block: after it, nothing is kept
        assert_same_bits(fresh(sae), sae.encode_sparse(X))


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_made_in_a_frozen_block_is_a_layer_of_its_own(way):
    """It has the same bits, and is frozen no longer than it is asked to be."""
    sae = make()
    with torch.no_grad(), sae.frozen(), forced("screen"):
        code = sae.encode_sparse(X)
        if way == "deepcopy":
            other = copy.deepcopy(sae)
        else:
            file = io.BytesIO()
            torch.save(sae, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert_same_bits(code, other.encode_sparse(X))
        in_place(other, randn(300, 24, seed=5))
        assert_same_bits(code, sae.encode_sparse(X))
    with forced("screen"):
        for i in range(3):
            other.W_enc.data.copy_(randn(300, 24, seed=i))
            assert_same_bits(fresh(other), other.encode_sparse(X))


def test_a_layer_in_float64_or_fp32_precision_may_be_frozen(made):
    for sae in (make().double(), make()):
        if sae.W_enc.dtype == torch.float32:
            sae.precision = "fp32"
        plain = sae.encode_sparse(X)
        with sae.frozen():
            assert_same_bits(plain, sae.encode_sparse(X))


def test_steps_in_a_frozen_block_are_noticed():
    sae = make()
    trainer = sf.Trainer(sae, lr=0.05, l1_coefficient=0.1)
    with sae.frozen(), forced("screen"):
        for seed in range(3):
            assert_same_bits(fresh(sae), sae.encode_sparse(X))
            trainer.step(randn(100, 24, seed=seed))


# ---- The Trainer's ----------------------------------------------------------------------------------------------------


def trainer_of(layer=sf.GatedSAE, F: int = 300, **settings) -> sf.Trainer:
    return sf.Trainer(make(layer, F=F), **dict(lr=0.03, l1_coefficient=0.1) | settings)


def batch(i: int) -> Tensor:
    return randn(90, 24, seed=100 + i)


def everything(trainer: sf.Trainer) -> list[Tensor]:
    out = [p.detach() for p in trainer.sae.parameters()]
    for p in trainer.sae.parameters():
        state = trainer.optimizer.state.get(p, {})
        out += [torch.as_tensor(state[key]) for key in sorted(state)]
    return out


@pytest.mark.parametrize("dialect", ["paper", "saelens"])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)], ids=str)
@pytest.mark.parametrize("layer", [sf.GatedSAE, sf.ReluSAE])
def test_training_by_a_kept_shadow_has_the_bits_of_the_dots(layer, betas, dialect, route):
    screening, dotting = (trainer_of(layer, betas=betas, dialect=dialect, grad_clip=50.0) for _ in range(2))
    for i in range(20):
        with forced("screen"):
            log = screening.step(batch(i))
        with forced("dots"):
            other = dotting.step(batch(i))
        assert_same_bits([log.losses, log.result.code], [other.losses, other.result.code])
        assert_up_to_date(screening.state.kept.shadow, screening.sae.W_enc)
    assert_same_bits(everything(screening), everything(dotting))


def test_the_shadow_is_made_once_and_none_for_fp32(made, recwarn):
    trainer = trainer_of()
    for i in range(18):
        trainer.step(batch(i))
    assert len(made) == 1
    fp32 = trainer_of()
    fp32.sae.precision = "fp32"
    fp32.step(batch(0))
    fp32.sae.double()
    assert fp32._host._shadow() is None and len(made) == 1
    assert not recwarn.list


def test_steps_without_a_shadow_leave_none_behind(recwarn):
    """The precision may change between steps: a shadow from before is not taken for one of now."""
    trainer = trainer_of()
    with forced("screen"):
        for i, precision in enumerate(("exact", "fp32", "bf16", "fp32", "exact", "exact")):
            trainer.sae.precision = precision
            trainer.step(batch(i))
            if precision != "fp32":
                assert_up_to_date(trainer.state.kept.shadow, trainer.sae.W_enc)
    assert not recwarn.list, "nothing was changed behind its back"


def fused_adam(sae, W: Tensor) -> None:
    sae.W_enc.grad = W.clone()
    torch.optim.Adam([sae.W_enc], lr=0.2, fused=True).step()
    sae.W_enc.grad = None


def data_copy(sae, W: Tensor) -> None:
    sae.W_enc.data.copy_(W)


def numpy_write(sae, W: Tensor) -> None:
    sae.W_enc.detach().numpy()[:] = W.numpy()


def numpy_nudge(sae, W: Tensor) -> None:
    sae.W_enc.detach().numpy()[:] *= 1.01


CHANGES = [fused_adam, data_copy, numpy_write, numpy_nudge, assign_data, load, in_place, move_there_and_back, one_element]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [1, 9])
def test_a_change_of_all_rows_behind_the_trainers_back_is_noticed(change, steps):
    """At once, in silence or with a warning: the bits are those of a Trainer that was told."""
    trainer, told = trainer_of(), trainer_of()
    with forced("screen"):
        for i in range(20):
            if i in (steps, steps + 7):
                for t in (trainer, told):
                    change(t.sae, randn(300, 24, seed=i))
                told.state.kept = ops.KeptShadow()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "step .*: W_enc has been changed")
                trainer.step(batch(i))
            told.step(batch(i))
            assert_same_bits(everything(trainer), everything(told))


@pytest.mark.parametrize("change, warns", [(data_copy, True), (numpy_write, True), (in_place, False), (load, False)])
def test_a_change_that_torch_does_not_count_warns_with_the_step(change, warns, recwarn):
    trainer = trainer_of()
    with forced("screen"):
        for i in range(5):
            trainer.step(batch(i))
        assert not recwarn.list
        change(trainer.sae, randn(300, 24, seed=7))
        for i in range(5, 25):
            trainer.step(batch(i))
    messages = [str(w.message) for w in recwarn.list]
    assert len(messages) == int(warns) and all(m.startswith("step 5: W_enc has been changed") for m in messages)


@pytest.mark.parametrize("size", [2.0, 1 + 2.0**-10], ids=["far", "within a rounding"])
@pytest.mark.parametrize("F", [300, 16, 5])
def test_a_change_of_one_row_is_noticed_within_16_steps(F, size, monkeypatch):
    """Of a row that no step touches, which would refresh it."""
    for op in crossovers.CROSSOVER:
        monkeypatch.setitem(crossovers.CROSSOVER, op, float("inf"))
    for row in (0, F // 2, F - 1):
        trainer = trainer_of(F=F)
        with torch.no_grad():
            trainer.sae.b_gate[row] = -1000
            trainer.sae.W_enc.copy_(trainer.sae.W_enc.bfloat16())
        with forced("screen"):
            for i in range(3):
                trainer.step(batch(i))
            trainer.sae.W_enc.data[row] *= size
            assert ops.stale_rows(trainer.sae.W_enc, trainer.state.kept.shadow, row, row + 1) == 1
            with pytest.warns(UserWarning, match="W_enc has been changed"):
                for i in range(16):
                    trainer.step(batch(i))
        assert_up_to_date(trainer.state.kept.shadow, trainer.sae.W_enc)


@pytest.mark.parametrize("what", ["trainer", "sae"])
def test_copies_go_their_own_way(what):
    """A deep copy between steps trains on with the same bits, and neither changes the other."""
    trainer, told = trainer_of(), trainer_of()
    with forced("screen"):
        for i in range(4):
            trainer.step(batch(i))
            told.step(batch(i))
        if what == "trainer":
            other = copy.deepcopy(trainer)
        else:
            before = copy.deepcopy(trainer.sae)
            for x in (X, batch(9)):
                assert_same_bits(before.encode_sparse(x), fresh(before, x))
        for i in range(4, 24):
            trainer.step(batch(i))
            told.step(batch(i))
            if what == "trainer":
                other.step(batch(i))
                assert_up_to_date(other.state.kept.shadow, other.sae.W_enc)
        assert_same_bits(everything(trainer), everything(told))
        if what == "trainer":
            assert_same_bits(everything(other), everything(told))
            assert other.state.kept.shadow is not trainer.state.kept.shadow


def test_a_resumed_trainer_makes_its_own(tmp_path):
    trainer = trainer_of()
    with forced("screen"):
        for i in range(4):
            trainer.step(batch(i))
        trainer.save(tmp_path / "saved")
        other = sf.Trainer.load(tmp_path / "saved")
        for i in range(4, 8):
            trainer.step(batch(i))
            other.step(batch(i))
    assert_same_bits(everything(trainer), everything(other))


def test_a_step_that_fails_leaves_the_shadow_sound():
    trainer = trainer_of(init_l0=8)
    with forced("screen"):
        for bad in (torch.full((90, 24), 1e30), torch.full((90, 24), float("nan"))):
            with pytest.raises((FloatingPointError, ValueError)):
                trainer.step(bad)
        for i in range(4):
            trainer.step(batch(i))
            assert_up_to_date(trainer.state.kept.shadow, trainer.sae.W_enc)
        with pytest.raises(FloatingPointError):
            trainer.step(torch.full((90, 24), 1e30))
        assert_up_to_date(trainer.state.kept.shadow, trainer.sae.W_enc)
        trainer.step(batch(5))
    assert_up_to_date(trainer.state.kept.shadow, trainer.sae.W_enc)
