"""Every layer as a citizen of PyTorch: it compiles, copies, casts, hooks, checkpoints, distributes and differentiates as
any module does, and what it cannot do is an error that says so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TextIO

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import Judge, assert_same_bits, randn, same_bits, strided, tensors_in
from problems.ranks import of_two_ranks, with_ranks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, vector_to_parameters
from torch.utils.checkpoint import checkpoint

import sae_fast as sf
from sae_fast import ops
from sae_fast.ops import crossovers

LAYERS = [  # a layer of d_in, d_sae and keywords
    pytest.param(sf.GatedSAE, id="GatedSAE"),
    pytest.param(sf.ReluSAE, id="ReluSAE"),
    pytest.param(sf.JumpReluSAE, id="JumpReluSAE"),
    pytest.param(partial(sf.TopKSAE, k=8), id="TopKSAE"),
    pytest.param(partial(sf.BatchTopKSAE, k=8), id="BatchTopKSAE"),
]
layers = pytest.mark.parametrize("layer", LAYERS)
WITH_L1 = (sf.GatedSAE, sf.ReluSAE)  # their loss is made of differentiable ops
trainable = pytest.mark.parametrize("layer", [case for case in LAYERS if case.values[0] in WITH_L1])
D, F, BATCH = 19, 130, 24
L1 = 0.7
WEIGHTS = torch.linspace(-1, 2, D)  # an outside loss on x̂ is (x̂ · WEIGHTS).sum()


pytestmark = pytest.mark.usefixtures("screened")  # what a frozen block keeps is used by a screen only


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # these problems are small: threads would only wait for each other


@pytest.fixture(autouse=True)
def compiles_anew():
    """Newer releases' ``fullgraph`` implies what the size of a code needs; in torch 2.8 the caller has to say it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def make(layer, seed: int = 0, d: int = D, features: int = F, **options) -> nn.Module:
    """A layer with no two parameters alike, about 8 % of whose features fire."""
    sae = layer(d, features, seed=seed, **options)
    with torch.no_grad():
        for i, (name, p) in enumerate(sae.named_parameters()):
            p.add_(randn(*p.shape, seed=100 * seed + i) * (0.2 if p.dim() == 1 else 0.1))
            if name in ("b_gate", "b_enc"):
                p.sub_(1.5)
            elif name == "b_mag":
                p.sub_(1.2)
    return sae


def batch(*lead: int, seed: int = 5, d: int = D) -> Tensor:
    return randn(*lead, d, seed=seed)


def of_any_size(x: Tensor) -> Tensor:
    """torch.compile makes no graph for this number of rows alone first."""
    torch._dynamo.mark_dynamic(x, 0)
    return x


def loss(sae, x: Tensor) -> Tensor:
    return sae.loss(x, L1).total


class WithLoss(nn.Module):
    """A module whose forward is the SAE's loss."""

    def __init__(self, sae: nn.Module):
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        return loss(self.sae, x)


def outside(x_hat: Tensor) -> Tensor:
    return (x_hat * WEIGHTS.to(x_hat.dtype)).sum()


def names(sae) -> list[str]:
    return [name for name, _ in (*sae.named_parameters(), *sae.named_buffers())]


def gradients(sae, scalar: Tensor) -> dict[str, Tensor]:
    """By name; zeros where there is none."""
    order, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(scalar, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(order, found, strict=True))


def objectives(sae) -> dict[str, Callable]:
    """The scalars that a layer is trained by: functions of (layer, x)."""
    own = {"loss": loss} if isinstance(sae, WITH_L1) else {}
    return own | {"outside loss": lambda sae, x: outside(sae(x))}


def judge(layer_64: nn.Module, sae: nn.Module, ours: dict[str, Tensor], objective: Callable, x: Tensor) -> None:
    """Gradients by the 2× rule: against float64, and the plain PyTorch bodies in float32."""
    assert torch.equal(layer_64.encode(x.double()) != 0, sae.encode(x) != 0), "choose another seed: an input is at a kink"
    exact = gradients(layer_64, objective(layer_64, x.double()))
    with sf.use_backend("reference"):
        torchs = gradients(sae, objective(sae, x))
    verdict = Judge()
    for name, want in exact.items():
        verdict.add(name, ours[name], torchs[name], want)
    verdict.verdict()


# ---- torch.compile --------------------------------------------------------------------------------------------------

ENTRIES: dict[str, Callable] = {
    "forward": lambda sae, x: sae(x),
    "encode": lambda sae, x: sae.encode(x),
    "encode_sparse and decode": lambda sae, x: sae.decode(sae.encode_sparse(x)),
    "loss": loss,
}


def everything(sae, x: Tensor) -> list[Tensor]:
    """What every entry gives, from one graph."""
    code = sae.encode_sparse(x)
    found = [sae.encode(x), code.values, sae.decode(code)]
    return [*found, loss(sae, x)] if isinstance(sae, WITH_L1) else found


@pytest.mark.slow(but=5)
@pytest.mark.parametrize(
    "layer, entry",
    [
        pytest.param(case.values[0], entry, id=f"{case.id}, {entry}")
        for case in LAYERS
        for entry in ENTRIES
        if entry != "loss" or case.values[0] in WITH_L1
    ],
)
def test_each_entry_compiles_as_one_graph_that_serves_every_batch_size_and_has_the_same_gradients(layer, entry):
    sae, run = make(layer), ENTRIES[entry]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: run(sae, x), backend=counter, fullgraph=True)
    for rows in (24, 7, 40):
        x = of_any_size(batch(rows))
        ours, wanted = compiled(x), run(sae, x)
        assert_same_bits(ours, wanted)
        weight = randn(wanted.numel(), seed=3).reshape(wanted.shape)
        assert_same_bits(
            list(gradients(sae, (ours * weight).sum()).values()), list(gradients(sae, (wanted * weight).sum()).values())
        )
    assert counter.frame_count == 1, "another batch size compiled again"


