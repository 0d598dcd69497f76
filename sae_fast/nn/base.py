"""The base of every SAE layer: parameters, input checks, encode and decode, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast import activations, arguments, functional, gradients, ops
from sae_fast.code import Affine, Decoder, Layer, SparseCode
from sae_fast.nn import normalize as normalizations
from sae_fast.nn._memory import of_their_own
from sae_fast.nn._random import unit_rows
from sae_fast.objectives import Objective, Revived
from sae_fast.ops import checks
from sae_fast.ops.dispatch import trusted, without_autocast
from sae_fast.reference import Loss

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _settle_first(sae: SparseAutoencoder, *_: Any) -> None:
    sae.settle()


class SparseAutoencoder(nn.Module):
    """Parameters W_enc [F, d], W_dec [F, d] (unit rows at the start) and b_dec [d]; the rest is the subclass's.

    With ``d_out`` it is a transcoder: W_dec [F, d_out] and b_dec [d_out], which is not subtracted from x then.  With
    ``skip`` x̂ = f W_dec + b_dec + x W_skipᵀ, W_skip [d_out, d_in].

    Inputs x are [..., d_in], any strides, fp32, bf16 or fp16 (or the module's own dtype); ``ValueError`` names what is
    wrong with any other, and the index of the first NaN or infinity.

    ``normalize``, one of sae_fast.normalize, maps each example before all that, and x̂ back.

    ``precision`` is how the encoder's product is taken, "exact", "fp32" or "bf16": see :func:`sae_fast.ops.encode`.
    ``apply_b_dec_to_input=False`` encodes x itself instead of x − b_dec, as some packages' SAEs do, and transcoders.
    """

    activation: str  # of ops.encode
    per_feature: tuple[str, ...]  # parameters [F]: the activation's, in the order in which they are registered
    of_largest: bool = False  # the support is of the largest entries, not by threshold
    support: str = "threshold"  # of ops.encode, in training
    any_dtype: tuple[str, ...] = ()  # parameters that may have another dtype than the module, which is W_enc's
    metadata: dict[str, Any]  # where it came from, as its checkpoints keep it: anything that JSON can hold
    W_skip: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
        precision: str = "exact",
        apply_b_dec_to_input: bool | None = None,
        d_out: int | None = None,
        skip: bool = False,
        normalize: normalizations.Normalize | Mapping[str, Any] | None = None,
    ):
        """W_dec has random unit rows; W_enc is its copy, or drawn after it where d_out ≠ d_in; biases and W_skip are zero:
        the peers' initialisation.  ``seed`` makes it repeatable without touching torch's global generator.  On the device
        "meta" nothing is drawn."""
        super().__init__()
        self.d_in, self.d_sae = arguments.whole("d_in", d_in), arguments.whole("d_sae", d_sae)
        self.d_out = self.d_in if d_out is None else arguments.whole("d_out", d_out)
        dtype = arguments.floating("dtype", dtype)
        self.precision = precision
        centred = d_out is None if apply_b_dec_to_input is None else apply_b_dec_to_input
        self.apply_b_dec_to_input = arguments.flag("apply_b_dec_to_input", centred)
        if self.apply_b_dec_to_input and self.d_out != self.d_in:
            raise ValueError(
                f"apply_b_dec_to_input: got True with d_out = {self.d_out}, want False unless it is d_in = {d_in}"
            )
        self.normalize = normalizations.made(normalize)
        if self.normalize is not None:
            self.normalize.check(self.d_in)
        self.metadata = {}
        self._frozen: ops.KeptShadow | None = None
        self._settle: Callable[[], None] | None = None  # of settle_by()
        self.register_state_dict_pre_hook(_settle_first)
        device = torch.get_default_device() if device is None else torch.device(device)
        W_dec, W_enc = unit_rows(self.d_sae, (self.d_out, self.d_in), device, seed)
        self.W_enc = nn.Parameter(W_enc.to(device, dtype, copy=True))
        self.W_dec = nn.Parameter(W_dec.to(device, dtype, copy=True))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, dtype=dtype, device=device))
        for name in self.per_feature:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.d_sae, dtype=dtype, device=device)))
        W_skip = torch.zeros(self.d_out, self.d_in, dtype=dtype, device=device) if arguments.flag("skip", skip) else None
        self.register_parameter("W_skip", None if W_skip is None else nn.Parameter(W_skip))

    @classmethod
    def of_state(
        cls, where: str, d_in: int, d_sae: int, dtype: torch.dtype, state: Mapping[str, Tensor], copy: bool = True,
        **options: Any,
    ) -> Any:  # fmt: skip
        """A layer of copies of these tensors, its parameters and buffers; without ``copy`` of those themselves that are in
        memory of their own.  None is drawn, and nothing is allocated before all fit: ``ValueError`` names ``where`` they
        are from and the one that is missing, of another shape or dtype, or unknown."""

        def fits(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
            if name not in state:
                raise ValueError(f"{where}: tensor {name!r} is missing")
            got = state[name]
            dtypes = arguments.FLOATS if name in cls.any_dtype else (dtype,)
            if tuple(got.shape) != shape or got.dtype not in dtypes:
                raise ValueError(f"{where}: {name}: got {got.dtype} {tuple(got.shape)}, want {dtype} {shape}")

        # First, as what a file says may be beyond torch's sizes.
        fits("W_enc", dtype, (arguments.whole("d_sae", d_sae), arguments.whole("d_in", d_in)))
        sae = cls(d_in, d_sae, dtype=dtype, device="meta", **options)
        wanted = sae.state_dict()
        for name, t in wanted.items():
            fits(name, t.dtype, tuple(t.shape))
        if extra := set(state) - set(wanted):
            raise ValueError(f"{where}: unknown tensors {sorted(extra)}")
        sae.load_state_dict(of_their_own(state, copy), assign=True)
        return sae

    def check_dtypes(self) -> None:
        """``ValueError`` that names the parameters whose dtypes do not go together: no code can be computed then."""
        dtypes = {name: p.dtype for name, p in self.named_parameters() if name not in self.any_dtype}
        if len(set(dtypes.values())) > 1 or not all(p.dtype in arguments.FLOATS for p in self.parameters()):
            said = ", ".join(f"{n} {str(p.dtype).removeprefix('torch.')}" for n, p in self.named_parameters())
            raise ValueError(f"sae: got {said}, want one floating-point dtype")

    def check_plain(self, to: str) -> None:
        """``ValueError`` for a layer that is more than x̂ = f W_dec + b_dec of x's own width, with what is wanted ``to`` be
        done."""
        if said := self._more():
            raise ValueError(f"sae: got a {type(self).__name__} with {' and '.join(said)}, want one without to {to}")

    def _more(self) -> list[str]:
        """Words for all in which the layer is more than that."""
        said = [f"d_out = {self.d_out}"] * (self.d_out != self.d_in) + ["W_skip"] * (self.W_skip is not None)
        return said if self.normalize is None else [*said, f"normalize = {self.normalize}"]

    def not_finite(self) -> dict[str, int]:
        """The number of NaNs and infinities in each parameter and buffer that has any."""
        odd = {name: t for name, t in self.state_dict().items() if not bool(t.sum().isfinite())}
        bad = {name: t.numel() - int(torch.isfinite(t).sum()) for name, t in odd.items()}
        return {name: n for name, n in bad.items() if n}  # a sum may overflow

    def extra_repr(self) -> str:
        exact = {} if self.precision == "exact" else {"precision": self.precision}
        rest = "".join(f", {name}={value!r}" for name, value in {**self.options(), **exact}.items())
        return f"d_in={self.d_in}, d_sae={self.d_sae}, dtype={self.W_enc.dtype}{rest}"

    def options(self) -> dict[str, Any]:
        """The constructor's other arguments that say which function this is, where they are not the defaults."""
        said: dict[str, Any] = {} if self.W_skip is None else {"skip": True}
        if self.d_out != self.d_in:
            said["d_out"] = self.d_out
        elif not self.apply_b_dec_to_input:
            said["apply_b_dec_to_input"] = False
        return said if self.normalize is None else {**said, "normalize": normalizations.describe(self.normalize)}

    @property
    def encoder_bias(self) -> Tensor:
        """[F]: what is added to u: b_gate or b_enc."""
        return getattr(self, activations.named(self.activation).bias)

    @property
    def precision(self) -> str:
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in ops.PRECISIONS:
            raise ValueError(f"precision: got {value!r}, want one of {ops.PRECISIONS}")
        self._precision = value

    def settle(self) -> None:
        """Waits for a Trainer's steps under way on a GPU.  Called by whatever computes with the layer or copies it."""
        if self._settle is not None:
            self._settle()

    def settle_by(self, wait: Callable[[], None]) -> None:
        """Has ``wait`` called by :meth:`settle`: a Trainer's, whose steps on a GPU may still be under way."""
        self._settle = wait

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**self.__dict__, "_frozen": None, "_settle": None}  # a copy is in no block and of no Trainer

    # ---- Inference --------------------------------------------------------------------------------------------------

    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The sparse code of x [..., d_in].  Its values are differentiable."""
        return self._encoded(x)

    def encode(self, x: Tensor) -> Tensor:
        """The dense code [..., F], for code that wants it; :meth:`encode_sparse` is what is fast."""
        return self.encode_sparse(x).to_dense()

    def _encoded(self, x: Tensor, **choice: Any) -> SparseCode:
        rows, affine = self._normalized(self.check_input(x))
        code = self._code(self.centred(rows), **choice)
        shape = torch.Size((*x.shape[:-1], self.d_sae))
        return SparseCode(shape, code.indptr, code.indices, code.u, code.values, affine)

    def _normalized(self, rows: Tensor) -> tuple[Tensor, Affine | None]:
        return (rows, None) if self.normalize is None else self.normalize(rows)

    def decode(self, f: Tensor | SparseCode, x: Tensor | None = None) -> Tensor:
        """x̂ = f W_dec + b_dec, [..., d_out], from a dense f [..., F] or a SparseCode; given its x [..., d_in], with
        x W_skipᵀ where there is one.  A layer that normalises its input needs x for a dense f."""
        self.settle()
        self.check_code(f)
        if isinstance(f, SparseCode):
            return self._whole((ops.decode(f, self.W_dec) + self.b_dec).reshape(*f.shape[:-1], self.d_out), f, x)
        with without_autocast():  # as from a SparseCode, in the dtype of the parameters
            return self._whole(f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec, f, x)

    @without_autocast()
    def _whole(self, decoded: Tensor, f: Tensor | SparseCode, x: Tensor | None) -> Tensor:
        """x̂ of decoded = f W_dec + b_dec [..., d_out]."""
        affine = f.affine if isinstance(f, SparseCode) else None
        maps_back = affine is None and self.normalize is not None and self.normalize.undo
        if x is None and maps_back:
            raise ValueError(
                "x: got None, want the x of f, whose normalisation is undone, or the SparseCode of encode_sparse"
            )
        rows = None
        if x is not None and (maps_back or self.W_skip is not None):
            rows = self.check_input(x)
            if x.shape[:-1] != f.shape[:-1]:
                raise ValueError(f"x: got shape {tuple(x.shape)}, want [{', '.join(map(str, f.shape[:-1]))}, d_in], as f")
            affine = self._normalized(rows)[1] if maps_back else affine
        if affine is not None:
            scale, shift = (0 if t is None else t.reshape(*f.shape[:-1], 1) for t in affine)
            decoded = (decoded * scale + shift).to(decoded.dtype)
        if rows is None or self.W_skip is None:
            return decoded
        return decoded + (rows @ self.W_skip.T).reshape(*f.shape[:-1], self.d_out)

    def check_code(self, f: Tensor | SparseCode) -> None:
        """``ValueError`` unless f is a code of the layer's features, sparse or dense."""
        if isinstance(f, SparseCode):
            if f.d_sae != self.d_sae:
                raise ValueError(f"f: got a code of {f.d_sae} features, want {self.d_sae}")
        elif not isinstance(f, Tensor) or f.dim() < 1 or f.shape[-1] != self.d_sae:
            got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"f: got {got}, want a SparseCode or [..., d_sae] with d_sae = {self.d_sae}")

    def forward(self, x: Tensor) -> Tensor:
        """x̂ = decode(encode(x), x), [..., d_out], in the dtype of x."""
        return self.decode(self.encode_sparse(x), x).to(x.dtype)

    def centred(self, x: Tensor) -> Tensor:
        """x − b_dec, or x where ``apply_b_dec_to_input`` is off: the encoder's input."""
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def check_input(self, x: Tensor, name: str = "x") -> Tensor:
        """x as [B, d_in] in the module's dtype, or ``ValueError``."""
        self.check_shape(x, name)
        self.settle()
        rows = x.to(self.W_enc.dtype)  # first: a value may overflow a narrower dtype
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.finite(name, rows)
        return rows.reshape(-1, self.d_in)

    def check_shape(self, x: Tensor, name: str = "x") -> None:
        """``ValueError`` unless x is a tensor of a dtype and a last dimension that the module takes."""
        if not isinstance(x, Tensor) or (x.dtype not in INPUT_DTYPES and x.dtype != self.W_enc.dtype):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            wanted = ", ".join(dict.fromkeys(str(dtype) for dtype in (*INPUT_DTYPES, self.W_enc.dtype)))
            raise ValueError(f"{name}: got {got}, want a tensor of one of {wanted}")
        if x.dim() < 1 or x.shape[-1] != self.d_in:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, want [..., d_in] with d_in = {self.d_in}")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """For inference: what the encoder's product needs of W_enc is made once for all calls in the ``with`` block, not
        in each of them.  Assigning, loading or moving W_enc in the block is noticed; writing to its memory behind torch's
        back (``.data``, numpy, a fused optimizer) is not.  A compiled call makes it for itself: a graph cannot ask."""
        outer, self._frozen = self._frozen, ops.KeptShadow()
        try:
            yield
        finally:
            self._frozen = outer

    def _code(self, x_c: Tensor, shadow: ops.Shadow | None = None, **choice: Any) -> SparseCode:
        """The code of centred rows x_c [B, d_in]; ``shadow`` is W_enc's, ``choice`` what the subclass lets choose."""
        if shadow is None and self._frozen is not None and not torch.compiler.is_compiling():
            shadow = self._frozen.of(self.W_enc)
        bias, options = self.encoder_bias, self._encoder(**choice)
        return ops.encode(x_c, self.W_enc, bias, precision=self.precision, shadow=shadow, **options)

    def _encoder(self, slack: float = 0.0) -> dict[str, Any]:
        """The arguments of ops.encode that say which function this is, and which entries below the threshold it keeps."""
        parameters = activations.named(self.activation).parameters
        return {"activation": self.activation, "slack": slack} | {name: getattr(self, name) for name in parameters}

    # ---- Training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @without_autocast()
    def calibrate_(self, x: Tensor, l0: float = 64) -> None:
        """Sets the encoder bias so that about ``l0`` features fire on each example of x [..., d_in].

        Feature i's bias becomes minus the quantile of u_i = w_i·(x − b_dec) that l0/F of the batch exceeds; b_mag of a
        Gated SAE is set equal to b_gate.  Zero biases open half of all gates instead, and training ends at a worse
        trade-off.  Fractional counts are spread over the features, so a batch smaller than F / l0 works too.
        """
        l0 = arguments.number("l0", l0, lambda n: 0 < n <= self.d_sae, f"0 < l0 ≤ d_sae = {self.d_sae}")
        x_c = self.centred(self._normalized(self.check_input(x))[0])
        batch = x_c.shape[0]
        if batch < 2:
            raise ValueError(f"x: got {batch} examples, want at least 2 to take quantiles of")
        bias = self.encoder_bias
        for first in range(0, self.d_sae, 1024):
            u = x_c @ self.W_enc[first : first + 1024].T
            features = torch.arange(first, first + u.shape[1], device=u.device)
            # The golden ratio's multiples spread the rounding of l0·B/F evenly: low-discrepancy dithering.
            count = (l0 * batch / self.d_sae + (features * 0.6180339887498949) % 1.0).long().clamp(max=batch)
            top = u.topk(min(int(count.max()) + 1, batch), dim=0).values
            gap = (u.amax(0) - u.amin(0)) / batch
            top = torch.cat([top[:1] + gap, top, u.amin(0, keepdim=True) - gap])
            above, below = top.gather(0, count[None])[0], top.gather(0, count[None] + 1)[0]
            bias[first : first + 1024] = -(above + below) / 2
        activation = activations.named(self.activation)
        activation.calibrate(bias, {name: getattr(self, name) for name in activation.parameters})

    def check_objective(self, objective: Objective) -> None:
        """``ValueError`` unless a step of this layer can be taken by the objective."""
        self.check_plain("train")
        objective.check(self.activation)
        if objective.of_largest != self.of_largest:
            wanted = "TopK" if self.of_largest else "one with a penalty"
            raise ValueError(f"objective: got {type(objective).__name__} for a {type(self).__name__}, want {wanted}")
        if objective.target_l0 is not None and objective.target_l0 > self.d_sae:
            raise ValueError(f"target: got {objective.target_l0}, want at most d_sae = {self.d_sae}")
        if objective.prefixes is not None:
            objective.prefixes.drawn(self.d_sae, 0).sizes(self.d_sae)

    def loss(self, x: Tensor, objective: Objective, dead: Tensor | None = None) -> Loss:
        """An objective's terms on x [..., d_in]: .total .reconstruction .sparsity .auxiliary, means over the examples.

        ``total`` is differentiable, with respect to the parameters; its gradients are taken along.  ``dead`` [F] bool: the
        features that an objective with an aid is to revive.  ``ValueError`` for an x that requires a gradient.
        """
        if not isinstance(objective, Objective):
            raise ValueError(f"objective: got {objective!r}, want one of sae_fast.objectives")
        self.check_objective(objective)
        rows = self.check_input(x)
        if x.requires_grad:
            raise ValueError("x: got a tensor that requires a gradient, want x.detach(): this loss has none for it")
        if rows.shape[0] == 0:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want at least one example")
        if dead is not None:
            checks.shape("dead", dead, self.d_sae)
            checks.dtype("dead", dead, torch.bool)
        done, _ = self.row_gradients(rows, objective, dead=None if dead is None else lambda code: dead)
        weights = {name: self.get_parameter(name) for name in done.by_name}
        taken = [functional.TakenAlong(p, done.by_name[name], p) for name, p in weights.items()]
        return Loss(functional.with_gradients(done.losses.sum(), taken), *done.losses.unbind())

    @torch.no_grad()
    @without_autocast()
    @trusted()
    def row_gradients(
        self, x: Tensor, objective: Objective, shadow: ops.Shadow | None = None,
        dead: Callable[[SparseCode], Tensor] | None = None,
    ) -> tuple[gradients.StepGradients, SparseCode]:  # fmt: skip
        """(losses, residual x̂ − x and the gradient of each parameter by name; the code) of rows x [B, d_in], no autograd.

        Those of the weights are RowGradients: nothing dense of their size exists, unless the code is dense.  This is the
        Trainer's fused path; for a Gated or L1 objective the losses and gradients are those of :meth:`loss`.  ``shadow`` is
        W_enc's, if the caller keeps one; ``dead`` gives the features [F] bool that are dead after a code, for an aid.
        """
        x_c, layer = self.centred(x), self.layer(shadow)
        code = objective.code(self._train_code(x_c, shadow, objective.slack(layer)), layer)
        decoder = Decoder(self.W_dec, self.b_dec, self.apply_b_dec_to_input)
        revived = None
        if objective.aux is not None and dead is not None:
            aux = objective.aux

            def revived(error: Tensor) -> Revived | None:
                return aux.revive(x_c, error, layer, self.W_dec, dead(code), self.precision)

        dense = objective.prefixes is None and ops.dense_step_pays(code, self.W_dec)
        of_step = gradients.of_dense_step if dense else gradients.of_step
        return of_step(code, x_c, x, layer, decoder, objective, revived=revived), code

    def _train_code(self, x_c: Tensor, shadow: ops.Shadow | None, slack: float) -> SparseCode:
        """The code that a step is taken on."""
        return self._code(x_c, shadow, **({} if slack == 0 else {"slack": slack}))

    def layer(self, shadow: ops.Shadow | None = None) -> Layer:
        """The encoder by threshold, as the kernels take it."""
        activation = activations.named(self.activation)
        parameters = {name: getattr(self, name) for name in activation.parameters}
        return Layer.of(self.W_enc, self.encoder_bias, self.activation, parameters, shadow=shadow)
