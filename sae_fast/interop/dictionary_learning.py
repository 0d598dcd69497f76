"""dictionary_learning's trainers on this engine: the same constructors, run by the package's own ``trainSAE``.

    from sae_fast.interop.dictionary_learning import GatedSAETrainer   # was: from dictionary_learning.trainers import ...

``trainer.ae`` is the package's own dictionary; its parameters are the memory that is trained, so state_dict, scale_biases,
encode and decode are the package's.  Same seed, same weights to start from.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_fast import functional, nn, ops
from sae_fast.extras import require
from sae_fast.objectives import of_dialect
from sae_fast.signals import uninterrupted
from sae_fast.train import Trainer

require("dictionary_learning", extra="dictionary-learning")

from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder  # noqa: E402
from dictionary_learning.trainers import gdm, standard  # noqa: E402

LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])


class Engine:
    """Trains a dictionary of the package: an SAE of ours and a Trainer, on the dictionary's own memory.

    ``names``: our parameter for each of the dictionary's but the decoder's weight, which is [d, F] there, and W_dec a view.
    """

    def __init__(self, ae: Any, cls: type[nn.SparseAutoencoder], names: dict[str, str], **settings: Any):
        self.ae, self.names = ae, names
        decoder = ae.decoder.weight
        self.sae = cls(ae.activation_dim, ae.dict_size, device=decoder.device, seed=0)  # torch's generator stays as it is
        for theirs, ours in names.items():
            setattr(self.sae, ours, ae.get_parameter(theirs))
        self.link()
        self.trainer = Trainer(self.sae, unit_start=False, **settings)

    def link(self) -> None:
        """Makes the two share memory, rows contiguous, where they do not: at first, and after the dictionary was moved or
        given other tensors."""
        decoder = self.ae.decoder.weight
        pairs = [(self.ae.get_parameter(theirs), self.sae.get_parameter(ours)) for theirs, ours in self.names.items()]
        shared = all(a.data_ptr() == b.data_ptr() and a.is_contiguous() for a, b in pairs)
        if shared and decoder.data_ptr() == self.sae.W_dec.data_ptr() and decoder.T.is_contiguous():
            return
        self.sae.settle()
        for theirs, ours in pairs:
            theirs.data = theirs.data.contiguous()
            ours.data = theirs.data
        decoder.data = decoder.data.T.contiguous().T
        self.sae.W_dec.data = decoder.data.T

    def step(self, x: Tensor, lr: float, l1_coefficient: float) -> None:
        self.link()
        for theirs, ours in {**self.names, "decoder.weight": "W_dec"}.items():
            self.sae.get_parameter(ours).requires_grad_(self.ae.get_parameter(theirs).requires_grad)  # frozen or not
        self.trainer.step(x, lr=lr, l1_coefficient=l1_coefficient)


def _takes(trainer: str, dict_class: type, known: type) -> None:
    """``ValueError`` unless the class is ``known`` or computes what it computes."""
    names = ("encode", "decode", "forward")
    if not (isinstance(dict_class, type) and issubclass(dict_class, known)):
        raise ValueError(f"dict_class: got {dict_class!r}, want {known.__name__}, the class that {trainer} trains")
    changed = [name for name in names if getattr(dict_class, name) is not getattr(known, name)]
    if changed:
        raise ValueError(f"dict_class: {dict_class.__name__} has its own {', '.join(changed)}, want {known.__name__}'s")


def _signed_as(package: type) -> Callable[[Callable], Callable]:
    """Gives an ``__init__`` of any arguments the signature of the package's, which it passes them to, and ``init_l0``."""
    signature = inspect.signature(package.__init__)  # type: ignore[misc]
    new = inspect.Parameter("init_l0", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="float | None")

    def signed(init: Callable) -> Callable:
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), new])  # type: ignore[attr-defined]
        return init

    return signed


def _dict_class(package: type, *args: Any, **kwargs: Any) -> Any:
    """The dict_class among the arguments of the package's trainer, which may be given by position."""
    bound = inspect.signature(package).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments["dict_class"]


