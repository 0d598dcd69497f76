"""Digests of results to the last bit, recorded before a restructure and held against the tree as it is.

    python tests/digests.py --record    writes tests/digests.json
    python tests/digests.py --check     compares with it; exit status 1, and the names, where a bit differs
    ... --only trainer ops              some of the groups only

They are of the machine that recorded them: of its instruction sets and its bfloat16 product.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
import ways  # noqa: E402
from helpers import make_inputs, randn, random_code  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

import sae_fast as sf  # noqa: E402
from sae_fast.ops import crossovers  # noqa: E402
from sae_fast.ops.dispatch import _C  # noqa: E402

FILE = HERE / "digests.json"
PEERS = HERE.parent / ".venv-peers/bin/python"
STEPS = 50
D, F, B = 24, 96, 32  # ragged in every vector length
GROUPS: dict[str, Callable[[], Iterator[tuple[str, object]]]] = {}


def group(make: Callable) -> Callable:
    GROUPS[make.__name__] = make
    return make


def digest(what: object) -> str:
    """Of tensors and numbers to the bit, in any nesting of lists, tuples and dicts."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            value = (value.to_dense() if value.layout != torch.strided else value).detach().cpu().contiguous()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            for key in sorted(value):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            found.update(f"{len(value)}".encode())
            for each in value:
                add(each)
        elif isinstance(value, bytes):
            found.update(value)
        elif hasattr(value, "tobytes"):
            found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            assert value is None or isinstance(value, (int, float, str, bool)), type(value)
            found.update(repr(value).encode())

    add(what)
    return found.hexdigest()[:16]


def of_code(code: sf.SparseCode) -> list:
    return [tuple(code.shape), code.indptr, code.indices, code.u, code.values]


def tensors_in(folder: str) -> list:
    """Of every safetensors file."""
    return [load_file(path) for path in sorted(Path(folder).rglob("*.safetensors"), key=lambda p: len(load_file(p)))]


@contextlib.contextmanager
def density(route: str) -> Iterator[None]:
    """Either side of every op's switch, as conftest's ``route``."""
    with pytest.MonkeyPatch.context() as patch:
        if route != "natural":
            for op in crossovers.CROSSOVER:
                patch.setitem(crossovers.CROSSOVER, op, {"sparse": float("inf"), "dense": -1.0}[route])
        yield


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


# ---- Layers and trainers --------------------------------------------------------------------------------------------

TRAINED = {"gated": sf.GatedSAE, "relu": sf.ReluSAE}
ALL = {
    **TRAINED,
    "jumprelu": sf.JumpReluSAE,
    "topk": lambda *a, **k: sf.TopKSAE(*a, k=7, **k),
    "batchtopk": lambda *a, **k: sf.BatchTopKSAE(*a, k=7, **k),
}
WAYS = {"screen": "exact", "bound": "exact", "dots": "exact", "product": "fp32", "rounded": "bf16"}


def layer(kind: str, d: int = D, features: int = F, l0: float = 7, **options):
    """A layer in the middle of things: no two of whose numbers are alike."""
    sae = ALL[kind](d, features, seed=3, **options)
    with torch.no_grad():
        dtype = sae.W_enc.dtype
        for i, (name, p) in enumerate(sae.named_parameters()):
            p.add_((0.02 if name == "W_dec" else 0.1) * randn(*p.shape, seed=i).to(dtype))
        sae.calibrate_(randn(256, d, seed=8), l0)
        if kind == "gated":
            sae.b_mag.add_(0.1 * randn(features, seed=9).to(dtype))
        if kind == "jumprelu":
            sae.threshold.copy_(0.2 * randn(features, seed=10).abs())
    return sae


def batches(n: int = STEPS, rows: int = B, d: int = D) -> list[Tensor]:
    return list(randn(n, rows, d, seed=77))


def state_of(trainer: sf.Trainer) -> list:
    """All of a trainer's state, by name."""
    trainer.wait()
    out: list = [trainer.step_count]
    for name, p in trainer.sae.named_parameters():
        state = trainer.optimizer.state.get(p, {})
        out += [name, p, {key: state[key] for key in sorted(state)}]
    return out


def run(trainer: sf.Trainer, data: list[Tensor], **rates: float) -> list:
    logs = [trainer.step(x, **rates) for x in data]
    return [
        *((log.step, log.lr, log.l1_coefficient, log.losses, log.loss, log.l0) for log in logs),
        state_of(trainer),
    ]  # fmt: skip


