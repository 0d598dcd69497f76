"""The list of published SAEs, and the command that prints it."""

from __future__ import annotations

import importlib
import sys

import pytest
from typer.testing import CliRunner

import sae_fast as sf
from sae_fast.cli import app
from sae_fast.interop.formats import FORMATS, READERS

REGISTRY = """
gemma-scope-2b-pt-res:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: google/gemma-scope-2b-pt-res
  saes:
  - {id: a, path: layer_20/width_16k/average_l0_71, l0: 71}
  - {id: b, path: embedding/width_4k/average_l0_6}
llama_scope_lxr_8x:
  conversion_func: llama_scope
  model: meta-llama/Llama-3.1-8B
  repo_id: fnlp/Llama3_1-8B-Base-LXR-8x
  saes: [{id: l0r_8x, path: Llama3_1-8B-Base-L0R-8x, norm_scaling_factor: 58.9}]
gemma-scope-2-clt:
  conversion_func: gemma_3
  model: google/gemma-3-1b-pt
  repo_id: google/gemma-scope-2-1b-pt
  saes: [{id: c, path: clt/width_262k_l0_medium/params_layer_0}]
temporal:
  {conversion_func: temporal, model: m, repo_id: canrager/temporalSAEs, saes: [{id: t, path: layer_12/temporal}]}
unknown: {conversion_func: something_new, model: m, repo_id: user/new, saes: [{id: n, path: 0}]}
gpt2: {model: gpt2-small, repo_id: jbloom/GPT2, saes: [{id: g, path: blocks.0.hook_resid_pre}]}
"""


def run(*arguments: str) -> tuple[int, list[str], str]:
    done = CliRunner().invoke(app, ["list", *arguments])
    return done.exit_code, done.stdout.splitlines(), done.stderr


@pytest.fixture
def saelens(tmp_path, monkeypatch):
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens/__init__.py").write_text("raise AssertionError('it is not imported')")
    (tmp_path / "sae_lens/pretrained_saes.yaml").write_text(REGISTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    importlib.invalidate_caches()


def test_what_is_published_is_read_from_saelens_list_where_that_is_installed(saelens):
    saes = sf.published()
    assert [sae.format for sae in saes] == [*["gemma_scope"] * 2, "llama_scope", None, None, None, "saelens"]
    first, second = sf.published("Gemma-Scope-2b")
    assert first.place == "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71" and first.l0 == 71
    assert second.l0 is None and sf.published("lxr")[0].activation_scale == 58.9 and sf.published("none such") == []
    code, lines, _ = run("gemma-scope-2b")
    assert code == 0 and lines[0] == f"gemma_scope  {first.place}  L0 71" and len(lines) == 2
    assert run("llama_scope")[1] == [
        "llama_scope  fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L0R-8x  --activation-scale 58.9"
    ]
    assert run()[1][0] == "gemma-scope-2b-pt-res  gemma_scope  gemma-2-2b  2" and len(run()[1]) == 6
    assert run("temporal")[1] == ["refused  canrager/temporalSAEs/layer_12/temporal"]


def test_else_from_a_short_list_of_formats_that_are_read(monkeypatch):
    monkeypatch.setattr(sys.modules["sae_fast.interop.published"], "_list_of_saelens", lambda: None)
    saes = sf.published()
    assert {sae.format for sae in saes} <= set(READERS) and set(READERS) - set(FORMATS) - {sae.format for sae in saes} == {
        "hook_z", "openai", "llamascopium"
    }  # fmt: skip
    assert len({sae.release for sae in saes}) == len(saes) > 20
    code, lines, error = run("no such thing")
    assert code == 1 and not lines and "in no release's and no repository's name" in " ".join(error.split())
    with pytest.raises(ValueError, match="name: got 3, want a str"):
        sf.published(3)  # type: ignore[arg-type]