class _OnEngine:
    """The part that the trainers share; mixed in before the package's class, whose __init__ has run."""

    device: Any
    engine: Engine | None = None
    lr: float
    l1_penalty: float
    sparsity_warmup_fn: Callable[[int], float]
    scheduler: Any
    optimizer: Any

    @property
    def ae(self) -> Any:
        """The package's dictionary, when every step has happened: on a GPU the host runs a few steps ahead."""
        if self.engine is not None:
            self.engine.trainer.wait()
        return self._ae

    @ae.setter
    def ae(self, value: Any) -> None:
        self._ae = value

    @property
    def _sae(self) -> Any:
        """Our SAE, on the dictionary's memory as it is now."""
        assert self.engine is not None
        self.engine.link()
        return self.engine.sae

    def _start(
        self, cls: type[nn.SparseAutoencoder], names: dict[str, str], init_l0: float | None, **settings: Any
    ) -> None:
        self.engine = Engine(self.ae, cls, names, lr=self.lr, l1_coefficient=self.l1_penalty, init_l0=init_l0, **settings)
        self.optimizer = self.engine.trainer.optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.scheduler.lr_lambdas[0])

    def _step(self, step: int, x: Tensor) -> None:
        assert self.engine is not None
        lr = self.scheduler.get_last_lr()[0]
        self.engine.step(x.detach().to(self.device), lr, self.l1_penalty * self.sparsity_warmup_fn(step))
        self.scheduler.step()

    def loss(self, x: Tensor, step: int, logging: bool = False, **kwargs: Any) -> Any:
        """As the package's: the loss, differentiable with respect to ``ae``'s parameters; with ``logging`` a LossLog, its f
        dense, [B, F]."""
        l1 = self.l1_penalty * self.sparsity_warmup_fn(step)
        x = x.to(self.device)
        self._count(x)
        if not logging:
            return self._loss(x, l1).total
        with torch.no_grad():
            sae = self._sae
            code = sae.encode_sparse(x)
            x_hat, weight = sae.decode(code), of_dialect(sae.activation, l1).sparsity_weight(sae.W_dec)
            terms = ops.decode_loss(code, sae.W_dec, sae.b_dec, sae.check_input(x), weight, code.batch).losses
            losses = {"mse_loss": terms[0], "sparsity_loss": self._sparsity(code), "loss": terms.sum()}
            losses |= self._logged(terms, x - x_hat)
            return LossLog(x, x_hat, code.to_dense(), {name: value.item() for name, value in losses.items()})

    def _count(self, x: Tensor) -> None:
        """Counts what the package's trainer counts in every evaluation of its loss."""

    def _sparsity(self, code: Any) -> Tensor:
        """Σ of the last value set, λ left out, as a mean over the examples."""
        return code.values[-1].sum() / max(code.batch, 1)

    def _logged(self, terms: Tensor, residual: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _loss(self, x: Tensor, l1: float) -> Any:
        raise NotImplementedError


class GatedSAETrainer(_OnEngine, gdm.GatedSAETrainer):
    """dictionary_learning's GatedSAETrainer, same arguments, same trajectory but for rounding.

    ``init_l0`` (not in the package): calibrate the gates' biases on the first batch so that this many features fire; the
    package starts with half of all gates open, which is slow for as long as it lasts.  None: as the package.
    """

    @_signed_as(gdm.GatedSAETrainer)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        _takes("GatedSAETrainer", _dict_class(gdm.GatedSAETrainer, *args, **kwargs), GatedAutoEncoder)
        super().__init__(*args, **kwargs)
        biases = {"gate_bias": "b_gate", "mag_bias": "b_mag", "decoder_bias": "b_dec"}
        names = {"encoder.weight": "W_enc", "r_mag": "r_mag", **biases}
        self._start(nn.GatedSAE, names, init_l0)

    @uninterrupted()
    def update(self, step: int, x: Tensor) -> None:
        self._step(step, x)

    def _loss(self, x: Tensor, l1: float) -> Any:
        ae, rows = self.ae, self._sae.check_input(x)
        return functional.gated_loss(
            rows, ae.encoder.weight, ae.gate_bias, ae.mag_bias, ae.r_mag, ae.decoder.weight.T, ae.decoder_bias, l1
        )

    def _logged(self, terms: Tensor, residual: Tensor) -> dict[str, Tensor]:
        return {"aux_loss": terms[2]}


class StandardTrainer(_OnEngine, standard.StandardTrainer):
    """dictionary_learning's StandardTrainer, same arguments, dead-neuron resampling included; ``init_l0`` as
    :class:`GatedSAETrainer`.  Its Adam has β1 = 0.9, so every row that ever had a gradient moves in every step."""

    @_signed_as(standard.StandardTrainer)
    def __init__(self, *args: Any, init_l0: float | None = None, **kwargs: Any):
        _takes("StandardTrainer", _dict_class(standard.StandardTrainer, *args, **kwargs), AutoEncoder)
        super().__init__(*args, **kwargs)
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "bias": "b_dec"}
        self._start(nn.ReluSAE, names, init_l0, betas=(0.9, 0.999))

    @uninterrupted()
    def update(self, step: int, activations: Tensor) -> None:
        x = activations.to(self.device)
        self._count(x)
        self._step(step, x)
        if self.resample_steps is not None and step % self.resample_steps == 0:
            self.resample_neurons(self.steps_since_active > self.resample_steps / 2, x)

    @torch.no_grad()
    def _count(self, x: Tensor) -> None:
        if self.steps_since_active is None:
            return
        code = self._sae.encode_sparse(x)
        alive = torch.zeros(code.d_sae, dtype=torch.bool, device=code.indices.device)
        alive[code.indices.long()] = True
        self.steps_since_active += 1
        self.steps_since_active[alive] = 0

    @torch.no_grad()
    def resample_neurons(self, deads: Tensor, activations: Tensor) -> None:
        """Dead features start anew at examples drawn by their error: encoder a fifth of the living rows' mean norm, decoder
        unit, bias and Adam's moments 0.  As many as there are dead ones and examples."""
        if not bool(deads.any()):
            return
        print(f"resampling {int(deads.sum())} neurons")
        sae, state = self._sae, self.optimizer.state
        sae.settle()
        activations = activations.to(sae.W_enc.dtype)
        errors = (activations - sae(activations)).norm(dim=-1)
        n = min(int(deads.sum()), errors.shape[0])
        drawn = activations[torch.multinomial(errors, num_samples=n, replacement=False)]
        alive_norm = sae.W_enc[~deads].norm(dim=-1).mean()
        which = deads.nonzero()[:n, 0]
        unit = torch.nn.functional.normalize(drawn, dim=-1)
        for name, new in (("W_enc", drawn * alive_norm * 0.2), ("W_dec", unit), ("b_enc", torch.zeros(n).to(unit))):
            parameter = sae.get_parameter(name)
            if parameter.requires_grad:  # frozen ones stay
                parameter[which] = new
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[parameter][moment][which] = 0.0

    def _loss(self, x: Tensor, l1: float) -> Any:
        ae, rows = self.ae, self._sae.check_input(x)
        return functional.relu_loss(rows, ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.bias, l1)

    def _logged(self, terms: Tensor, residual: Tensor) -> dict[str, Tensor]:
        return {"l2_loss": residual.norm(dim=-1).mean()}


__all__ = ["GatedSAETrainer", "StandardTrainer"]