def trainer_of(kind: str, precision: str = "exact", layer_options: dict | None = None, **settings) -> sf.Trainer:
    settings = {"lr": 3e-3, "l1_coefficient": 0.3, **settings}
    return sf.Trainer(layer(kind, precision=precision, **(layer_options or {})), **settings)


@group
def trainer():
    """Every layer that trains × dialect × way × instruction set × side of the density switches."""
    data = batches()
    for kind in TRAINED:
        for dialect in ("paper", "saelens"):
            for way, precision in WAYS.items():
                forced = way if way in ways.WAYS else "screen"
                for each in _C.supported_isas():
                    for route in ("sparse", "dense"):
                        with isa(each), density(route), ways.forced(forced):
                            found = run(trainer_of(kind, precision, dialect=dialect), data)
                        yield f"{kind} {dialect} {way} {each} {route}", found
            for precision in sf.ops.PRECISIONS:
                yield f"{kind} {dialect} {precision} unforced", run(trainer_of(kind, precision, dialect=dialect), data)
            with sf.use_backend("reference"):
                yield f"{kind} {dialect} reference", run(trainer_of(kind, dialect=dialect), data)


SETTINGS = {
    "momentum": dict(betas=(0.9, 0.999)),
    "large eps": dict(eps=1e-2),
    "clipped": dict(grad_clip=0.3),
    "schedules": dict(lr_warmup_steps=10, l1_warmup_steps=20, lr_decay_start=30, total_steps=50),
    "calibrated": dict(init_l0=5),
    "any start": dict(unit_start=False),
    "momentum, clipped, any start": dict(betas=(0.9, 0.99), grad_clip=0.3, unit_start=False),
    "not centred": dict(layer_options=dict(apply_b_dec_to_input=False)),
    "float64": dict(layer_options=dict(dtype=torch.float64)),
    "dense at first": dict(layer_options=dict(l0=48)),
    "everything": dict(grad_clip=0.3, lr_warmup_steps=10, lr_decay_start=30, total_steps=50, init_l0=5, eps=1e-3),
}


@group
def settings():
    """The Trainer's settings, frozen parameters, inputs, and what happens in mid-run."""
    data = batches()
    for kind in TRAINED:
        for dialect in ("paper", "saelens"):
            for name, options in SETTINGS.items():
                route = "natural" if name == "dense at first" else "sparse"
                with density(route):
                    yield f"{kind} {dialect} {name}", run(trainer_of(kind, dialect=dialect, **options), data)
            for name, _ in layer(kind).named_parameters():
                trainer = trainer_of(kind, dialect=dialect, grad_clip=0.5, init_l0=6)
                trainer.sae.get_parameter(name).requires_grad_(False)
                yield f"{kind} {dialect} frozen {name}", run(trainer, data[:20])
        for dtype in (torch.bfloat16, torch.float16):
            trainer = trainer_of(kind)
            yield f"{kind} {dtype} input", run(trainer, [x.to(dtype).view(4, 8, D) for x in data])
        yield f"{kind} given rates", run(trainer_of(kind), data, lr=1e-3, l1_coefficient=0.7)
        yield (
            f"{kind} one row, no row open",
            run(trainer_of(kind), [*(x[:1] for x in data[:10]), *(0 * x for x in data[:5])]),
        )
        trainer = trainer_of(kind, dialect="paper")
        first = run(trainer, data[:20])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.sae.W_enc.data[5] *= 1.5  # behind torch's back
            trainer.optimizer.param_groups[0]["betas"] = (0.0, 0.99)
            yield f"{kind} changed in mid-run", [first, run(trainer, data[20:])]
        trainer = trainer_of(kind)
        history = trainer.fit(data, steps=30, log_every=7, progress=False)
        yield f"{kind} fit", [[{k: v for k, v in each.items() if k != "seconds"} for each in history], state_of(trainer)]
        for betas in ((0.0, 0.999), (0.9, 0.999)):
            trainer = trainer_of(kind, betas=betas, grad_clip=0.5, lr_warmup_steps=30)
            first = run(trainer, data[:20])
            twin = copy.deepcopy(trainer)
            with tempfile.TemporaryDirectory() as folder:
                trainer.save(f"{folder}/run")
                tensors = tensors_in(f"{folder}/run")
                again = sf.Trainer.load(f"{folder}/run")
                said = json.loads((Path(folder) / "run/config.json").read_text())
            yield f"{kind} saved {betas}", [tensors, json.dumps(said["trainer"], sort_keys=True)]
            yield f"{kind} resumed {betas}", [first, run(again, data[20:]), run(twin, data[20:])]


