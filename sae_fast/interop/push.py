"""An SAE to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import tempfile
from typing import Any

from sae_fast.extras import require
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
    **options: Any,
) -> str:
    """Writes ``sae`` in a format (see :func:`sae_fast.interop.save`, which takes ``options``) into a repository of the Hub,
    made if it is not there, in one commit.  Returns the commit's address."""
    hub = require("huggingface_hub", extra="hub")
    with tempfile.TemporaryDirectory() as temporary:
        save(sae, temporary, format, **options)
        api = hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        pushed = api.upload_folder(
            repo_id=repo_id, folder_path=temporary, path_in_repo=folder or None,
            commit_message=commit_message or f"{type(sae).__name__}, {sae.d_sae} features, as {format}",
        )  # fmt: skip
        return pushed.commit_url
