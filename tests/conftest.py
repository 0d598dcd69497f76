"""Fixtures for every test: fresh memory is poisoned, process-wide settings are restored, GPU tests skip with a reason."""

from __future__ import annotations

import os
import signal
from collections import Counter
from threading import RLock

# Whoever starts the tests in the background may have had Ctrl-C ignored; several of them press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch starts OpenMP: thousands of tiny parallel regions, whose threads would spin for each other, several times
# slower where the cores are shared with anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # one of the peers, read on its import: its kernels want a GPU

import pytest
import torch

# Before anything imports Triton: without a GPU its interpreter runs the kernels.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import interpreter
import routes
import ways
from hypothesis import HealthCheck, settings
from tqdm import tqdm

from sae_fast.ops import crossovers, dense_step, dispatch

# tqdm's own lock is shared with forked processes: one that is killed while it holds it would stop all others.
tqdm.set_lock(RLock())

# Examples are drawn from a fixed seed: a test that passes here passes everywhere.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--without-bf16", action="store_true", help="run as on a processor that has no bfloat16 product")


def pytest_configure(config):
    if config.option.without_bf16:
        ways.take_bf16_away()
    if os.environ["TRITON_INTERPRET"] == "1":
        interpreter.quicken()
    if not config.pluginmanager.hasplugin("benchmarks.gpu.live"):  # which runs with whatever packages there are
        routes.count()
        config.pluginmanager.register(routes.Report(config))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    _keep_first_cases(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda is not available on this machine"))


def _keep_first_cases(items):
    """``slow(but=n)``: the first n cases of a test stay in the first tier; with ``of_gpu`` those of each body of a GPU, and
    all of other bodies."""
    cases = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow is not None and "but" in slow.kwargs:
            body = item.callspec.params["body"] if slow.kwargs.get("of_gpu") else None
            test = (item.path, item.cls, item.originalname, str(body))
            cases[test] += 1
            if cases[test] <= slow.kwargs["but"] or (body is not None and not body.of_gpu):
                item.own_markers.remove(slow)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty and its kin give NaN (integers: the largest), inside the ops too: what no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def restored_settings():
    """The thread count and the instruction set are process-wide."""
    threads, engine = torch.get_num_threads(), dispatch._C
    isa = engine.isa()
    yield
    torch.set_num_threads(threads)
    engine.set_isa(isa)


@pytest.fixture(params=dispatch._C.supported_isas())
def isa(request):
    """Runs the test once for each instruction set that this machine has; ``restored_settings`` undoes it."""
    dispatch._C.set_isa(request.param)
    return request.param


@pytest.fixture(params=["sparse", "dense"])
def route(request, monkeypatch):
    """Runs the test on either side of every op's density switch."""
    crossover = {"sparse": float("inf"), "dense": -1.0}[request.param]
    for op in crossovers.CROSSOVER:
        monkeypatch.setitem(crossovers.CROSSOVER, op, crossover)
    return request.param


@pytest.fixture(params=["engine", "torch"])
def dense_way(request, monkeypatch):
    """The dense way through a step, with the engine between its products and, as on a GPU, with torch."""
    monkeypatch.setitem(crossovers.CROSSOVER, "step", -1.0)
    if request.param == "torch":
        monkeypatch.setattr(dense_step, "_native", lambda *_: False)


@pytest.fixture
def body(request, monkeypatch):
    """Forces the body of an op that the test is given by one of the marks of problems/bodies.py."""
    from problems.bodies import TILES

    taken = request.param
    if taken.backend == "cuda":
        request.getfixturevalue("cuda_calls")
    if taken.isa:
        dispatch._C.set_isa(taken.isa)
    for op in crossovers.CROSSOVER if taken.route in ("sparse", "dense") else ():
        monkeypatch.setitem(crossovers.CROSSOVER, op, {"sparse": float("inf"), "dense": -1.0}[taken.route])
    if taken.of_gpu:
        pytest.importorskip("triton")
        from sae_fast.kernels import _config

        for generation in _config.SHIPPED.values() if taken.route != "shipped" else ():
            for op, tiles in TILES.items():
                monkeypatch.setitem(generation, op, {**generation[op], **tiles})
    with dispatch.use_backend(taken.backend):
        yield taken


@pytest.fixture
def screened(monkeypatch):
    """A bfloat16 product, whatever the processor: where there is a shadow it is used."""
    ways.take_product(monkeypatch, "screen")


@pytest.fixture
def cuda_calls(monkeypatch):
    """Forces the CUDA kernels, over the tests' shim where there is no GPU; lists the functions that were called."""
    pytest.importorskip("triton")
    import cuda_shim

    from sae_fast.kernels import native

    if not torch.cuda.is_available():
        monkeypatch.setattr(native, "module", cuda_shim.load())
    elif native.module is None:
        pytest.skip("the extension sae_fast._C_cuda is not built")
    names, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *given: names.append(name) or call(name, *given))
    with dispatch.use_backend("cuda"):
        yield names
    if not torch.cuda.is_available():
        cuda_shim.load().set_schedule(0)  # a test may have put another module there
