"""Decoder norms: from rows of any norm to unit rows, and back to the same bits.

The function of an SAE does not change when W_dec's row i is divided by n_i and W_enc's row and the biases of feature i are
multiplied by it; f_i becomes n_i times as large.  Exact in the reals, rounded in floats.  ``Unfold`` keeps what it takes to
undo the roundings too.  Where features are chosen by comparing them (TopK, BatchTopK) others would be: there it is refused.

A row of norm 0 gives nothing, and counts 0: its feature never fires then, and its row is any unit row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_fast import activations
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.grouped import GroupedSAE

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of an element's size


def tolerance(dtype: torch.dtype) -> float:
    """The distance from 1 that norms of rows held at unit norm may have: what SAEBench allows."""
    return 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5


def norms(sae: SparseAutoencoder) -> Tensor:
    """[F] in the dtype of W_dec, summed in float64."""
    return sae.W_dec.detach().double().norm(dim=1).to(sae.W_dec.dtype)


def chooses(sae: SparseAutoencoder) -> bool:
    """True where features are compared with each other, or with one threshold."""
    return isinstance(sae, GroupedSAE)


def is_unit(sae: SparseAutoencoder) -> bool:
    return bool(((norms(sae).double() - 1).abs() <= tolerance(sae.W_dec.dtype)).all())


def why_not_unit(sae: SparseAutoencoder) -> str | None:
    """A complaint of decoder rows that are not unit, with what helps; None where they are."""
    if is_unit(sae):
        return None
    zero = (norms(sae) == 0).nonzero()[:, 0].tolist()
    some = ", ".join(map(str, zero[:5])) + (" …" if len(zero) > 5 else "")
    said = f"W_dec: rows {some} are zero" if zero else "W_dec: its rows are not unit"
    helps = "folded, it would choose others" if chooses(sae) else "want fold_decoder_norm"
    return f"{said}; {helps}"


def scaled(sae: SparseAutoencoder) -> list[str]:
    """The parameters whose row or element i is multiplied by n_i."""
    activation = activations.named(sae.activation)
    return ["W_enc", activation.bias, *activation.scaled_by_norm]


@dataclass(frozen=True)
class Unfold:
    """The way back from :func:`fold`.  ``norms`` [F]; ``ulps``: for each parameter by how many representable numbers,
    counted in the integers of its bits, the plain way back misses what it was; ``digest``: of the folded weights."""

    norms: Tensor
    ulps: dict[str, Tensor]
    digest: str

    def tensors(self) -> dict[str, Tensor]:
        return {"norms": self.norms, **{f"ulps.{name}": t for name, t in self.ulps.items()}}

    @staticmethod
    def of_tensors(tensors: dict[str, Tensor], digest: str) -> Unfold:
        if "norms" not in tensors:
            raise ValueError("norms: missing among what undoes a folding")
        ulps = {name.removeprefix("ulps."): t for name, t in tensors.items() if name.startswith("ulps.")}
        return Unfold(tensors["norms"], ulps, digest)


@torch.no_grad()
def fold(sae: SparseAutoencoder, chosen_with_norms: bool = False) -> Unfold:
    """Makes W_dec's rows unit, in place; a row of norm 0 becomes the first axis, and its feature silent.
    ``chosen_with_norms``: of a TopK or BatchTopK SAE that is meant to choose by π_i ‖d_i‖, which it does from then on."""
    if chooses(sae) and not chosen_with_norms and not is_unit(sae):
        raise ValueError(f"sae: got a {type(sae).__name__} whose decoder rows are not unit: folded, it would choose others")
    if sae.W_enc.dtype == torch.float64:
        raise ValueError("sae: got torch.float64, want a narrower dtype to fold decoder norms in")
    n = norms(sae)
    if not bool(torch.isfinite(n).all()):
        raise ValueError(f"sae: got decoder rows of norm {float(n[~torch.isfinite(n)][0])}, want finite ones to fold")
    before = {name: sae.get_parameter(name).detach().clone() for name in ("W_dec", *scaled(sae))}
    for name in before:
        _scale(sae.get_parameter(name), n, inverse=name == "W_dec")
        if not bool(torch.isfinite(sae.get_parameter(name)).all()) and bool(torch.isfinite(before[name]).all()):
            raise ValueError(f"sae: {name}: folded, it does not fit into {before[name].dtype}")
    sae.W_dec[n == 0] = torch.eye(1, sae.d_out, dtype=sae.W_dec.dtype, device=sae.W_dec.device)
    ulps = {}
    for name, was in before.items():
        back = sae.get_parameter(name).detach().clone()
        _scale(back, n, inverse=name != "W_dec")
        ulps[name] = _narrow(_bits(was).long() - _bits(back).long())
    return Unfold(n, ulps, digest(sae))


@torch.no_grad()
def unfold(sae: SparseAutoencoder, how: Unfold) -> None:
    """Undoes :func:`fold`, in place, bit for bit; ``ValueError`` if the weights have changed since."""
    if digest(sae) != how.digest:
        raise ValueError("unfold: the weights are no longer those whose decoder norms were folded")
    for name, ulps in how.ulps.items():
        parameter = sae.get_parameter(name)
        back = parameter.detach().clone()
        _scale(back, how.norms, inverse=name != "W_dec")
        integers = _bits(back)
        integers += ulps.to(integers.dtype)
        parameter.copy_(back)


def digest(sae: SparseAutoencoder) -> str:
    """SHA-256 of the folded parameters' bits."""
    found = hashlib.sha256()
    for name in ("W_dec", *scaled(sae)):
        found.update(_bits(sae.get_parameter(name).detach().cpu().contiguous()).numpy().tobytes())
    return found.hexdigest()


def _scale(t: Tensor, n: Tensor, inverse: bool) -> None:
    """Multiplies, or divides, rows by n in float64, so that there is one rounding.  A row of norm 0 is divided by 1."""
    factor = torch.where(n == 0, 1, n.double()) if inverse else n.double()
    factor = factor if t.dim() == 1 else factor[:, None]
    t.copy_(t.double() / factor if inverse else t.double() * factor)


def _bits(t: Tensor) -> Tensor:
    return t.view(INTEGERS[t.element_size()])


def _narrow(ulps: Tensor) -> Tensor:
    """In the narrowest integers that hold them."""
    largest = int(ulps.abs().max()) if ulps.numel() else 0
    return ulps.to(next(d for d in (torch.int8, torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(d).max))
