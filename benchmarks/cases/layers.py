"""The layers as their users call them: encode_sparse, and x̂ from x (an SAE spliced into a model)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.floors import add_products
from benchmarks.registry import OURS, Case, Goal, Run, World, case
from sae_fast import GatedSAE, JumpReluSAE, ReluSAE, SparseCode


def batches(world: World) -> list[Tensor]:
    return world.batches


def dense_code(sae: GatedSAE, results: list) -> dict[str, Tensor]:
    """Magnitudes and gates of codes that may be sparse."""
    pairs = [(r.to_dense(), r.to_dense(r.gates)) if isinstance(r, SparseCode) else r for r in results]
    return {"magnitudes": torch.stack([p[0] for p in pairs]), "gates": torch.stack([p[1] for p in pairs])}


def pre_activation(sae: GatedSAE | ReluSAE | JumpReluSAE, x: Tensor) -> Tensor:
    """u, with b_dec taken off through a bias: eager PyTorch's fastest way."""
    return F.linear(x, sae.W_enc, -(sae.W_enc @ sae.b_dec))


def gated(sae: GatedSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(magnitudes, gates), [B, F] each."""
    u = pre_activation(sae, x)
    pi_gate = u + sae.b_gate
    return torch.where(pi_gate > 0, torch.relu(sae.r_mag.exp() * u + sae.b_mag), 0.0), torch.relu(pi_gate)


@case(
    "encode_sparse",
    mode="inference",
    inputs=batches,
    outcome=dense_code,
    memory=True,
    goals=(Goal("time ÷ the bare product's", "time", OURS, "bare_product", at_most=0.52),),
)
def encode_sparse(sae: GatedSAE) -> Run:
    return torch.no_grad()(lambda x: gated(sae, x))


@encode_sparse.provider(OURS)
def _(sae: GatedSAE) -> Run:
    return torch.no_grad()(sae.encode_sparse)


encode_sparse.provider("eager")(encode_sparse.reference)
add_products(encode_sparse)


# ---- Splicing -------------------------------------------------------------------------------------------------------


def to_relu(sae: GatedSAE) -> ReluSAE:
    """A ReluSAE that fires where the Gated SAE does."""
    relu = ReluSAE(sae.d_in, sae.d_sae, dtype=sae.W_enc.dtype)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_dec"):
            getattr(relu, name).copy_(getattr(sae, name))
        relu.b_enc.copy_(sae.b_gate)
    return relu


def splice(name: str, convert: Callable, features: Callable[..., Tensor]) -> Case:
    """The case x → x̂ of the SAE that ``convert`` makes of the Gated one; ``features`` is its dense code."""

    def eager(sae: GatedSAE) -> Run:
        layer = convert(sae)
        return torch.no_grad()(lambda x: torch.addmm(layer.b_dec, features(layer, x), layer.W_dec))

    def outcome(sae: GatedSAE, results: list) -> dict[str, Tensor]:
        return {"x_hat": torch.stack(results)}

    one = case(name, "inference", inputs=batches, outcome=outcome)(eager)
    one.provider(OURS)(lambda sae: torch.no_grad()(convert(sae)))
    one.provider("eager")(eager)
    return one


def relu(sae: ReluSAE, x: Tensor) -> Tensor:
    return torch.relu(pre_activation(sae, x) + sae.b_enc)


def jumprelu(sae: JumpReluSAE, x: Tensor) -> Tensor:
    pi = pre_activation(sae, x) + sae.b_enc
    return torch.where(pi > sae.threshold, torch.relu(pi), 0.0)


splice_gated = splice("splice_gated", lambda sae: sae, lambda sae, x: gated(sae, x)[0])
splice_relu = splice("splice_relu", to_relu, relu)
splice_jumprelu = splice("splice_jumprelu", GatedSAE.to_jumprelu, jumprelu)