@group
def optimizer():
    """RowAdam by itself: sources and accumulation, groups, a change of betas, skip, its state_dict."""
    code = [random_code(B, F, density=0.03, seed=s) for s in range(12)]
    A = [randn(B, D, seed=s) for s in range(12)]
    for betas in ((0.0, 0.999), (0.9, 0.99)):
        for unit in (False, True):
            for reach in (1, 2):
                W, b = torch.nn.Parameter(randn(F, D, seed=1)), torch.nn.Parameter(randn(F, seed=2))
                groups = [{"params": [W], "unit_rows": unit}, {"params": [b]}]
                opt = sf.RowAdam(groups, lr=1e-2, betas=betas)
                shadow = sf.ops.make_shadow(W.data)
                for t in range(0, 12 - reach):
                    joined = sf.SparseCode.cat(code[t : t + reach])  # gradient accumulation
                    csc, values = sf.ops.transpose(joined), joined.values
                    rows = torch.cat(A[t : t + reach])
                    gradient = sf.RowGradient(csc, list(values), [rows, rows.flip(0)], 0.01 * randn(F, seed=t))
                    vector = sf.RowGradient(csc, [values[0]], [torch.ones(len(rows), 1)])
                    given = dict(grad_scale=torch.tensor(0.5), skip=torch.tensor(t == 4), shadows={W: shadow})
                    opt.step(rows={W: gradient, b: vector}, **given)
                    if t == 6:
                        saved = copy.deepcopy(opt.state_dict())
                        opt = sf.RowAdam(groups, lr=1e-2, betas=betas)
                        opt.load_state_dict(saved)
                        if betas[0] == 0:
                            for each in opt.param_groups:
                                each["betas"] = (0.0, 0.9)
                before = [W.clone(), b.clone(), [dict(opt.state[p]) for p in (W, b)]]
                yield f"{betas} unit {unit} of {reach}", [before, list(shadow)]
                opt.catch_up()
                yield f"{betas} unit {unit} of {reach} caught up", [dict(opt.state[p]) for p in (W, b)]


# ---- Ops ------------------------------------------------------------------------------------------------------------


