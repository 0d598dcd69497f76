"""Push to the Hub and load from it, over HTTP, with a Hub on this machine (tests/hub_server.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, same_bits
from problems.hub_server import Server

pytest.importorskip("huggingface_hub", reason="huggingface_hub is an optional extra")

import sae_fast as sf
from sae_fast import interop
from sae_fast.interop import hub


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "hub")
    yield server
    server.close()


def client(server: Server, tmp_path: Path, script: str) -> dict:
    """What a fresh process with that Hub prints as JSON: its address is read when huggingface_hub is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
        "PYTHONPATH": str(Path(sf.__file__).parents[1]),
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    head = "import json, torch, sae_fast as sf\nfrom sae_fast import interop\n"
    done = subprocess.run(
        [sys.executable, "-c", head + script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
sae = sf.GatedSAE(8, 20, seed=3)
formats, about = ("sae_fast", "saelens", "saebench"), dict(model_name="m", layer=2)
interop.push_to_hub(sae, "user/saes", "saelens", folder="v5_32k_layer_0.pt")
urls = [interop.push_to_hub(sae, "user/saes", f, folder=f, **about) for f in formats]
print(json.dumps([str(u) for u in urls]))
"""
LOAD = """
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
wanted = sf.GatedSAE(8, 20, seed=3)
places = ["user/saes/sae_fast", "user/saes/saelens", "user/saes/saebench/ae.pt", "user/saes/saelens@main",
          "user/saes/v5_32k_layer_0.pt", "user/saes/v5_32k_layer_0.pt/"]
assert sf.load(places[2]).metadata["layer"] == 2, "its config came along"
loaded = [sf.load(p) for p in places]
print(json.dumps([all(torch.equal(a, b) for a, b in zip(s.parameters(), wanted.parameters())) for s in loaded]))
"""
FAIL = """
found = []
for place in ("user/none", "user/saes/nowhere", "user/saes"):
    try:
        sf.load(place)
    except (FileNotFoundError, ValueError) as error:
        found.append(type(error).__name__ + ": " + str(error))
print(json.dumps(found))
"""


def test_what_is_pushed_is_loaded_from_another_process(server, tmp_path):
    urls = client(server, tmp_path, PUSH)
    assert all(url.startswith(f"{server.url}/user/saes/commit/") for url in urls)
    assert sorted(p.name for p in (tmp_path / "hub/user/saes/saelens").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    (tmp_path / "hub/user/saes/README.bin").write_text("not an SAE")
    below = tmp_path / "hub/user/saes/saelens/checkpoints"
    below.mkdir()
    (below / "sae_weights.safetensors").write_text("another")
    server.log.clear()
    assert client(server, tmp_path, LOAD) == [True] * 6
    fetched = {line.partition("/resolve/")[2].partition("/")[2] for line in server.log if "/resolve/" in line}
    assert {f.partition("/")[0] for f in fetched} == {"sae_fast", "saelens", "saebench", "v5_32k_layer_0.pt"}
    assert not [f for f in fetched if "checkpoints" in f or "README" in f], "only what is needed is fetched"
    (below / "sae_weights.safetensors").unlink()
    repo, folder, several = client(server, tmp_path, FAIL)
    assert repo.startswith("FileNotFoundError: path: there is no 'user/none' here, and the Hub gave no 'user/none'")
    assert folder.startswith("FileNotFoundError: path: user/saes on the Hub holds no SAE in 'nowhere'")
    assert "there are weights in sae_fast, saebench, saelens, v5_32k_layer_0.pt: name one of them" in several


def test_what_is_known_but_not_read_is_named_by_the_names_on_the_hub(server, tmp_path):
    files = {
        "layer_20/width_16k/average_l0_71/params.npz": "Gemma Scope",
        "resid_post/layer_3/params.safetensors": "Gemma Scope 2",
        "L3R-8x/hyperparams.json": "Llama Scope",
        "layer3.sae.pt": "Qwen-Scope",
    }
    for name in files:
        (tmp_path / "hub/user/other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub/user/other" / name).write_text("unread")
    (tmp_path / "hub/user/other/L3R-8x/checkpoints").mkdir()
    (tmp_path / "hub/user/other/L3R-8x/checkpoints/final.safetensors").write_text("unread")
    places = [f"user/other/{name}".rpartition("/")[0] for name in files]
    script = FAIL.replace('("user/none", "user/saes/nowhere", "user/saes")', repr(tuple(places)))
    server.log.clear()
    for said, format in zip(client(server, tmp_path, script), files.values(), strict=True):
        assert f"this is of {format}, a format that is known but cannot be read yet" in said, said
    assert not [line for line in server.log if "/resolve/" in line and not line.endswith(".json")], "no weights are fetched"


def test_a_folder_here_comes_before_one_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sae = sf.ReluSAE(8, 20, seed=1)
    interop.save(sae, "user/repo", "saelens")
    again = sf.load("user/repo")
    assert all(same_bits(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "place, parts",
    [
        ("user/repo", ("user/repo", None, None)),
        ("user/repo/", ("user/repo", None, None)),
        ("user/repo-1.0/a/b", ("user/repo-1.0", "a/b", None)),
        ("user/repo/a/ae.pt@v1.2", ("user/repo", "a/ae.pt", "v1.2")),
        ("user/repo@refs/pr/3", ("user/repo", None, "refs/pr/3")),
    ],
)
def test_places_on_the_hub(place, parts):
    found = hub.PLACE.fullmatch(place)
    assert found is not None and (found["repo"], found["inside"], found["revision"]) == parts


@pytest.mark.parametrize("place", ["repo", "/user/repo", "./user/repo", "~/saes/x", "a b/c", ""])
def test_what_is_no_place_on_the_hub(place):
    with pytest.raises(FileNotFoundError, match="no place on the Hub"):
        hub.fetch(place)


def test_an_sae_that_the_format_cannot_hold_is_not_pushed():
    with pytest.raises(ValueError, match="sparsify cannot hold"):
        interop.push_to_hub(sf.GatedSAE(8, 20, seed=0), "user/repo", "sparsify")
    assert torch.get_default_dtype() == torch.float32
