"""setup.py: who gets the CUDA module, what is said where nvcc is missing, and what the module does without a driver."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "cuda_build"  # kept: the next run compiles what has changed
NO_NVCC = "no nvcc: the GPU ops run on their Triton kernels"


@pytest.fixture
def its(monkeypatch):
    """What setup.py defines, in a world without a wish, an nvcc or a GPU."""
    monkeypatch.chdir(ROOT)
    for name in ("SAE_FAST_CUDA", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    found = runpy.run_path("setup.py", run_name="sae_fast_setup")
    scope = found["cuda_extensions"].__globals__
    monkeypatch.setitem(scope, "has_gpu", lambda: False)
    return scope


def tool(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("wish", ["", "1"])
@pytest.mark.parametrize("gpu", [False, True])
def test_no_nvcc_is_one_line(its, monkeypatch, tmp_path, capsys, wish, gpu):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # which decides alone, and is empty
    monkeypatch.setenv("SAE_FAST_CUDA", wish)
    monkeypatch.setitem(its, "has_gpu", lambda: gpu)
    if wish:
        with pytest.raises(SystemExit, match=r"^SAE_FAST_CUDA=1: no nvcc.*$"):
            its["cuda_extensions"]()
        return
    assert its["cuda_extensions"]() == []
    assert capsys.readouterr().err == (f"{NO_NVCC}\n" if gpu else "")


@pytest.mark.parametrize(("wish", "gpu", "builds"), [("", False, 0), ("", True, 1), ("0", True, 0), ("1", False, 1)])
def test_it_is_built_when_asked_for_or_with_a_gpu(its, monkeypatch, tmp_path, wish, gpu, builds):
    monkeypatch.setenv("PATH", tool(tmp_path / "bin", "nvcc", "exit 0"))
    monkeypatch.setenv("SAE_FAST_CUDA", wish)
    monkeypatch.setitem(its, "has_gpu", lambda: gpu)
    found = its["cuda_extensions"]()
    assert [ext.name for ext in found] == ["sae_fast._C_cuda"] * builds
    if found:
        assert its["find_nvcc"]() == str(tmp_path / "bin" / "nvcc")
        assert {Path(s).name for s in found[0].sources} >= {"bindings_cuda.cpp", "decode_loss.cu"}


def test_another_wish_is_refused(its, monkeypatch):
    monkeypatch.setenv("SAE_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="got 'yes', want 0, 1 or nothing"):
        its["cuda_extensions"]()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
@pytest.mark.parametrize(("text", "gpu"), [("echo GPU 0: an A100", True), ("exit 0", False), ("echo no; exit 9", False)])
def test_a_gpu_is_one_that_nvidia_smi_lists(monkeypatch, tmp_path, text, gpu):
    monkeypatch.chdir(ROOT)
    has_gpu = runpy.run_path("setup.py", run_name="sae_fast_setup")["has_gpu"]
    monkeypatch.setenv("PATH", tool(tmp_path / "bin", "nvidia-smi", text))
    assert has_gpu() is gpu
    monkeypatch.setenv("PATH", str(tmp_path))
    assert has_gpu() is False


# ---- The module -----------------------------------------------------------------------------------------------------

BUILD = """
import runpy, sys
from setuptools import setup
its = runpy.run_path("setup.py", run_name="sae_fast_setup")
lib, temp = sys.argv[1:]
setup(name="sae_fast", packages=[], ext_modules=its["cuda_extensions"](), cmdclass={"build_ext": its["Build"]},
      script_args=["--quiet", "build_ext", "--build-lib", lib, "--build-temp", temp])
"""

# Every function with 0 (no rows, so nothing is launched), then 1 for each of its numbers and addresses: a launch.
CALLS = """
import importlib.util, json, re, sys, torch
spec = importlib.util.spec_from_file_location("sae_fast._C_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
outcomes = {}
for name, function in vars(module).items():
    if callable(function) and not isinstance(function, type):
        kinds = re.findall(r"arg[0-9]+: ([^,)]+)", function.__doc__)
        for number in (0, 1) if sys.argv[2] == "launch" else (0,):
            arguments = [module.Storage.float32 if "Storage" in k else type(number)(number) for k in kinds]
            try:
                outcomes[f"{name} {number}"] = repr(function(*arguments))
            except Exception as error:
                outcomes[f"{name} {number}"] = f"{type(error).__name__}: {error}"
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def module():
    scope = runpy.run_path(str(ROOT / "setup.py"), run_name="sae_fast_setup")
    if scope["find_nvcc"]() is None:
        pytest.skip("there is no nvcc")
    command = [sys.executable, "-c", BUILD, str(FOLDER / "lib"), str(FOLDER / "temp")]
    environment = {**os.environ, "SAE_FAST_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((FOLDER / "lib" / "sae_fast").glob("_C_cuda*.so"))


@pytest.mark.slow
def test_it_is_built_and_imported_beside_torch_without_a_driver(module):
    driver = "launch" if not torch.cuda.is_available() else "no launch"  # with a driver, address 1 would be read
    found = subprocess.run([sys.executable, "-c", CALLS, str(module), driver], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    outcomes = json.loads(found.stdout)
    assert "residuals 0" in outcomes
    for call, outcome in outcomes.items():
        if call.endswith("0"):
            assert outcome == "None", call
        else:
            assert re.fullmatch(r"RuntimeError: [\w, ]+ \(.*\d.*\): .*driver.*", outcome), (call, outcome)


@pytest.mark.slow
def test_it_carries_machine_code_and_ptx(module):
    tools = pytest.importorskip("triton").__path__[0] + "/backends/nvidia/bin/cuobjdump"
    if not Path(tools).exists():
        pytest.skip("there is no cuobjdump")
    listed = subprocess.run([tools, "--list-elf", "--list-ptx", str(module)], capture_output=True, text=True).stdout
    for kind in ("sm_80.cubin", "sm_90.*cubin", "sm_80.ptx", "sm_90.ptx"):
        assert re.search(rf"decode_loss.*\.{kind}", listed), listed
