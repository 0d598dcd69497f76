"""Push to the Hub and load from it, over HTTP, with a Hub on this machine (tests/hub_server.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, same_bits
from problems.hub_server import COMMIT, Server
from problems.published import PUBLISHED, D, gemma_scope

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
    files = sorted(p.name for p in (tmp_path / "hub/user/saes/saelens").iterdir())
    assert files == ["README.md", "cfg.json", "sae_weights.safetensors"]
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


CARDS = """
import warnings
from pathlib import Path
sae, repo = sf.TopKSAE(8, 20, k=3, seed=0), Path(HUB) / "user/cards"
sae.metadata = {"model_name": "user/model", "layer": 2, "hook_name": "a|b"}
push = lambda **k: interop.push_to_hub(sae, "user/cards", "saelens", folder="a", **k)
push(card=False)
found = [(repo / "a/README.md").exists()]
push(metrics={"fvu": 0.25, "name": "left out"})
found.append((repo / "a/README.md").read_text())
push(layer=3)
found.append((repo / "a/README.md").read_text())
(repo / "a/README.md").write_text(found[-1].replace("features", "wonders"))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    push()
found += [(repo / "a/README.md").read_text(), [str(w.message) for w in said if "README" in str(w.message)]]
push(card=True)
found.append((repo / "a/README.md").read_text())
print(json.dumps(found))
"""


def test_a_model_card_goes_along_and_one_of_others_stays(server, tmp_path):
    first_is, first, second, others, said, asked = client(
        server, tmp_path, CARDS.replace("HUB", repr(str(tmp_path / "hub")))
    )
    assert not first_is
    for line in (
        'base_model: "user/model"', "# TopKSAE, 20 features", "| d_in | 8 |", "| k | 3 |", "| layer | 2 |",
        "| takes the activations of | a\\|b |", "| fvu | 0.25 |", 'sae = sf.load("user/cards/a")',
        'sae = SAE.load_from_disk(snapshot_download("user/cards") + "/a")',
    ):  # fmt: skip
        assert line in first.splitlines(), line
    assert "left out" not in first and "| layer | 3 |" in second and "Metrics" not in second, "ours is replaced"
    assert "20 wonders" in others and "user/cards/a/README.md is not this package's" in said[0]
    assert "20 features" in asked and "wonders" not in asked


def test_what_is_refused_is_named_by_the_names_on_the_hub(server, tmp_path):
    files = {
        "clt/width_262k_l0_medium/params_layer_0.safetensors": "Gemma Scope 2's cross-layer transcoders",
        "layer_12/temporal/latest_ckpt.safetensors": "temporal SAEs",
        "a/W_enc_0.safetensors": "circuit-tracer's cross-layer transcoders",
        "b/sae_weights.dcp/.metadata": "Llamascopium's sharded checkpoints",
    }
    for name in files:
        (tmp_path / "hub/user/other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub/user/other" / name).write_text("unread")
    places = [f"user/other/{name}".rpartition("/")[0] for name in files]
    script = FAIL.replace('("user/none", "user/saes/nowhere", "user/saes")', repr(tuple(places)))
    server.log.clear()
    for said, format in zip(client(server, tmp_path, script), files.values(), strict=True):
        assert said.startswith("ValueError") and f"is of {format}, which are refused: " in said, said
    assert not [line for line in server.log if "/resolve/" in line], "nothing is fetched"


PUBLISHED_ONES = """
import warnings
warnings.simplefilter("ignore")
loaded = [sf.load(place) for place in PLACES]
print(json.dumps([[type(s).__name__, {k: v for k, v in s.metadata.items() if k != "configs"}] for s in loaded]))
"""


def test_published_saes_are_fetched_by_their_places_and_nothing_else_is(server, tmp_path):
    saes = {f"{p.repo}/{p.place}": p for p in reversed(PUBLISHED.values()) if not p.options}
    for published in saes.values():
        published.write(tmp_path / "hub")
    places = [place + "@main" * (i % 2) for i, place in enumerate(saes)]
    found = client(server, tmp_path, PUBLISHED_ONES.replace("PLACES", repr(places)))
    for published, (kind, metadata) in zip(saes.values(), found, strict=True):
        assert kind == published.kind and metadata.items() >= published.metadata.items()
    fetched = {line.split(" ")[1][1:].replace(f"/resolve/{COMMIT}/", "/") for line in server.log if "/resolve/" in line}
    assert fetched == {f"{p.repo}/{file}" for p in saes.values() for file in (p.file, *p.beside)}


def test_the_readmes_line_loads_a_gemma_scope_sae_and_encodes_with_it(server, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^code = sf\.load\(\"google/.*$", readme, flags=re.M)
    folder = line.partition('"google/gemma-scope-2b-pt-res/')[2].partition('"')[0]
    gemma_scope("res", folder, "", F=16384).write(tmp_path / "hub")
    x = f"x = torch.randn(5, {D}, generator=torch.Generator().manual_seed(0))"
    l0 = client(server, tmp_path, f"{x}\n{line}\nprint(json.dumps(code.l0().tolist()))")
    assert len(l0) == 5 and sum(l0) > 0


SEVERAL = """
found = []
for place in PLACES:
    try:
        sf.load(place)
    except (FileNotFoundError, ValueError) as error:
        found.append(type(error).__name__ + ": " + str(error))
print(json.dumps(found))
"""


def test_several_saes_in_a_place_are_listed_and_a_path_out_of_it_is_none(server, tmp_path):
    for published in (PUBLISHED["qwen scope"], PUBLISHED["hook_z"], PUBLISHED["gemma scope"]):
        published.write(tmp_path / "hub")
    (tmp_path / "secret.pt").write_text("unread")
    qwen, hook_z, scope = (PUBLISHED[name].repo for name in ("qwen scope", "hook_z", "gemma scope"))
    places = [qwen, hook_z, scope, f"{scope}/layer_20", f"{qwen}/../../secret.pt", f"{qwen}/x/..", f"{qwen}@../../x"]
    said = client(server, tmp_path, SEVERAL.replace("PLACES", repr(places)))
    assert "holds layer0.sae.pt, layer7.sae.pt: name one of these files" in said[0]
    assert "holds another.pt, gpt2-small" in said[1] and "there are weights in layer_20/width_4k/average_l0_70" in said[2]
    assert "holds no SAE in 'layer_20'; there are weights in layer_20/width_4k" in said[3]
    assert all("it is no place on the Hub" in line for line in said[4:6]) and said[6].startswith("FileNotFoundError")


OFFLINE = """
first = sf.load("Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50/layer7.sae.pt")
import huggingface_hub.constants as constants, unittest.mock as mock
with mock.patch("huggingface_hub.HfApi.model_info", side_effect=ConnectionError("no network")):
    again = sf.load("Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50/layer7.sae.pt")
    try:
        sf.load("Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50/layer0.sae.pt")
    except FileNotFoundError as error:
        print(json.dumps([torch.equal(first.W_enc, again.W_enc), str(error)]))
"""


def test_what_was_fetched_loads_where_the_hub_does_not_answer(server, tmp_path):
    PUBLISHED["qwen scope"].write(tmp_path / "hub")
    same, error = client(server, tmp_path, OFFLINE)
    assert same and "layer0.sae.pt' here, and the Hub gave no" in error and "no network" in error


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