def op_results(rows: int, d: int, features: int, fused_only: bool = False, density: float = 0.05) -> Iterator:
    """Every op but encode on a random code."""
    ops = sf.ops
    code = random_code(rows, features, density=density)
    W, A, b = randn(features, d, seed=4) / d**0.5, randn(rows, d, seed=5), 0.1 * randn(d, seed=6)
    weight = randn(features, seed=7).abs()
    yield "decode", ops.decode(code, W)
    yield "decode groups", ops.decode(code, W, groups=[0, features // 3, features])
    yield "sampled_dots", ops.sampled_dots(code, A, W)
    one = code.with_values(code.values[:1])
    for name, each in (("two", code), ("one", one)):
        yield f"decode_loss {name}", list(ops.decode_loss(each, W, b, A, weight, rows + 3))
    csc = ops.transpose(code)
    yield "transpose", [csc.colptr, csc.rows, csc.perm]
    yield "outer", ops.outer(csc, list(code.values), [A, A.flip(0)])
    yield "outer range", ops.outer(csc, [code.values[0]], [A], first_feature=features // 4, n_features=features // 2)
    yield "outer touched", ops.outer(csc, [code.values[0]], [A], features=ops.touched(csc))
    for sources in (1, 2):
        own = None if sources == 1 else 0.1 * randn(features, seed=8)
        gradient = sf.RowGradient(csc, list(code.values[:sources]), [A, A.flip(0)][:sources], own)
        for unit in (False, True):
            yield f"grad_sqnorm {sources} {unit}", ops.grad_sqnorm(gradient, W, project=unit)
            P = torch.nn.functional.normalize(W, dim=1) if unit else W.clone()
            v, last = torch.zeros_like(W), torch.zeros(features, dtype=torch.int64)
            shadow = None if sf.ops.make_shadow(P).of_gpu else ops.make_shadow(P)
            adam = dict(lr=1e-2, beta2=0.99, eps=1e-8, unit_rows=unit, grad_scale=torch.tensor(0.7), shadow=shadow)
            ops.weight_step(P, v, last, gradient, step=3, **adam)
            ops.weight_step(P, v, last, gradient, step=7, **adam)
            yield f"weight_step {sources} {unit}", [P, v, last, list(shadow or ())]
            ops.row_step(P, v, last, randn(features, d, seed=9), step=8, **adam)
            yield f"row_step {sources} {unit}", [P, v, last, list(shadow or ())]


def encoded(rows: int, d: int, features: int, precision: str, device_only: bool = False, density: float = 0.05) -> Iterator:
    p = make_inputs(rows, d, features, density=density)
    common = dict(precision=precision)
    gated = dict(activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)
    threshold = 0.3 * randn(features, seed=11)
    x = p.x - p.b_dec
    yield "gated", of_code(sf.ops.encode(x, p.W_enc, p.b_gate, **gated, **common))
    yield "gated slack", of_code(sf.ops.encode(x, p.W_enc, p.b_gate, slack=0.1, **gated, **common))
    yield "relu", of_code(sf.ops.encode(x, p.W_enc, p.b_gate, activation="relu", **common))
    jump = dict(activation="jumprelu", threshold=threshold, **common)
    yield "jumprelu", of_code(sf.ops.encode(x, p.W_enc, p.b_gate, **jump))
    yield "jumprelu slack", of_code(sf.ops.encode(x, p.W_enc, p.b_gate, slack=0.05, **jump))
    if not device_only:
        for support in ("topk", "batch_topk"):
            for k in (1, 5):
                chosen = dict(activation="relu", support=support, k=k)
                yield f"{support} {k}", of_code(sf.ops.encode(x, p.W_enc, p.b_gate, **chosen, **common))


@group
def ops():
    """Every op × instruction set × side of its density switch × backend; encode × way."""
    for rows, d, features in ((40, 33, 100), (3, 1, 31), (9, 100, 257)):
        size = f"{rows}×{d}×{features}"
        for each in _C.supported_isas():
            for route in ("sparse", "dense"):
                with isa(each), density(route):
                    for name, found in op_results(rows, d, features):
                        yield f"{size} {each} {route} {name}", found
            for way, precision in WAYS.items():
                for above in (2.0, 0.02):
                    with isa(each), ways.forced(way if way in ways.WAYS else "screen", dense_above=above):
                        for name, found in encoded(rows, d, features, precision):
                            yield f"{size} {each} {way} above {above} encode {name}", found
        with sf.use_backend("reference"):
            for name, found in op_results(rows, d, features):
                yield f"{size} reference {name}", found
            for name, found in encoded(rows, d, features, "exact"):
                yield f"{size} reference encode {name}", found
    x, W = randn(300, 40, seed=20), randn(700, 40, seed=21)
    for way, precision in WAYS.items():  # several blocks and tiles
        with ways.forced(way if way in ways.WAYS else "screen", ROWS=128, TILE=2**15, WIDEST=256):
            yield f"tiles {way}", of_code(sf.ops.encode(x, W, -1.5 * W.norm(dim=1), precision=precision, activation="relu"))
    W[3], W[5, 2], W[7] = 0, 1e-40, 1e25
    shadow = sf.ops.make_shadow(W)
    stale = W * torch.where(torch.arange(700) % 50 == 0, 1.01, 1.0)[:, None]
    columns = [bool(sf.ops.stale_columns(stale, shadow, t)) for t in range(4)]
    yield "shadow", [list(shadow), sf.ops.stale_rows(stale, shadow, 0, 700), columns]
    sf.ops.refresh_shadow(stale, shadow)
    yield "refreshed shadow", list(shadow)


@group
def layers():
    """Of every layer: codes, reconstructions, calibration, losses, gradients through functional, dtypes."""
    x = randn(4, 10, D, seed=30)
    for kind in ALL:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            options = dict(dtype=dtype, apply_b_dec_to_input=dtype != torch.float64)
            sae = layer(kind, **options)
            code = sae.encode_sparse(x)
            yield f"{kind} {dtype}", [list(sae.state_dict().values()), of_code(code), code.l0(), sae.encode(x)]
            yield f"{kind} {dtype} decode", [sae.decode(code), sae.decode(sae.encode(x)), sae(x), sae(x.bfloat16())]
            with sae.frozen():
                yield f"{kind} {dtype} frozen", [of_code(sae.encode_sparse(x)), of_code(sae.encode_sparse(x * 2))]
            with torch.autocast("cpu", torch.bfloat16):
                yield f"{kind} {dtype} autocast", [of_code(sae.encode_sparse(x)), sae(x)]
            sae.calibrate_(x, 3.7)
            yield f"{kind} {dtype} calibrated", list(sae.parameters())
        for route in ("sparse", "dense"):
            with density(route):
                sae, z = layer(kind), x.clone().requires_grad_()
                code = sae.encode_sparse(z)
                through = (code.values * randn(*code.values.shape, seed=31)).sum() + (code.u**2).sum()
                (through + (sae.decode(code) * randn(*x.shape, seed=32)).sum()).backward()
                yield (
                    f"{kind} {route} gradients",
                    [z.grad, {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}],
                )
        jump = layer("gated").to_jumprelu(apply_b_dec_to_input=False) if kind == "gated" else None
        if jump is not None:
            yield "to_jumprelu", [list(jump.parameters()), of_code(jump.encode_sparse(x))]
        yield f"{kind} repr", repr(layer(kind, precision="fp32"))
    for kind in ("topk", "batchtopk"):
        for active in (1, 2, 3):
            sae = layer(kind, group_sizes=[10, 30, 56], active_groups=active)
            code = sae.encode_sparse(x)
            yield f"{kind} groups {active}", [of_code(code), sae.decode_prefixes(code), sae.decode_prefixes(sae.encode(x))]
    sae = layer("batchtopk")
    sae.threshold.fill_(0.4)
    yield "batchtopk threshold", [of_code(sae.encode_sparse(x)), of_code(sae.encode_sparse(x, use_threshold=False))]
    for kind in TRAINED:
        for dialect in ("paper", "saelens"):
            for precision in ("exact", "fp32", "bf16"):
                for target in (None, randn(*x.shape, seed=33)):
                    for dtype in (torch.float32, torch.float64):
                        sae = layer(kind, precision=precision, dtype=dtype)
                        z = x.to(dtype).requires_grad_()
                        loss = sae.loss(z, 0.3, dialect, target=target)
                        (loss.reconstruction + 0.5 * loss.sparsity + 2 * loss.auxiliary).backward()
                        name = f"{kind} {dialect} {precision} target {target is not None} {dtype} loss"
                        yield name, [list(loss), z.grad, {n: p.grad for n, p in sae.named_parameters()}]
    p = make_inputs(20, 12, 30)
    for kind, arguments in (("gated", (p.b_gate, p.b_mag, p.r_mag)), ("relu", (p.b_gate,))):
        for dialect in ("paper", "saelens"):
            leaves = [t.clone().requires_grad_() for t in (p.x, p.W_enc, *arguments, p.W_dec, p.b_dec)]
            loss = getattr(sf.reference, f"{kind}_loss")(*leaves, 0.3, dialect)
            yield f"reference {kind} {dialect}", [list(loss), list(torch.autograd.grad(loss.total, leaves))]
    x_hat = layer("gated")(x)
    measures = ("relative_reconstruction_bias", "optimal_rescale", "legacy_bias", "fvu", "explained_variance", "cosine")
    yield "metrics", [getattr(sf.metrics, name)(x, x_hat) for name in measures]
    code = layer("gated").encode_sparse(x)
    yield "metrics of a code", [sf.metrics.feature_density(code), sf.metrics.l0(code), sf.metrics.dead_fraction(code)]


# ---- The kernels of a GPU, on a CPU ---------------------------------------------------------------------------------

SMALL = dict(rows=5, d=6, features=20)


def device_results() -> Iterator[tuple[str, object]]:
    """A few steps of the Trainer's device step, and every op."""
    for name, found in op_results(**SMALL, density=0.2):
        yield name, found
    for precision in ("exact", "bf16"):
        for name, found in encoded(**SMALL, precision=precision, device_only=True, density=0.2):
            yield f"{precision} encode {name}", found
    data = [0.8 * x for x in batches(3, 5, 6)]
    for kind in TRAINED:
        for dialect, precision, clip in (("paper", "exact", None), ("saelens", "exact", 0.3), ("paper", "bf16", 0.3)):
            options = dict(layer_options=dict(d=6, features=20, l0=3), dialect=dialect, grad_clip=clip)
            yield f"{kind} {dialect} {precision} trainer", run(trainer_of(kind, precision, **options), data)
    loud = [10 * x if i in (1, 3) else x for i, x in enumerate(data)]  # which overflow, or go the dense way
    yield "loud", run(trainer_of("gated", layer_options=dict(d=6, features=20, l0=3)), loud)


@group
def triton():
    """Triton's kernels in its interpreter."""
    with sf.use_backend("triton"):
        yield from device_results()


@group
def cuda():
    """The CUDA kernels over the tests' shim."""
    import cuda_shim

    from sae_fast.kernels import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "module", cuda_shim.load())
        with sf.use_backend("cuda"):
            p = make_inputs(5, 6, 20, density=0.2)
            gated = dict(activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)
            yield "encode", of_code(sf.ops.encode(p.x - p.b_dec, p.W_enc, p.b_gate, **gated))
            code = random_code(5, 20, density=0.2)
            W, A, b = randn(20, 6, seed=4), randn(5, 6, seed=5), randn(6, seed=6)
            yield "decode_loss", list(sf.ops.decode_loss(code, W, b, A, randn(20, seed=7).abs(), 5))
            csc = sf.ops.transpose(code)
            yield "transpose", [csc.colptr, csc.rows, csc.perm]
            yield "outer", sf.ops.outer(csc, list(code.values), [A, A.flip(0)])
            for unit in (False, True):
                P, v, last = torch.nn.functional.normalize(W, dim=1), torch.zeros(20, 6), torch.zeros(20, dtype=torch.int64)
                gradient = sf.RowGradient(csc, list(code.values), [A, A.flip(0)], 0.1 * randn(20, seed=8))
                sf.ops.weight_step(P, v, last, gradient, step=3, lr=1e-2, beta2=0.99, eps=1e-8, unit_rows=unit)
                yield f"weight_step {unit}", [P, v, last]
            data = [0.8 * x for x in batches(3, 5, 6)]
            for kind in TRAINED:
                for dialect in ("paper", "saelens"):
                    options = dict(layer_options=dict(d=6, features=20, l0=3), dialect=dialect)
                    yield f"{kind} {dialect} trainer", run(trainer_of(kind, **options), data)


# ---- Files, models, analysis ----------------------------------------------------------------------------------------


@group
def formats():
    """What each format's files hold, and what comes back from them."""
    x = randn(10, D, seed=40)
    for kind in ALL:
        for format in ("sae_fast", "dictionary_learning", "saelens", "sparsify", "saebench"):
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    sf.interop.save(layer(kind), f"{folder}/a", format, fold_decoder_norm=None, model_name="tiny", layer=1)
                    files = sorted(re.sub("-[0-9a-f]+", "-", p.name) for p in Path(folder).rglob("*") if p.is_file())
                    sae = sf.load(f"{folder}/a")
                    found: list = [files, tensors_in(folder), sae.state_dict(), of_code(sae.encode_sparse(x))]
                    found += [repr(sae), sorted(str(key) for key in sae.metadata)]
                except ValueError as error:
                    found = [str(error).replace(folder, "")]
            yield f"{kind} {format}", [*found, [str(w.message).replace(folder, "") for w in said]]


@group
def analysis():
    """Attribution, edges, splicing, fidelity, perturbation, SHIFT on small models."""
    from problems.analysis_models import KINDS, Chain, identity, random_ends, random_sae

    from sae_fast.analysis import ablate, attribution, edges, perturbation, shift, splice

    model, (clean, patch) = Chain(), random_ends()
    for kind in KINDS:
        up, down = random_sae(kind, 10, 40, 3), random_sae(kind, 8, 32, 4)
        for method in ("exact", "atp", "ig", "jump_corrected_ig"):
            got = attribution.patch(model, "c", down, clean, patch, metric=identity, method=method, steps=4)
            yield f"{kind} patch {method}", [got.effects, of_code(got.support), got.total, got.by_feature(), got.top()]
        got = attribution.patch(model, "c", down, clean, metric=identity, steps=3, rule="left")
        yield f"{kind} patch of zero", [got.effects, got.by_example()]
        for method in ("atp", "ig", "jump_corrected_ig"):
            found = edges(model, ("a", up), ("c", down), clean, patch, method=method, steps=3)
            yield f"{kind} edges {method}", [found.effects, found.exact, found.downstream, found.by_feature(), found.top()]
        found = edges(model, ("a", up), ("c", down), clean, patch, metric=identity, features=[1, 5, 9])
        yield f"{kind} edges of a metric", [found.effects, found.exact]
        for error in ("keep", "recompute", "drop"):
            z = clean.clone().requires_grad_()
            with splice(model, "c", down, error, edit=ablate([2, 3, 7])) as spliced:
                out = model(z)
            (gradient,) = torch.autograd.grad(out.sum(), z)
            yield f"{kind} splice {error}", [out, gradient, of_code(spliced.code), spliced.x_hat, spliced.residual]
    torch.manual_seed(0)
    change = perturbation.Change("c")
    directions = perturbation.sphere(model, "a", clean[:, 0, :], change, radius=1.0, directions=2, steps=20, starts=2)
    yield "sphere", [directions.theta, directions.objective, directions.history]
    probe = shift.Probe(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(6, 8)).double(), "1", 8).double()
    with torch.no_grad():
        probe.head.weight.copy_(randn(2, 8, seed=1))
    work = shift.Shift(probe, {"model.1": random_sae("gated", 8, 24, 1)})
    effects = work.effects([clean, patch], lambda logits: logits[:, 1] - logits[:, 0], steps=3)
    yield "shift", [effects, [(c.site, c.feature) for c in shift.strongest(effects, top=3)]]


@group
def models():
    """A harvest, a feature store, fidelity and the commands, on a tiny transformer."""
    import numpy as np
    import transformers
    from problems.tiny_models import save_tiny_model
    from typer.testing import CliRunner

    from sae_fast.analysis import FeatureStore, fidelity, write_store
    from sae_fast.cli import app

    text = "The gate opens when its sum is above zero . A sum of the gate and zero . " * 40
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary)
        patch.setenv("SAE_FAST_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        (folder / "text.txt").write_text(text)
        for kind in ("gpt2", "bert"):
            save_tiny_model(transformers, kind, folder / kind)
            options = dict(model=folder / kind, layer=1, text="text.txt", out=f"out-{kind}", d_sae=32, steps=30)
            options |= dict(batch_size=64, context_length=16, init_l0=4, l1=0.5, lr=1e-3)
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            done = CliRunner().invoke(app, ["train", *flags], env={"COLUMNS": "200"})
            assert done.exit_code == 0, done.output
            out = folder / f"out-{kind}"
            metrics = json.loads((out / "metrics.json").read_text())
            history = [{k: v for k, v in each.items() if k != "seconds"} for each in metrics["history"]]
            yield f"{kind} train", [metrics["held_out"], history, metrics["training"]["scale"]]
            yield f"{kind} features.md", (out / "features.md").read_text().replace(temporary, "")
            sae = sf.load(out / "checkpoint")
            yield f"{kind} checkpoint", list(sae.state_dict().items())
            done = CliRunner().invoke(
                app, ["encode", str(out), "--out", str(folder / f"code-{kind}")], env={"COLUMNS": "200"}
            )
            assert done.exit_code == 0, done.output
            store = FeatureStore.open(folder / f"code-{kind}", sae)
            table = store.sql("SELECT * FROM activations ORDER BY token, feature").fetchnumpy()
            yield f"{kind} encode", [[name, np.ma.filled(table[name])] for name in sorted(table)]
            yield f"{kind} top", str([(c.token, c.activation) for c in store.top(int(store.density().argmax()), 5)])
        harvests = sorted((folder / "cache").rglob("store.json"))
        for at in harvests:
            model = json.loads(at.read_text())["model"].rsplit("/")[-1]
            for name in ("activations.npy", "tokens.npy", "spans.npy"):
                yield f"{model} harvest {name}", (at.parent / name).read_bytes()
            yield f"{model} harvest key", at.parent.name
        sae = layer("gated")
        write_store(folder / "store", sae, randn(600, D, seed=50), batch_size=64)
        files = sorted(p for p in (folder / "store").rglob("*") if p.suffix == ".parquet")
        yield "store", [[p.relative_to(folder).as_posix() for p in files], [p.read_bytes() for p in files]]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "gpt2").eval()
        ids = torch.arange(48).view(4, 12) % 16
        small = sf.load(folder / "out-gpt2/checkpoint")
        yield "fidelity", [repr(fidelity(model, "transformer.h.1", small, [ids]))]


