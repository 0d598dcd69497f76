"""An SAE of ours as one that SAEBench's evaluations take, on this engine.

sae = as_saebench(sf.load("run"), "pythia-160m-deduped", hook_layer=8)   # then selected_saes = [("name", sae)]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_fast.extras import require
from sae_fast.interop import _norms
from sae_fast.nn import SparseAutoencoder

require("sae_bench", extra="saebench")

from sae_bench.custom_saes.base_sae import BaseSAE  # noqa: E402

ARCHITECTURES = {
    "GatedSAE": "gated",
    "ReluSAE": "standard",
    "JumpReluSAE": "jumprelu",
    "TopKSAE": "topk",
    "BatchTopKSAE": "batch_topk",
}


class SAEBenchSAE(BaseSAE):
    """SAEBench's contract: encode, decode, forward, W_enc [d, F], W_dec [F, d], dtype, device, cfg.  The parameters are the
    SAE's own memory."""

    def __init__(self, sae: SparseAutoencoder, model_name: str, hook_layer: int, hook_name: str | None = None):
        W = sae.W_enc
        with torch.device("meta"):  # its zeros are replaced
            super().__init__(sae.d_in, sae.d_sae, model_name, hook_layer, torch.device("meta"), W.dtype, hook_name)
        self.sae = sae
        self.W_enc, self.W_dec, self.b_dec = nn.Parameter(W.data.T), sae.W_dec, sae.b_dec
        self.b_enc = sae.encoder_bias
        self.device = W.device
        self.cfg.architecture = ARCHITECTURES[type(sae).__name__]
        self.cfg.apply_b_dec_to_input, self.cfg.device = sae.apply_b_dec_to_input, str(W.device)

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.sae.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        return self.sae(x)


def as_saebench(
    sae: SparseAutoencoder, model_name: str | None = None, hook_layer: int | None = None, hook_name: str | None = None
) -> SAEBenchSAE:
    """``sae`` in SAEBench's form.  What is not given is what its metadata says (``model_name``, ``layer``, ``hook_name``);
    ``hook_name`` is otherwise the residual stream after block ``hook_layer``, counted from 0.

    ``ValueError`` if its decoder rows are not unit, which the evaluations need (``sf.load(..., fold_decoder_norm=True)``);
    for a model or layer that neither is given nor said, and a layer or hook that contradicts what is said.
    """
    if type(sae).__name__ not in ARCHITECTURES:
        raise ValueError(f"sae: got {type(sae).__name__}, want one of {sorted(ARCHITECTURES)}")
    sae.check_plain("evaluate it with SAEBench")
    if problem := _norms.why_not_unit(sae):
        raise ValueError(f"sae: {problem}")
    said = {"hook_layer": sae.metadata.get("layer"), "hook_name": sae.metadata.get("hook_name")}
    for name, got in (("hook_layer", hook_layer), ("hook_name", hook_name)):
        if None not in (got, said[name]) and got != said[name]:
            raise ValueError(f"{name}: got {got!r}, but the SAE's metadata says {said[name]!r}")
    model_name = sae.metadata.get("model_name") if model_name is None else model_name
    hook_layer = said["hook_layer"] if hook_layer is None else hook_layer
    if hook_name is None and str(said["hook_name"]).startswith("blocks."):  # SAEBench runs TransformerLens' models
        hook_name = said["hook_name"]
    if model_name is None or hook_layer is None:
        raise ValueError(
            f"model_name, hook_layer: got {model_name!r} and {hook_layer!r}, which its metadata does not say either"
        )
    return SAEBenchSAE(sae, model_name, hook_layer, hook_name)


__all__ = ["SAEBenchSAE", "as_saebench"]
