"""A GPU of any compute capability takes the kernels of a generation that is known, and the log says whose."""

import logging
import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sae_fast.kernels import _config, _launch, native
from sae_fast.kernels._generations import GENERATIONS, nearest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    """Puts a GPU of a capability in the place of this machine's."""

    def put(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "module", object())
    monkeypatch.delenv("SAE_FAST_TUNING", raising=False)
    _config._of.cache_clear()
    return put


@pytest.mark.parametrize(
    ("capability", "takes", "says"),
    [
        ((7, 5), 80, "7.5: .* Ampere's"), ((8, 0), 80, ""), ((8, 6), 80, "8.6: .* Ampere's"),
        ((8, 9), 80, "8.9: .* Ampere's"), ((9, 0), 90, ""), ((10, 0), 90, "10.0: .* Hopper's"),
        ((12, 0), 90, "12.0: .* Hopper's"),
    ],
)  # fmt: skip
def test_the_nearest_generation_and_why(gpu, caplog, capability, takes, says):
    gpu(*capability)
    caplog.set_level(logging.INFO, "sae_fast")
    for _ in range(2):
        assert _config.generation() == takes
    assert len(caplog.messages) == bool(says)
    assert re.search(says, "".join(caplog.messages))
    for op, wanted in _config.SHIPPED[takes].items():
        assert _config.config(op) == wanted
        assert native.takes(op) is (op in GENERATIONS[takes].faster)


def test_a_new_generation_is_taken_by_what_is_no_older(monkeypatch):
    monkeypatch.setitem(GENERATIONS, 100, GENERATIONS[90]._replace(name="Blackwell"))
    assert [nearest(c) for c in (75, 80, 89, 90, 99, 100, 103, 120)] == [80, 80, 80, 90, 90, 100, 100, 100]


def test_every_generation_is_whole():
    """The same ops and keys in each: what is known of one is known of all."""
    assert _config.SHIPPED.keys() == GENERATIONS.keys() == native.FASTER.keys()
    keys = [{op: set(values) for op, values in shipped.items()} for shipped in _config.SHIPPED.values()]
    assert all(each == keys[0] for each in keys)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="setup.py is not next to tests/")
def test_setup_compiles_for_each(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert runpy.run_path("setup.py", run_name="sae_fast_setup")["gencode"]() == [
        "-gencode", "arch=compute_80,code=[sm_80,compute_80]", "-gencode", "arch=compute_90a,code=sm_90a",
        "-gencode", "arch=compute_90,code=compute_90",
    ]  # fmt: skip