# ---- The peers' trainers, in their environment ----------------------------------------------------------------------


@group
def peers():
    """The drop-ins, run by the peers' own python."""
    if importlib.util.find_spec("sae_lens") is None:
        command = [str(PEERS), __file__, "--print", "--only", "peers"]
        out = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
        assert out.returncode == 0, out.stderr
        yield from json.loads(out.stdout.splitlines()[-1]).items()
        return
    with contextlib.redirect_stdout(io.StringIO()):
        found = [*of_dictionary_learning(), *of_saelens()]
    yield from found


def of_dictionary_learning() -> Iterator[tuple[str, object]]:
    from sae_fast.interop import dictionary_learning as ours

    for name, cls in (("gated", ours.GatedSAETrainer), ("standard", ours.StandardTrainer)):
        for init_l0 in (None, 5):
            for resampling in (None, 15) if name == "standard" else (None,):
                arguments = dict(steps=60, activation_dim=D, dict_size=F, seed=0, lr=3e-3, l1_penalty=0.5, layer=3)
                arguments |= dict(lm_name="m", device="cpu", warmup_steps=10, sparsity_warmup_steps=20, init_l0=init_l0)
                trainer = cls(**arguments, **({} if resampling is None else {"resample_steps": resampling}))
                torch.manual_seed(4)
                losses = []
                for step, x in enumerate(batches(30)):
                    trainer.update(step, x)
                    if step % 10 == 0:
                        log = trainer.loss(x, step=step, logging=True)
                        losses += [log.x_hat, log.f, log.losses]
                loss = trainer.loss(x, step=step)
                gradients = torch.autograd.grad(loss, list(trainer.ae.parameters()), allow_unused=True)
                found = [losses, loss, list(gradients), list(trainer.ae.state_dict().items())]
                yield f"dictionary_learning {name} {init_l0} {resampling}", digest(found)