@pytest.mark.slow(but=1)
@layers
def test_a_compiled_layer_specialises_to_the_first_batch_size_and_then_to_none(layer):
    """torch.compile's default: the second batch size makes the graph dynamic, the third needs no other."""
    sae, counter = make(layer), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sae, backend=counter, fullgraph=True)
    for rows in (24, 7, 40, 24):
        assert same_bits(compiled(batch(rows)), sae(batch(rows)))
    assert counter.frame_count == 2


MODES = {  # and whether b_dec is subtracted
    "gradients, not centred": (torch.enable_grad, False),
    "no_grad": (torch.no_grad, True),
    "inference_mode, not centred": (torch.inference_mode, False),
}


@pytest.mark.slow(but=5)
@layers
@pytest.mark.parametrize("mode", MODES)
def test_everything_compiles_together_in_every_mode(layer, mode):
    context, centred = MODES[mode]
    sae = make(layer, apply_b_dec_to_input=centred)
    compiled = torch.compile(lambda x: everything(sae, x), backend="aot_eager", fullgraph=True)
    with context():
        for rows in (24, 7):
            x = of_any_size(batch(rows))
            ours, wanted = compiled(x), everything(sae, x)
            assert_same_bits(ours, wanted)
            if context is torch.enable_grad:
                found, expected = (gradients(sae, sum(t.square().sum() for t in tensors)) for tensors in (ours, wanted))
                for name in expected:  # a graph adds up the gradients of its outputs in another order than autograd does
                    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-4)
    other = make(layer, apply_b_dec_to_input=not centred)
    assert not torch.equal(other.encode(batch(24)), sae.encode(batch(24)))


class Larger(nn.Module):
    """A model with an SAE between two of its layers, trained by the task and, where there is one, by the SAE's loss."""

    def __init__(self, sae: nn.Module):
        super().__init__()
        self.before, self.sae, self.after = nn.Linear(D, D), sae, nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.before(x)) * 2
        total = self.after(torch.relu(self.sae(h))).square().mean()
        return total + loss(self.sae, h) if isinstance(self.sae, WITH_L1) else total


