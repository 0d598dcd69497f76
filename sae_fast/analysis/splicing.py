"""splice: run a model with an SAE in the place of what one of its modules computes."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sae_fast.code import SparseCode
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder

ERRORS = ("keep", "recompute", "drop")
Edit = Callable[[SparseCode], SparseCode | Tensor]


class Spliced:
    """An SAE at its site, as `splice` gives it, and what it last saw there.  All None before the first pass.

    x [..., d]        what came to the SAE: of a pass, the positions that ``where`` takes
    code              its SparseCode, before ``edit``
    x_hat [..., d]    its reconstruction
    residual [..., d] the error that was added to the decoded code; None with error="drop"

    ``edit`` and ``where`` may be changed between passes.
    """

    def __init__(self, sae: SparseAutoencoder, error: str, edit: Edit | None, where: Tensor | None):
        self.sae, self.kind, self.edit, self.where = sae, error, edit, where
        self.x: Tensor | None = None
        self.code: SparseCode | None = None
        self.x_hat: Tensor | None = None
        self.residual: Tensor | None = None
        self._held: Tensor | None = None

    def hold(self) -> None:
        """Keep the error of the last pass from now on, whatever comes (error="keep" only)."""
        if self.kind != "keep" or self.residual is None:
            raise ValueError(f'hold: got error="{self.kind}" and {self._passes()}, want error="keep" after a pass')
        self._held = self.residual

    def release(self) -> None:
        """Let every pass keep its own error again."""
        self._held = None

    def _passes(self) -> str:
        return "no pass yet" if self.x is None else "a pass"

    def __call__(self, x: Tensor) -> Tensor:
        """The activations that the model goes on with in the place of x [..., d]."""
        check_width(self.sae, x)
        mask = check_where(self.where, x)
        if mask is None:
            return self._through(x)
        out = x.clone()
        out[mask] = self._through(x[mask])
        return out

    def _through(self, x: Tensor) -> Tensor:
        code = self.sae.encode_sparse(x)
        x_hat = self.sae.decode(code, x)
        decoded = x_hat if self.edit is None else self.sae.decode(self._edited(code), x)
        self.x, self.code, self.x_hat = x, code, x_hat
        if self.kind == "drop":
            return decoded.to(x.dtype)
        if self.kind == "recompute":
            self.residual = x - x_hat
            return x.clone() if self.edit is None else (x + (decoded - x_hat)).to(x.dtype)
        if self._held is not None and self._held.shape != x.shape:
            got, want = tuple(x.shape), tuple(self._held.shape)
            raise ValueError(f"splice: got activations {got}, want {want}, the shape of the error that is held")
        self.residual = (x - x_hat).detach() if self._held is None else self._held
        return (decoded + self.residual).to(x.dtype)

    def _edited(self, code: SparseCode) -> SparseCode | Tensor:
        assert self.edit is not None
        edited = self.edit(code)
        self.sae.check_code(edited)
        if edited.shape != code.shape:
            raise ValueError(f"edit: got a code of shape {tuple(edited.shape)}, want {tuple(code.shape)}")
        return edited


@contextmanager
def splice(
    model: nn.Module,
    site: str | nn.Module | sites.Site,
    sae: SparseAutoencoder,
    error: str = "keep",
    *,
    edit: Edit | None = None,
    where: Tensor | None = None,
) -> Iterator[Spliced]:
    """In the block, what ``model`` computes at ``site`` goes through the SAE.  With f the code of x and f′ = edit(f):

    error         the model goes on with    gradients reach x
    "keep"        x̂(f′) + ε                 through the code alone; ε is a constant
    "recompute"   x̂(f′) + (x − x̂(f))        through the code and the error: the identity where f′ = f
    "drop"        x̂(f′)                     through the code

    ε is x − x̂(f) of the same pass, so "keep" and "recompute" give the same values (without an edit: x), until
    `Spliced.hold` makes it that of a chosen pass: then later passes are x̂ + ε of that one, and jump where a gate opens.

    site: the name of a module, for its output (the first, if it gives several), or with ":input" for what it is given;
    TransformerLens' name of a place in a transformer, "blocks.2.hook_resid_post"; or the module.  edit: SparseCode →
    SparseCode or dense [..., F], such as `ablate([3, 17])`.  where: bool, broadcastable to x.shape[:-1]: the positions that
    go through the SAE, others stay as they are; the code is then that of the rows taken.

    >>> with splice(model, "encoder.layer.2", sae, edit=ablate([17])) as spliced:
    ...     model(input_ids)
    ...     spliced.code.l0()

    Blocks nest.  ValueError for a site that does not exist (it lists the near names) and for what does not fit the SAE.
    """
    if error not in ERRORS:
        raise ValueError(f"error: got {error!r}, want one of {ERRORS}")
    check_sae(sae)
    place, ran = sites.find(model, site), []
    spliced = Spliced(sae, error, edit, where)
    watch = model.register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with sites.changed(place, spliced):
            yield spliced
    finally:
        watch.remove()
    if ran and spliced.x is None:
        raise ValueError(f"site: {place.name!r} is not reached when the model runs")


def ablate(features: Iterable[int]) -> Edit:
    """An edit that sets these features to 0."""

    chosen = as_features(features)

    def edit(code: SparseCode) -> SparseCode:
        off = torch.zeros(code.d_sae, dtype=torch.bool, device=code.indices.device)
        off[check_features(chosen, code.d_sae)] = True
        return code.with_values(torch.where(off[code.indices.long()], 0, code.values))

    return edit


def check_sae(sae: SparseAutoencoder, plain_to: str | None = None) -> None:
    """ValueError unless it is one, and a plain one if that is wanted ``plain_to`` do something."""
    if not isinstance(sae, SparseAutoencoder):
        raise ValueError(
            f"sae: got a {type(sae).__name__}, want one of sae_fast's SAEs (sae_fast.load reads other packages')"
        )
    if plain_to is not None:
        sae.check_plain(plain_to)


def check_width(sae: SparseAutoencoder, x: Tensor) -> None:
    """ValueError unless what comes through a site is as wide as the SAE takes it."""
    if x.shape[-1] != sae.d_in:
        raise ValueError(f"sae: its d_in is {sae.d_in}, want {x.shape[-1]}: the site gives {tuple(x.shape)}")
    if sae.d_out != sae.d_in:
        raise ValueError(f"sae: its d_out is {sae.d_out}, want d_in = {sae.d_in}: it takes the site's place")


def as_features(features: Iterable[int]) -> list[int]:
    """Feature numbers as a list; ValueError for what are none."""
    if not isinstance(features, Iterable):
        raise ValueError(f"features: got {features!r}, want a list of feature numbers")
    chosen = [f.item() if isinstance(f, Tensor) else f for f in features]
    for feature in chosen:
        if isinstance(feature, bool) or not isinstance(feature, numbers.Integral):
            raise ValueError(f"features: got {feature!r}, want feature numbers")
    return [int(feature) for feature in chosen]


def check_features(features: Iterable[int], d_sae: int) -> list[int]:
    """Feature numbers as a list; ValueError unless each is one of d_sae and is named once."""
    chosen, seen = as_features(features), set()
    for feature in chosen:
        if not 0 <= feature < d_sae:
            raise ValueError(f"features: got {feature}, want 0 to {d_sae - 1}")
        if feature in seen:
            raise ValueError(f"features: got {feature} twice, want each once")
        seen.add(feature)
    return chosen


def check_where(where: Tensor | None, x: Tensor) -> Tensor | None:
    """``where`` as a bool mask of shape x.shape[:-1], or None; ValueError if it does not fit."""
    if where is None:
        return None
    if not isinstance(where, Tensor) or where.dtype != torch.bool:
        raise ValueError(f"where: got {getattr(where, 'dtype', type(where).__name__)}, want a bool tensor")
    try:
        return where.to(x.device).expand(x.shape[:-1])
    except RuntimeError:
        want = f"one that broadcasts to {tuple(x.shape[:-1])}, the positions at the site"
        raise ValueError(f"where: got shape {tuple(where.shape)}, want {want}") from None