def of_saelens() -> Iterator[tuple[str, object]]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.training.sae_trainer import SAETrainer

    from sae_fast.interop import saelens as ours

    kinds = {
        "gated": (ours.GatedTrainingSAE, ours.GatedTrainingSAEConfig),
        "standard": (ours.StandardTrainingSAE, ours.StandardTrainingSAEConfig),
    }
    for name, (cls, config) in kinds.items():
        for centred in (True, False):
            for bias in (0.0, -0.5):
                for route in ("sparse", "dense", "natural"):
                    with density(route):
                        torch.manual_seed(0)
                        options = dict(d_in=D, d_sae=F, l1_coefficient=0.5, apply_b_dec_to_input=centred)
                        sae = cls(config(**options))
                        with torch.no_grad():
                            sae.get_parameter("b_gate" if name == "gated" else "b_enc").add_(bias)
                        trainer = SAETrainer(SAETrainerConfig(30 * B, B, lr=1e-3, lr_end=1e-4), sae, iter(()))
                        outs = [trainer.step(x) for x in batches(20)]
                        logs = [[out.loss, out.losses, out.sae_out, out.feature_acts.to_dense()] for out in outs]
                        given = TrainStepInput(
                            sae_in=batches(21)[20], coefficients={"l1": 0.7}, dead_neuron_mask=None, n_training_steps=0,
                            is_logging_step=False,
                        )  # fmt: skip
                        out = sae.training_forward_pass(given)
                        (out.losses["mse_loss"] + out.sae_out.square().sum()).backward()
                        found = [logs, {n: [p, p.grad] for n, p in sae.named_parameters()}, sae.encode(given.sae_in)]
                        yield f"saelens {name} {centred} {bias} {route}", digest(found)


