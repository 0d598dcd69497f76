"""``import sae_fast``: what it brings along, and the names that stay."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE

import sae_fast as sf

PEERS = ["dictionary_learning", "sae_lens", "sparsify", "sae_bench"]
HEAVY = ["transformers", "matplotlib", "triton", "pandas", "pyarrow", "duckdb", "huggingface_hub", *PEERS]


def in_a_fresh_process(script: str):
    """What the script prints as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_import_brings_no_heavy_optional_package_along_prints_nothing_and_starts_no_gpu():
    script = f"""
import json, sys
import torch
before = set(sys.modules)
import sae_fast
assert callable(sae_fast.GatedSAE)
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([sorted(new & set({HEAVY})), sorted(set({HEAVY}) & set(sys.modules)), torch.cuda.is_initialized()]))
"""
    (brought, present, gpu), stderr = in_a_fresh_process(script)
    assert brought == [], "imported by sae_fast"
    assert set(present) <= {"triton"}, "imported by torch itself"
    assert not gpu
    assert stderr == ""


def test_the_import_changes_no_setting_of_torch():
    script = """
import json
import torch
torch.set_num_threads(2)
def settings():
    return [
        torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.initial_seed(),
        torch.get_rng_state().tolist(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        torch.get_flush_denormal() if hasattr(torch, "get_flush_denormal") else None,
        float(torch.tensor(1e-40) * 1) > 0,
    ]
before = settings()
import sae_fast
print(json.dumps(before == settings()))
"""
    assert in_a_fresh_process(script)[0] is True


def test_the_public_names_exist():
    assert {name for name in sf.__all__ if not hasattr(sf, name)} == set()
    for name in (
        *("GatedSAE", "ReluSAE", "JumpReluSAE", "TopKSAE", "BatchTopKSAE", "Trainer", "RowAdam", "SparseCode"),
        *("use_backend", "save", "load", "interop", "metrics", "ops", "reference"),
    ):
        assert name in sf.__all__, name
    for name in ("gated_loss", "gated_encode"):
        assert callable(getattr(sf.reference, name))
    for name in ("encode", "decode", "sampled_dots", "outer", "decode_loss", "weight_step", "grad_sqnorm", "transpose"):
        assert callable(getattr(sf.ops, name)), name
    for name in ("relative_reconstruction_bias", "projection_bias", "optimal_rescale", "legacy_bias"):
        assert callable(getattr(sf.metrics, name)), name
    assert isinstance(sf.__version__, str)


def test_the_layer_has_the_parameters_methods_and_arguments_that_are_promised():
    sae = sf.GatedSAE(d_in=4, d_sae=8, dtype=torch.float32, device=None)
    shapes = {name: tuple(p.shape) for name, p in sae.named_parameters()}
    assert shapes == {"W_enc": (8, 4), "b_gate": (8,), "b_mag": (8,), "r_mag": (8,), "W_dec": (8, 4), "b_dec": (4,)}
    x = torch.randn(3, 4)
    code = sae.encode_sparse(x)
    assert tuple(code.shape) == (3, 8)
    assert (code.indptr.dtype, code.indices.dtype) == (torch.int64, torch.int32)
    assert code.indptr.shape == (4,) and code.indices.shape == code.magnitudes.shape == code.gates.shape == code.u.shape
    assert code.nnz == code.indices.shape[0] and code.to_dense().shape == (3, 8) and code.l0().shape == (3,)
    assert sae.encode(x).shape == (3, 8)
    assert sae.decode(code).shape == sae.decode(sae.encode(x)).shape == sae(x).shape == (3, 4)
    for dialect in ("paper", "saelens"):
        loss = sae.loss(x, l1_coefficient=0.5, dialect=dialect)
        for term in ("total", "reconstruction", "sparsity", "auxiliary"):
            assert getattr(loss, term).shape == () and getattr(loss, term).requires_grad, term
    sae.calibrate_(x, l0=2)
    assert isinstance(sae.to_jumprelu(), sf.JumpReluSAE)


def test_the_trainer_has_the_arguments_defaults_and_log_that_are_promised():
    parameters = inspect.signature(sf.Trainer).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert list(defaults)[:4] == ["sae", "lr", "l1_coefficient", "betas"]
    assert (defaults["lr"], defaults["betas"]) == (3e-4, (0.0, 0.999))
    for name in ("init_l0", "grad_clip", "lr_decay_start", "total_steps"):
        assert defaults[name] is None, "weights as given and nothing clipped or scheduled unless asked for"
    assert defaults["lr_warmup_steps"] == defaults["l1_warmup_steps"] == 0 and defaults["dialect"] == "paper"
    log = sf.Trainer(sf.GatedSAE(4, 8), lr=3e-4, l1_coefficient=1.0, betas=(0.0, 0.999)).step(torch.randn(3, 4))
    for field in ("loss", "reconstruction", "sparsity", "auxiliary", "l0"):
        assert isinstance(getattr(log, field), float), field


def test_a_backend_is_forced_inside_the_with_block_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # whose interpreter takes tensors on the CPU
    sae, x = sf.GatedSAE(4, 8, seed=0), torch.randn(3, 4)
    with sf.use_backend("reference"):
        inside = sae.encode(x)
    torch.testing.assert_close(sae.encode(x), inside)
    with pytest.raises(ValueError, match="use_backend\\('triton'\\)"), sf.use_backend("triton"):
        sae.encode(x)
    sae.encode(x)
    with pytest.raises(ValueError, match="name: got 'fpga'"), sf.use_backend("fpga"):
        pass


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    "module, extra", [("dictionary_learning", "dictionary-learning"), ("saelens", "saelens"), ("saebench", "saebench")]
)
def test_a_module_for_a_package_that_is_not_there_names_the_extra(module, extra):
    script = f"""
import importlib, json, sys
for name in {PEERS}:
    sys.modules[name] = None  # as if it were not installed
try:
    importlib.import_module("sae_fast.interop.{module}")
except ImportError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    name, message = in_a_fresh_process(script)[0]
    assert name == "MissingExtra" and f"pip install 'sae-fast[{extra}]'" in message
