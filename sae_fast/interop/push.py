"""An SAE to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import posixpath
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_fast.extras import require
from sae_fast.interop import card as cards
from sae_fast.interop.checkpoints import save
from sae_fast.nn import SparseAutoencoder


def push_to_hub(
    sae: SparseAutoencoder,
    repo_id: str,
    format: str = "sae_fast",
    *,
    folder: str = "",
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    card: bool | None = None,
    metrics: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """Writes ``sae`` in a format (see :func:`sae_fast.interop.save`, which takes ``options``) into a repository of the Hub,
    made if it is not there, in one commit.  Returns the commit's address.

    With it goes a model card, README.md in the same folder.  ``card``: False writes none, True replaces any that is there;
    by default one that was written or changed by others stays, with a warning.  ``metrics``: numbers for the card, as
    ``held_out`` in a run's metrics.json."""
    hub = require("huggingface_hub", extra="hub")
    with tempfile.TemporaryDirectory() as temporary:
        save(sae, temporary, format, **options)
        api = hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = posixpath.join(folder.strip("/"), cards.NAME)
        if card or (card is None and _may_write(api, repo_id, there)):
            about = {**sae.metadata, **{name: value for name, value in options.items() if value is not None}}
            text = cards.text(sae, format, repo_id, folder, about, metrics or {})
            Path(temporary, cards.NAME).write_text(text, encoding="utf-8")
        pushed = api.upload_folder(
            repo_id=repo_id, folder_path=temporary, path_in_repo=folder or None,
            commit_message=commit_message or f"{type(sae).__name__}, {sae.d_sae} features, as {format}",
        )  # fmt: skip
        return pushed.commit_url


def _may_write(api: Any, repo_id: str, name: str) -> bool:
    """True where there is no card, or one of ours."""
    if not api.file_exists(repo_id, name):
        return True
    with tempfile.TemporaryDirectory() as temporary:  # not the cache, which may hold an earlier one
        local = Path(api.hf_hub_download(repo_id, name, local_dir=temporary))
        ours = cards.is_ours(local.read_text(encoding="utf-8", errors="replace"))
    if not ours:
        warnings.warn(f"{repo_id}/{name} is not this package's and stays as it is; card=True replaces it", stacklevel=3)
    return ours