@pytest.mark.parametrize(
    "layer, backend",
    [
        *((case.values[0], "aot_eager") for case in LAYERS),
        pytest.param(LAYERS[0].values[0], "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_larger_module_compiles_and_its_gradients_are_as_close_as_eagers(layer, backend):
    torch.manual_seed(0)
    model = Larger(make(layer))
    model_64 = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    verdict = Judge()
    # Of two equal calls, which encode x twice, the pass of common subexpressions that comes before inductor drops one and
    # keeps the size of its result: an InductorError.
    with torch._functorch.config.patch(cse=False):
        for rows in (BATCH, 40):
            x = of_any_size(batch(rows))
            ours, torchs, exact = (
                gradients(m, run(x.to(m.before.weight.dtype)))
                for m, run in ((model, compiled), (model, model), (model_64, model_64))
            )
            for name in exact:
                verdict.add(name, ours[name], torchs[name], exact[name])
    verdict.verdict()


@layers
def test_a_compiled_layer_in_a_frozen_block_sees_its_weights_change(layer):
    sae, x = make(layer), batch(BATCH)
    compiled = torch.compile(lambda x: sae.encode(x), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), sae.frozen():
        assert same_bits(compiled(x), sae.encode(x))
        sae.W_enc.mul_(1.5)
        changed = compiled(x)
    assert same_bits(changed, sae.encode(x).detach()) and changed.any()


@layers
def test_a_compiled_layer_makes_no_number_of_a_bad_value(layer):
    """The check of values is not in the graph: a NaN or an infinity comes out as one."""
    sae = make(layer)
    compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
    for bad in (float("nan"), float("inf")):
        x = batch(BATCH)
        x[3, 4] = bad
        try:
            x_hat = compiled(x)
        except (ValueError, RuntimeError) as error:
            assert "finite" in str(error)
        else:
            assert not x_hat[3].isfinite().any() and x_hat[:3].isfinite().all()


# ---- Copies and state -----------------------------------------------------------------------------------------------


def saved(thing) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


COPIES: dict[str, Callable] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda sae: pickle.loads(pickle.dumps(sae)),
    "torch.save": lambda sae: torch.load(saved(sae), weights_only=False),
}


@layers
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_copy_has_everything_and_shares_nothing(layer, way, frozen):
    sae, x = make(layer, precision="fp32", apply_b_dec_to_input=False), batch(BATCH)
    sae.metadata = {"model": {"layer": 3}}
    sae.eval().W_enc.requires_grad_(False)
    wanted = sae(x).detach()
    if frozen:
        with sae.frozen():
            sae(x)  # there is something kept
            twin = COPIES[way](sae)
            assert same_bits(twin(x), wanted)
    else:
        twin = COPIES[way](sae)
    assert type(twin) is type(sae) and repr(twin) == repr(sae) and not twin.training
    assert twin.options() == sae.options() != {} and twin.precision == "fp32"
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in sae.parameters()]
    assert same_bits(twin(x), wanted)
    assert twin.metadata == sae.metadata
    twin.metadata["model"]["layer"] = 4
    twin.precision = "exact"
    assert sae.metadata == {"model": {"layer": 3}} and sae.precision == "fp32"
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert same_bits(sae(x), wanted) and not torch.equal(twin(x), wanted)


@layers
def test_a_shallow_copy_shares_parameters_and_metadata_as_pythons_own_do(layer):
    sae, x = make(layer), batch(BATCH)
    twin = copy.copy(sae)
    assert same_bits(twin(x), sae(x)) and twin.W_enc is sae.W_enc and twin.metadata is sae.metadata
    with sae.frozen():
        assert copy.copy(sae)._frozen is None, "a copy is in no block"


def test_the_jumprelu_form_has_metadata_of_its_own():
    sae = make(sf.GatedSAE)
    sae.metadata = {"model": {"layer": 3}}
    sae.to_jumprelu().metadata["model"]["layer"] = 4
    assert sae.metadata == {"model": {"layer": 3}}


@layers
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_state_dict_of_tensors_only_makes_any_layer_the_same(layer, assign, frozen):
    sae, other, x = make(layer), make(layer, seed=1), batch(BATCH)
    state = torch.load(saved(sae.state_dict()), weights_only=True)
    assert list(state) == names(sae)
    wanted = sae(x)
    assert not torch.equal(other(x), wanted)

    def load():
        result = other.load_state_dict(state, strict=True, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys

    if frozen:
        with other.frozen():
            other(x)
            load()
            assert same_bits(other(x), wanted)
    else:
        load()
    assert same_bits(other(x), wanted)
    assert (other.W_enc.data_ptr() == state["W_enc"].data_ptr()) == assign
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in other.parameters())


@layers
def test_an_incomplete_or_foreign_state_dict_names_the_key_and_changes_no_shape(layer):
    sae = make(layer)
    state = sae.state_dict()
    b_dec = state.pop("b_dec")
    with pytest.raises(RuntimeError, match=r'Missing key.*"b_dec"'):
        sae.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        sae.load_state_dict({**state, "b_dec": b_dec, "bias": b_dec})


@layers
def test_the_order_of_the_parameters_is_stable(layer):
    sae = make(layer)
    order = [name for name, _ in sae.named_parameters()]
    assert order == ["W_enc", "W_dec", "b_dec", *sae.per_feature]
    assert list(sae.state_dict()) == [*order, *(name for name, _ in sae.named_buffers())]
    sae.load_state_dict(dict(reversed(sae.state_dict().items())), assign=True)
    for same in (sae, copy.deepcopy(sae), sae.double(), make(layer, seed=1)):
        assert [name for name, _ in same.named_parameters()] == order


@layers
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_parameters_go_to_a_vector_and_back(layer, frozen):
    sae, other, x = make(layer), make(layer, seed=1), batch(BATCH)
    vector = parameters_to_vector(sae.parameters()).detach()
    assert vector.shape == (sum(p.numel() for p in sae.parameters()),)
    if frozen:
        with other.frozen():
            other(x)
            vector_to_parameters(vector, other.parameters())
            assert same_bits(other(x), sae(x))
    vector_to_parameters(vector, other.parameters())
    assert same_bits(other(x), sae(x))


@layers
def test_a_layer_in_shared_memory_computes_the_same(layer):
    sae, x = make(layer), batch(BATCH)
    wanted = sae(x)
    assert sae.share_memory() is sae and all(p.is_shared() for p in sae.parameters())
    assert same_bits(sae(x), wanted)
    twin = copy.deepcopy(sae)
    assert same_bits(twin(x), wanted)


# ---- Dtypes, devices, modes -----------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to float16", "to bfloat16", "to float64"])
def test_a_cast_layer_computes_in_its_dtype_and_comes_back(layer, cast):
    sae, x = make(layer), batch(BATCH)
    wanted = sae(x)
    if cast.startswith("to "):
        dtype = getattr(torch, cast[3:])
        low = copy.deepcopy(sae).to(dtype)
    else:
        dtype = getattr(torch, cast)
        low = getattr(copy.deepcopy(sae), cast)()
    assert all(p.dtype == dtype for p in low.parameters())
    for x_in in (x, x.to(dtype)):
        assert low.encode(x_in).dtype == dtype and low.encode_sparse(x_in).values.dtype == dtype
        assert low.decode(low.encode(x_in)).dtype == low.decode(low.encode_sparse(x_in)).dtype == dtype
        assert low(x_in).dtype == x_in.dtype
        # The bound is on the whole: an entry near its threshold may flip.
        error = (low(x_in).float() - wanted).norm() / wanted.norm()
        assert error < {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype]
    for objective in objectives(low).values():
        assert all(g.dtype == dtype and g.isfinite().all() for g in gradients(low, objective(low, x.to(dtype))).values())
    if dtype == torch.float64:
        assert same_bits(low.float()(x), wanted)


@layers
def test_a_layer_goes_through_the_meta_device(layer):
    sae, x = make(layer), batch(BATCH)
    meta = copy.deepcopy(sae).to("meta")
    assert all(p.is_meta for p in meta.parameters()) and repr(meta) == repr(sae)
    with pytest.raises(RuntimeError, match=r"(sae_fast::encode|Tensor.item).*meta"):
        meta(torch.empty(BATCH, D, device="meta"))
    for twin in (copy.deepcopy(meta).to_empty(device="cpu"), meta):
        twin.load_state_dict(sae.state_dict(), assign=twin is meta)
        assert same_bits(twin(x), sae(x))
    made_there = layer(D, F, device="meta")
    with torch.device("meta"):
        assert all(p.is_meta for p in layer(D, F, seed=0).parameters())
    made_there.load_state_dict(sae.state_dict(), assign=True)
    assert same_bits(made_there(x), sae(x))


@layers
def test_without_gradients_nothing_is_recorded_and_modes_change_no_number(layer):
    sae, x = make(layer), batch(BATCH)
    wanted = sae(x)
    assert wanted.requires_grad and same_bits(sae.eval()(x), wanted) and same_bits(sae.train()(x), wanted)
    sae.requires_grad_(False)
    assert not sae(x).requires_grad and not sae.encode(x).requires_grad and same_bits(sae(x), wanted)
    for run in objectives(sae).values():
        assert not run(sae, x).requires_grad
    x.requires_grad_()
    (grad,) = torch.autograd.grad(outside(sae(x)), x)
    assert grad.isfinite().all() and grad.any() and all(p.grad is None for p in sae.parameters())


@layers
def test_autocast_leaves_every_number_in_the_parameters_dtype(layer):
    """The engine computes in fp32 under autocast too: a code, x̂ of a code and the loss are in the dtype of the parameters,
    forward's x̂ in that of x."""
    sae, x = make(layer), batch(BATCH)
    for x_in in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            f, code, x_hat = sae.encode(x_in), sae.encode_sparse(x_in), sae(x_in)
            both = sae.decode(f), sae.decode(code)
        assert f.dtype == code.values.dtype == both[0].dtype == both[1].dtype == torch.float32
        assert x_hat.dtype == x_in.dtype
        assert_same_bits([f, x_hat, *both], [sae.encode(x_in), sae(x_in), sae.decode(f), sae.decode(code)])


@layers
@pytest.mark.parametrize("backward_too", [False, True])
def test_gradients_under_autocast_are_those_without(layer, backward_too):
    sae, x = make(layer), batch(BATCH)
    layer_64 = copy.deepcopy(sae).double()
    for name, objective in objectives(sae).items():
        with torch.autocast("cpu", torch.bfloat16):
            scalar = objective(sae, x)
            found = gradients(sae, scalar) if backward_too else None
        found = found or gradients(sae, scalar)
        assert scalar.dtype == torch.float32, name
        assert_same_bits(list(found.values()), list(gradients(sae, objective(sae, x)).values()))
        judge(layer_64, sae, found, objective, x)


def as_by_default(layer) -> list:
    """What a layer gives, and its parameters after a step."""
    sae, x = make(layer), batch(BATCH)
    with sae.frozen():
        found = [sae.encode(x), *gradients(sae, outside(sae(x))).values()]
    if isinstance(sae, WITH_L1):
        found += [loss(sae, x), *gradients(sae, loss(sae, x)).values()]
        sf.Trainer(sae, lr=1e-2, l1_coefficient=L1).step(x)
    return [*found, *sae.parameters()]


@layers
@pytest.mark.parametrize("crossover", [-1.0, float("inf")], ids=["dense", "sparse"])
def test_torchs_default_dtype_is_for_what_says_no_dtype(layer, crossover, monkeypatch):
    """What the engine writes to has the layer's."""
    for op in crossovers.CROSSOVER:
        monkeypatch.setitem(crossovers.CROSSOVER, op, crossover)
    wanted = as_by_default(layer)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert_same_bits(as_by_default(layer), wanted)
        finally:
            torch.set_default_dtype(torch.float32)


# ---- Hooks and parametrizations -------------------------------------------------------------------------------------


@layers
def test_hooks_on_the_module_and_on_its_parameters_fire(layer):
    sae, x = make(layer), batch(BATCH).requires_grad_()
    fired = []
    sae.register_forward_pre_hook(lambda m, args: fired.append("pre") or (args[0] * 2,))
    sae.register_forward_hook(lambda m, args, out: fired.append("forward") or out + 1)
    sae.register_full_backward_pre_hook(lambda m, grads: fired.append("backward pre"))
    sae.register_full_backward_hook(lambda m, into, out: fired.append(("backward", into[0].shape, out[0].shape)))
    sae.W_dec.register_hook(lambda grad: fired.append(("W_dec", grad.shape)))
    x_hat = sae(x)
    assert fired == ["pre", "forward"]
    plain = make(layer)
    assert same_bits(x_hat, plain(x * 2) + 1)
    outside(x_hat).backward()
    assert fired[2] == "backward pre"
    assert set(fired[3:]) == {("W_dec", (F, D)), ("backward", (BATCH, D), (BATCH, D))}
    other = x.detach().clone().requires_grad_()
    outside(plain(other * 2) + 1).backward()
    assert same_bits(x.grad, other.grad)


class Doubled(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return 2 * v


@layers
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_parametrized_weights_and_biases_are_used_and_learn(layer, frozen):
    sae, x = make(layer), batch(BATCH)
    parametrizations.weight_norm(sae, "W_enc")
    parametrizations.weight_norm(sae, "W_dec")
    for name in ("b_dec", *sae.per_feature):
        parametrize.register_parametrization(sae, name, Doubled())
    with torch.no_grad():
        sae.parametrizations.W_enc.original0.mul_(1.25)  # the rows' norms
    plain = layer(D, F)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(getattr(sae, name))
    if frozen:
        with sae.frozen():
            assert same_bits(sae(x), plain(x)) and same_bits(sae(x), plain(x))
    for objective in objectives(sae).values():
        assert same_bits(objective(sae, x), objective(plain, x))
        ours, inner = gradients(sae, objective(sae, x)), gradients(plain, objective(plain, x))
        assert len(ours) == 2 * 2 + 1 + len(sae.per_feature)
        for name in ("b_dec", *sae.per_feature):
            assert torch.equal(ours[f"parametrizations.{name}.original"], 2 * inner[name]), name
        for name in ("W_enc", "W_dec"):
            v = getattr(sae.parametrizations, name).original1.detach()
            norms = (inner[name] * nn.functional.normalize(v, dim=1)).sum(1, keepdim=True)
            torch.testing.assert_close(ours[f"parametrizations.{name}.original0"], norms, rtol=1e-4, atol=1e-4)
    for name in ("W_enc", "W_dec", "b_dec", *sae.per_feature):
        parametrize.remove_parametrizations(sae, name)
    assert same_bits(sae(x), plain(x))


# ---- torch.func and higher derivatives ------------------------------------------------------------------------------


def replaced(sae) -> dict[str, Tensor]:
    """Other parameters for a layer, plain tensors."""
    return {name: p.detach() * 1.1 + 0.01 for name, p in sae.named_parameters()}


@layers
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_functional_call_is_the_layer_with_these_parameters(layer, frozen):
    sae, other, x = make(layer), make(layer), batch(BATCH)
    wanted_before = sae(x)
    leaves = {name: t.requires_grad_() for name, t in replaced(sae).items()}
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(leaves[name])

    def compare():
        sae(x)
        x_hat = functional_call(sae, leaves, (x,))
        assert same_bits(x_hat, other(x)) and not torch.equal(x_hat, wanted_before)
        ours = torch.autograd.grad(outside(x_hat), list(leaves.values()), allow_unused=True, materialize_grads=True)
        assert_same_bits(list(ours), list(gradients(other, outside(other(x))).values()))
        assert same_bits(sae(x), wanted_before)
        if isinstance(sae, WITH_L1):
            prefixed = {f"sae.{name}": t for name, t in leaves.items()}
            total = functional_call(WithLoss(sae), prefixed, (x,))
            assert_same_bits(
                list(torch.autograd.grad(total, list(leaves.values()))), list(gradients(other, loss(other, x)).values())
            )

    if frozen:
        with sae.frozen():
            compare()
    else:
        compare()


@layers
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_func_grad_gives_the_bits_of_backward(layer, frozen):
    sae, x = make(layer), batch(BATCH)
    parameters = {name: p.detach() for name, p in sae.named_parameters()}

    def compare():
        ours = torch.func.grad(lambda p: outside(functional_call(sae, p, (x,))))(parameters)
        assert_same_bits(list(ours.values()), list(gradients(sae, outside(sae(x))).values()))
        leaf = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(outside(sae(leaf)), leaf)
        assert same_bits(torch.func.grad(lambda x: outside(sae(x)))(x), wanted)
        x_hat, pull_back = torch.func.vjp(sae, x)
        assert same_bits(x_hat, sae(x)) and same_bits(pull_back(WEIGHTS.expand(BATCH, D))[0], wanted)
        if isinstance(sae, WITH_L1):
            prefixed = {f"sae.{name}": p for name, p in parameters.items()}
            ours, total = torch.func.grad_and_value(lambda p: functional_call(WithLoss(sae), p, (x,)))(prefixed)
            assert same_bits(total, loss(sae, x))
            assert_same_bits(list(ours.values()), list(gradients(sae, loss(sae, x)).values()))

    if frozen:
        with sae.frozen():
            compare()
    else:
        compare()


@layers
def test_vmap_is_refused_by_name(layer):
    sae, x = make(layer), batch(2, 3)
    own = [partial(loss, sae)] if isinstance(sae, WITH_L1) else []
    for run in (sae, sae.encode, lambda x: sae.decode(sae.encode_sparse(x)), *own):
        with pytest.raises(NotImplementedError, match=r"x: torch\.vmap cannot map this; give the layer leading dimensions"):
            torch.vmap(run)(x)
    ensemble = {name: torch.stack([p.detach(), p.detach()]) for name, p in sae.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"sae_fast::encode has no rule for torch\.vmap"):
        torch.vmap(lambda p: functional_call(sae, p, (x,)))(ensemble)
    with pytest.raises(NotImplementedError, match=r"has no rule for torch\.vmap .*jacrev"):
        torch.func.jacrev(sae)(x[0, 0])
    code = sae.encode_sparse(x)
    with pytest.raises(NotImplementedError, match=r"sae_fast::decode has no rule"):
        torch.vmap(lambda v: sae.decode(code.with_values(v)))(torch.stack([code.values, code.values]))
    f = sae.encode(x)
    torch.testing.assert_close(torch.vmap(sae.decode)(f), sae.decode(f))  # of a dense code it is torch's own product


def twice(grad: Callable, f: Callable) -> Callable:
    return grad(lambda W: grad(f)(W).sum())


def other_weights(run: Callable) -> Callable:
    """A call of (layer, x) as ``run`` transforms it: a function of W_enc, taken of another one than the layer's."""
    return lambda sae, x: run(lambda W: functional_call(sae, {"W_enc": W}, (x,)), replaced(sae)["W_enc"])


def fake(sae, x: Tensor) -> Tensor:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        return functional_call(sae, {n: mode.from_tensor(p) for n, p in sae.named_parameters()}, (mode.from_tensor(x),))


def distributed(sae, x: Tensor) -> Tensor:
    mesh = init_device_mesh("cpu", (1,))
    whole = {name: DTensor.from_local(p.detach(), mesh) for name, p in sae.named_parameters()}
    return functional_call(sae, whole, (DTensor.from_local(x, mesh),))


def traced(mode: str, pre_dispatch: bool = False) -> Callable:
    """A graph of W_enc, made of the layer's and run with another."""

    def run(sae, x: Tensor) -> Tensor:
        def u_of(W: Tensor) -> Tensor:
            shadow = sae._frozen and sae._frozen.of(W)
            return ops.encode(x, W, getattr(sae, sae.per_feature[0]), shadow=shadow, **sae._encoder()).u

        trace = make_fx(u_of, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)
        return trace(sae.W_enc.detach())(replaced(sae)["W_enc"])

    return run


def changed(module: nn.Module, sae, x: Tensor) -> Tensor:
    """What a graph of the layer gives after the weights that it shares with it were changed."""
    with torch.no_grad():
        module(x)
        for p in sae.parameters():
            p.mul_(1.1)
        return module(x)


def exported(sae, x: Tensor, strict: bool) -> Tensor:
    return torch.export.export(sae, (x,), strict=strict).module()(x)


def on_meta(sae, x: Tensor) -> Tensor:
    with torch.device("meta"):
        return sae(x)


WRAPPED = {
    "grad": other_weights(lambda f, W: torch.func.grad(lambda W: outside(f(W)))(W)),
    "grad of x": lambda sae, x: torch.func.grad(lambda x: outside(sae(x)))(x),
    "grad of grad": other_weights(lambda f, W: twice(torch.func.grad, lambda W: f(W).sum())(W)),
    "vjp": other_weights(lambda f, W: torch.func.vjp(f, W)[1](torch.ones(BATCH, D))),
    "jvp": other_weights(lambda f, W: torch.func.jvp(f, (W,), (W,))),
    "vmap": other_weights(lambda f, W: torch.vmap(f)(torch.stack([W, W]))),
    "functionalize": other_weights(lambda f, W: torch.func.functionalize(f)(W)),
    "functionalize of x": lambda sae, x: torch.func.functionalize(sae)(x),
    "fake": fake,
    "meta": other_weights(lambda f, W: f(W.to("meta"))),
    "meta as the default": on_meta,
    "distributed": distributed,
    "compiled": other_weights(lambda f, W: torch.compile(f, backend="aot_eager", fullgraph=True)(W)),
    "make_fx, real": traced("real"),
    "make_fx, fake": traced("fake"),
    "make_fx, symbolic": traced("symbolic"),
    "make_fx, before autograd": traced("real", pre_dispatch=True),
    "exported": partial(exported, strict=False),
    "exported, strict": partial(exported, strict=True),
    "jit.trace": lambda sae, x: changed(torch.jit.trace(sae, (x,), check_trace=False), sae, x),
    "negated": other_weights(lambda f, W: f(torch._neg_view(W))),
    "transposed": other_weights(lambda f, W: f(W.T) if W.shape[0] == W.shape[1] else f(W)),
}


def outcome(run: Callable[[], Tensor]) -> tuple[str, list[Tensor]]:
    """What comes of it: tensors, or an error and how its message begins."""
    try:
        found = tensors_in(run())
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}", []
    return str([(t.dtype, t.dim()) for t in found]), [] if is_fake(found[0]) else found


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", WRAPPED)
def test_in_a_frozen_block_a_wrapped_or_recorded_weight_has_the_outcome_that_it_has_outside(kind, one_rank):
    """Whatever torch puts in the place of a tensor has no memory to read, and a graph no use for a constant.  That it is as
    outside also if its weight is the first in the block, and if there is a shadow already."""
    results = {}
    for block in ("none", "first", "later"):
        sae, x = make(sf.GatedSAE, d=40, features=40) if kind == "transposed" else make(sf.GatedSAE), batch(BATCH)
        x = batch(BATCH, d=40) if kind == "transposed" else x
        torch._dynamo.reset()
        with nullcontext() if block == "none" else sae.frozen():
            if block == "later":
                sae(x)
                assert sae._frozen.shadow is not None
            results[block] = outcome(lambda sae=sae, x=x: WRAPPED[kind](sae, x))
    what, found = results.pop("none")
    for block, (again, tensors) in results.items():
        assert again == what, block
        assert_same_bits(tensors, found)


def test_only_of_a_tensor_in_memory_is_a_shadow_made():
    W, kept = batch(F), ops.KeptShadow()

    def refused(W: Tensor) -> Tensor:
        assert kept.of(W) is None and not kept.serves(W)
        for use in (ops.make_shadow, lambda W: ops.refresh_shadow(W, sound), lambda W: ops.stale_rows(W, sound, 0, F)):
            with pytest.raises(ValueError, match=r"W: got a .* that is wrapped or recorded, want one with values"):
                use(W)
        return W.sum()

    sound = ops.make_shadow(W)
    with FakeTensorMode() as mode:
        refused(mode.from_tensor(W))
    refused(torch._neg_view(W))
    torch.func.grad(refused)(W)
    torch.vmap(refused)(W[None])
    assert kept.shadow is None
    assert_same_bits(kept.of(W), sound)
    assert kept.serves(W) and not kept.serves(torch._neg_view(W))


def test_a_square_weights_transpose_is_another_weight():
    """At the same address, of the same shape and version."""
    W, kept = randn(F, F), ops.KeptShadow()
    assert_same_bits(kept.of(W), ops.make_shadow(W))
    assert not kept.serves(W.T)
    assert_same_bits(kept.of(W.T), ops.make_shadow(W.T))


@layers
def test_jacobians_without_vmap_are_right(layer):
    sae, x = make(layer).double(), batch(1).double()[0]
    jacobian = torch.autograd.functional.jacobian(sae, x)
    assert jacobian.any()
    for i in range(D):
        step = torch.zeros_like(x)
        step[i] = 1e-6
        torch.testing.assert_close(jacobian[:, i], (sae(x + step) - sae(x - step)) / 2e-6, rtol=1e-5, atol=1e-7)


@layers
@pytest.mark.parametrize("learns", [True, False])
def test_forward_mode_is_refused_by_name_and_not_a_silent_zero(layer, learns):
    sae, x = make(layer).requires_grad_(learns), batch(BATCH)
    refused = partial(pytest.raises, NotImplementedError, match=r"sae_fast::\w+ has no forward-mode derivative")
    own = [partial(loss, sae)] if isinstance(sae, WITH_L1) else []
    for run in (sae, sae.encode, *own):
        with refused():
            torch.func.jvp(run, (x,), (x,))
        with refused(), forward_ad.dual_level():
            run(forward_ad.make_dual(x, torch.ones_like(x)))
        with refused():
            torch.func.jacfwd(run)(x[:1])
    code = sae.encode_sparse(x)
    with refused():
        torch.func.jvp(lambda v: sae.decode(code.with_values(v)), (code.values,), (code.values,))
    with refused():
        torch.func.jvp(lambda p: functional_call(sae, {"W_enc": p}, (x,)), (sae.W_enc.detach(),), (sae.W_enc.detach(),))


@layers
def test_a_second_derivative_in_x_is_right_and_one_of_a_weights_gradient_is_refused(layer):
    sae = make(layer, d=5, features=9).double()
    with torch.no_grad():
        for name in sae.per_feature:
            sae.get_parameter(name).add_(1.5 if name.startswith("b_") else 0)  # of few features, more fire
    x = batch(4, d=5).double().requires_grad_()
    assert (sae.encode(x) != 0).float().mean() > 0.1

    def penalty(x):
        (grad,) = torch.autograd.grad(sae(x).pow(3).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    assert torch.autograd.gradcheck(penalty, (x,))
    grad = torch.autograd.grad(sae(x).pow(3).sum(), sae.W_enc, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"gradients of .*weights and biases.* cannot be differentiated a second"):
        grad.pow(2).sum().backward()


@trainable
@pytest.mark.parametrize("wrt", ["x", "W_enc", "W_dec", "b_dec"])
def test_a_second_derivative_of_the_loss_is_refused_and_not_a_wrong_number(layer, wrt):
    sae, x = make(layer), batch(BATCH).requires_grad_()
    of = x if wrt == "x" else sae.get_parameter(wrt)
    refused = partial(pytest.raises, NotImplementedError, match=r"gradients of .* cannot be differentiated a second time")
    (grad,) = torch.autograd.grad(loss(sae, x), of, create_graph=True)
    assert same_bits(grad, torch.autograd.grad(loss(sae, x), of)[0])
    for again in (of, x):
        with refused():
            torch.autograd.grad(grad.pow(2).sum(), again, retain_graph=True)
    with refused():
        torch.func.grad(lambda x: torch.func.grad(partial(loss, sae))(x).pow(2).sum())(x.detach())


@trainable
def test_a_second_derivative_of_a_compiled_loss_is_refused(layer):
    sae, x = make(layer), batch(BATCH).requires_grad_()
    compiled = torch.compile(ENTRIES["loss"], backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        (grad,) = torch.autograd.grad(compiled(sae, x), x, create_graph=True)
        grad.pow(2).sum().backward()


def test_what_a_loss_is_made_of_is_constant_to_autograd():
    """And says so: a gradient of it would be a silent zero."""
    sae, x = make(sf.GatedSAE), batch(BATCH)
    code = sae.encode_sparse(x)
    out = sf.ops.decode_loss(code, sae.W_dec, sae.b_dec, x, torch.ones(F), BATCH)
    assert out.losses.requires_grad
    assert not (out.residual.requires_grad or out.residual_aux.requires_grad or out.grads.requires_grad)


# ---- Backward passes in other orders --------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(layer, reentrant):
    sae, x = make(layer), batch(BATCH).requires_grad_()
    for objective in objectives(sae).values():
        results = []
        for run in (objective, lambda *a, o=objective: checkpoint(o, *a, use_reentrant=reentrant)):
            sae.zero_grad()
            x.grad = None
            run(sae, x).backward()
            results.append([x.grad, *(p.grad for p in sae.parameters() if p.grad is not None)])
        assert_same_bits(*results)
        assert results[0][0].any()


@layers
def test_gradients_of_two_backward_calls_add_up(layer):
    sae, parts = make(layer), (batch(BATCH), batch(7, seed=6))
    for objective in objectives(sae).values():
        sae.zero_grad()
        for x in parts:
            objective(sae, x).backward()
        each = [gradients(sae, objective(sae, x)) for x in parts]
        for name, p in sae.named_parameters():
            got = torch.zeros_like(p) if p.grad is None else p.grad
            assert torch.equal(got, each[0][name] + each[1][name]), name


@trainable
def test_the_second_backward_through_one_graph_needs_it_retained(layer):
    sae, x = make(layer), batch(BATCH)
    total = loss(sae, x)
    first = gradients_retained(sae, total)
    assert_same_bits(first, list(gradients(sae, total).values()))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(sae, total)


def gradients_retained(sae, scalar: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(scalar, list(sae.parameters()), retain_graph=True))


@layers
def test_only_what_has_no_part_in_the_result_gets_a_zero_gradient(layer):
    """A reconstruction-only loss gives b_gate of a Gated SAE exact zeros, not None; a threshold gets none at all."""
    sae, x = make(layer), batch(BATCH)
    outside(sae(x)).backward()
    for name, p in sae.named_parameters():
        if name == "threshold":
            assert p.grad is None
        else:
            assert p.grad is not None and bool(p.grad.any()) == (name != "b_gate"), name


# ---- Shapes ---------------------------------------------------------------------------------------------------------

SHAPES = [(), (6,), (2, 3), (0,), (2, 0)]
VIEWS: dict[str, Callable] = {
    "contiguous": lambda x: x,
    "strided": strided,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[..., :1].expand(x.shape) if x.numel() else x,
    "repeated": lambda x: x.reshape(-1, D)[:1].expand(*x.shape[:-1], D) if x.dim() > 1 and x.numel() else x,
}


@layers
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("lead", SHAPES, ids=str)
def test_any_leading_dimensions_and_strides_give_the_numbers_of_flat_rows(layer, lead, view):
    sae = make(layer)
    x = VIEWS[view](batch(*lead, seed=8))
    flat = x.reshape(-1, D).clone()
    f, code = sae.encode(flat), sae.encode_sparse(flat)
    assert same_bits(sae.encode(x), f.reshape(*lead, F)) and same_bits(sae(x), sae(flat).reshape(x.shape))
    shaped = sae.encode_sparse(x)
    assert shaped.shape == (*lead, F) and shaped.l0().shape == lead
    assert_same_bits([shaped.indptr, shaped.indices, shaped.values], [code.indptr, code.indices, code.values])
    assert same_bits(sae.decode(shaped), sae.decode(code).reshape(x.shape))
    of_dense = sae.decode(VIEWS[view](f.reshape(*lead, F)) if view in ("contiguous", "strided") else f.reshape(*lead, F))
    torch.testing.assert_close(of_dense, sae.decode(f).reshape(x.shape))
    if not isinstance(sae, WITH_L1):
        return
    if flat.shape[0] == 0:
        for empty in (x, flat):
            with pytest.raises(ValueError, match="normaliser: got 0"):
                loss(sae, empty)
        return
    assert same_bits(loss(sae, x), loss(sae, flat))
    assert_same_bits(list(gradients(sae, loss(sae, x)).values()), list(gradients(sae, loss(sae, flat)).values()))


@layers
@pytest.mark.parametrize("lead", SHAPES, ids=str)
def test_gradients_to_x_have_its_shape(layer, lead):
    sae, x = make(layer), batch(*lead, seed=8).requires_grad_()
    flat = x.detach().reshape(-1, D).requires_grad_()
    ours, wanted = (torch.autograd.grad(outside(sae(t)), t)[0] for t in (x, flat))
    assert ours.shape == x.shape and same_bits(ours.reshape(-1, D), wanted)


# ---- Two processes --------------------------------------------------------------------------------------------------


def with_threshold(*args, **kwargs) -> sf.BatchTopKSAE:
    """Without one, what the whole batch chooses is not what its halves do."""
    sae = sf.BatchTopKSAE(*args, k=8, **kwargs)
    sae.threshold.fill_(0.5)
    return sae


def ddp_cases() -> dict[str, tuple[Callable, str]]:
    """By name: a layer and what is wrapped, its loss or itself."""
    found = {}
    for case in LAYERS:
        layer = with_threshold if case.id == "BatchTopKSAE" else case.values[0]
        found[f"{case.id}, outside loss"] = (layer, "outside")
        if isinstance(layer, WITH_L1):
            found[f"{case.id}, own loss"] = (layer, "own")
    return found


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).pow(2).sum(-1).mean()


def ddp_rank(rank: int, log: TextIO) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """By case: gradients of the first step, and parameters after the second."""
    results = {}
    for name, (layer, kind) in ddp_cases().items():
        print(name, file=log)
        sae = make(layer, seed=rank)  # DDP brings rank 0's to the others
        model = nn.parallel.DistributedDataParallel(WithLoss(sae) if kind == "own" else sae)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(2):
            x = batch(BATCH, seed=20 + step)[rank::2]
            optimizer.zero_grad()
            total = model(x) if kind == "own" else squared_error(model(x), x)
            total.backward()
            if step == 0:
                grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sae.named_parameters()}
            optimizer.step()
        results[name] = grads, {n: p.detach() for n, p in sae.named_parameters()}
    return results


@with_ranks
def test_data_parallel_training_on_two_ranks_is_that_of_the_whole_batch(tmp_path: Path):
    """Also under a loss of x̂ alone, where b_gate and threshold have no gradient of their own: no unused parameter."""
    first, second = of_two_ranks(ddp_rank, tmp_path)
    for name, (layer, kind) in ddp_cases().items():
        assert_same_bits(*(list(part.values()) for part in (first[name][0], second[name][0])))
        assert_same_bits(*(list(part.values()) for part in (first[name][1], second[name][1])))
        sae, x = make(layer), batch(BATCH, seed=20)
        objective = loss if kind == "own" else lambda sae, x: squared_error(sae(x), x)
        judge(copy.deepcopy(sae).double(), sae, first[name][0], objective, x)
        assert not torch.equal(first[name][1]["W_enc"], sae.W_enc), "the steps were taken"