# ---- The command ----------------------------------------------------------------------------------------------------


def machine() -> dict:
    return {
        "isas": list(_C.supported_isas()), "bfloat16": ways.WHY_NOT or "native", "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def computed(groups: list[str]) -> dict[str, str]:
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for name in groups:
        for label, what in GROUPS[name]():
            key = f"{name}: {label}"
            assert key not in found, key
            found[key] = what if name == "peers" and isinstance(what, str) else digest(what)
        print(f"{name}: {sum(key.startswith(name + ':') for key in found)} digests", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = computed(options.only)
    if options.print:
        print(json.dumps({key.removeprefix("peers: "): value for key, value in found.items()}))
        return 0
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {"machine": machine(), "digests": {}}
    kept = {key: value for key, value in recorded["digests"].items() if key.split(":")[0] in options.only}
    if options.record:
        rest = {key: value for key, value in recorded["digests"].items() if key not in kept}
        both = {"machine": machine(), "digests": dict(sorted({**rest, **found}.items()))}
        FILE.write_text(json.dumps(both, indent=0, ensure_ascii=False) + "\n")
        return 0
    if recorded["machine"] != machine():
        print(f"recorded on {recorded['machine']}, this is {machine()}")
        return 2
    wrong = sorted(key for key in {*kept, *found} if kept.get(key) != found.get(key))
    for key in wrong:
        print(f"{key}: {kept.get(key, 'not recorded')} became {found.get(key, 'nothing')}")
    print(f"{len(wrong)} of {len(kept)} digests differ")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
