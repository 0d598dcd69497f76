"""encode: which features are active, and how strongly.

Body ``cpu``: screened or dotted tile by tile, see cpu.py and, for ``topk`` and its relatives, largest.py.
Bodies ``cuda`` and ``triton``: screened by one kernel that keeps a bit an entry, see gpu.py; they differ in the
kernel that verifies.
Body ``reference``: dense, any device and dtype, see dense.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae_fast import activations
from sae_fast.activations import Activation
from sae_fast.code import Layer, Shadow, SparseCode
from sae_fast.ops import autograd, checks
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.encode import cpu, dense, gpu, largest
from sae_fast.ops.encode.cpu import PRECISIONS
from sae_fast.ops.encode.dense import Choice
from sae_fast.ops.native import _C, threads

SUPPORTS = ("threshold", "topk", "batch_topk", "topk_any", "topk_abs")


def encode(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    *,
    activation: str,
    support: str = "threshold",
    k: float = 0,
    slack: float = 0.0,
    precision: str = "exact",
    shadow: Shadow | None = None,
    guess: Tensor | None = None,
    **parameters: Tensor | None,
) -> SparseCode:
    """The sparse code of x [B, d] (b_dec already subtracted), with W_enc [F, d] and bias [F]; u = x W_encᵀ.

    The support, of π = u + bias:
      ``threshold``   π > cut − slack; cut is 0, or max(threshold, 0) for ``jumprelu``.  A slack > 0 also keeps entries
                      just below the threshold, with value 0: the window of a straight-through estimator.
      ``topk``        the k largest π of each row, as far as they are positive; of equal ones, the lower features
      ``batch_topk``  the k · B largest π of the batch, as far as they are positive; of equal ones, the lower rows, and in a
                      row the lower features.  k need not be whole; k · B is rounded down.
      ``topk_any``    the k largest π of each row, whatever their sign; of equal ones, the lower features.  On the C++
                      engine rows with fewer than k positive ones take a dense pass of their own.
      ``topk_abs``    the k largest |π| of each row, as far as they are not 0; of equal ones, the lower features
      All but the first count a NaN as the largest.  For what neither engine takes, on a GPU the latter two among it, and a
      k above 3 % of F, torch's product decides: in chunks of rows, ``batch_topk`` with B · F values in memory at once.
    The values on it, by ``activation`` and its ``parameters`` [F] by name (sae_fast/activations):
      ``gated``       with r_mag and b_mag: magnitudes 1[π > 0] ReLU(exp(r_mag) u + b_mag) and gates ReLU(π); bias is b_gate
      ``relu``        ReLU(π); bias is b_enc.  Of ``topk_any`` and ``topk_abs``, which take no other, it is π itself.
      ``jumprelu``    with threshold: 1[π > threshold] ReLU(π); bias is b_enc
    ``precision``, of u and of the support on the engines (the reference has that of its arguments):
      ``exact``   every member, and u, by fp32 dots in one fixed order: bitwise the same for any chunking, number of threads
                  or route.  Candidates come from a 16-bit product with a proven bound (docs/screen.md); on a CPU that has
                  none, from torch's fp32 product with one; on a GPU a dense block of rows takes torch's fp32 product.
      ``fp32``    torch's fp32 product decides
      ``tf32``    the same with TF32 operands, on a GPU that has them
      ``bf16``    a 16-bit product decides and nothing is verified: entries near the threshold come and go, and u is of
                  rounded operands: 8 bits on a CPU, whose product takes bfloat16, 11 on a GPU, where it takes float16.
    ``guess`` [B], for all but ``threshold``, on the engines: what the smallest entry kept of each row, or of the batch, is
    thought to reach.  A good one, a little lower, saves time; none changes the result.
    ``shadow``: what ``ops.make_shadow(W_enc)`` gave, to save that pass; it must belong to W_enc as it is now.
    Differentiable with respect to x, W_enc, bias, r_mag and b_mag (not the threshold).  MATH.md §1.
    """
    rows, norms = (None, None) if shadow is None else shadow
    first, second = _in_order(activations.named(activation), parameters)
    indptr, indices, u, values = autograd.call(
        "encode", x, W_enc, bias, first, second, activation, support, k, slack, precision, rows, norms, guess
    )
    return SparseCode(torch.Size((x.shape[0], W_enc.shape[0])), indptr, indices, u, values)


def _in_order(activation: Activation, parameters: Mapping[str, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """The activation's parameters as the op takes them."""
    for name, parameter in parameters.items():
        if not any(name in other.parameters for other in activations.BY_NAME.values()):
            raise TypeError(f"encode() got an unexpected keyword argument {name!r}")
        if parameter is not None and name not in activation.parameters:
            raise ValueError(f"{name}: got a tensor, want None for activation {activation.name!r}, which does not use it")
    first, second, *_ = (*(parameters.get(name) for name in activation.parameters), None, None)
    return first, second


@torch.library.custom_op(
    "sae_fast::encode",
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor bias, Tensor? first, Tensor? second, str activation, str support, float k,"
    ' float slack, str precision="exact", Tensor? shadow_rows=None, Tensor? shadow_norms=None, Tensor? guess=None)'
    " -> (Tensor indptr, Tensor indices, Tensor u, Tensor values)",
)
def _encode(
    x, W_enc, bias, first, second, activation, support, k, slack, precision="exact", shadow_rows=None, shadow_norms=None,
    guess=None,
):  # fmt: skip
    """``first`` and ``second`` are the activation's parameters, in its order."""
    parameters = dict(zip(activations.named(activation).parameters, (first, second), strict=False))
    _check(x, W_enc, bias, parameters, activation, support, k, slack)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, want one of {PRECISIONS}")
    if guess is not None:
        if support == "threshold":
            raise ValueError("guess: got a tensor with support 'threshold', which does not use it, want None")
        checks.shape("guess", guess, x.shape[0])
        checks.floating("guess", guess, W_enc, "W_enc")
    shadow = checks.shadow(W_enc, shadow_rows, shadow_norms)
    choice = None if support == "threshold" else Choice(support, k)
    gpu_other = gpu.rejects(x, choice)
    body = pick(
        "encode",
        {"cpu": _cpu, "cuda": _triton, "triton": _triton, "reference": _reference},
        {
            "cpu": cpu_rejects(x, W_enc),
            "cuda": cuda_rejects("verify", x, W_enc) or gpu_other,
            "triton": triton_rejects(x, W_enc) or gpu_other,
        },
    )
    return body(x, Layer.of(W_enc, bias, activation, parameters, slack, shadow), choice, precision, guess)


@_encode.register_fake
def _(x, W_enc, bias, first, second, activation, *_):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(nnz),
        x.new_empty(activations.named(activation).value_sets, nnz),
    )


def _check(x, W_enc, bias, parameters, activation, support, k, slack) -> None:
    if support not in SUPPORTS:
        raise ValueError(f"support: got {support!r}, want one of {SUPPORTS}")
    checks.shape("W_enc", W_enc, "F", "d")
    features, d = W_enc.shape
    if features < 1:
        raise ValueError(f"W_enc: got shape {tuple(W_enc.shape)}, want at least one feature")
    checks.shape("x", x, "B", d)
    checks.floating("x", x, W_enc, "W_enc")
    for name, vector in {"bias": bias, **parameters}.items():
        if vector is None:
            raise ValueError(f"{name}: got None, want [F] for activation {activation!r}")
        checks.shape(name, vector, features)
        checks.floating(name, vector, W_enc, "W_enc")
    if support == "batch_topk" and not 0 < k <= features:
        raise ValueError(f"k: got {k:g}, want 0 < k ≤ F = {features}")
    if support not in ("threshold", "batch_topk") and not (1 <= k <= features and k == int(k)):
        raise ValueError(f"k: got {k:g}, want a whole number with 1 ≤ k ≤ F = {features}")
    if support in ("topk_any", "topk_abs") and activation != "relu":
        raise ValueError(f"activation: got {activation!r} with support {support!r}, want 'relu', whose values are π then")
    if support == "threshold" and k != 0:
        raise ValueError(f"k: got {k:g} with support 'threshold', which does not use it, want 0")
    if not slack >= 0 or (slack > 0 and support != "threshold"):
        raise ValueError(f"slack: got {slack} with support {support!r}, want ≥ 0, and 0 unless support is 'threshold'")


def _cpu(x, layer, choice, precision, guess):
    x, layer = x.contiguous(), layer.contiguous()
    if choice is None:
        indptr, indices, u = cpu.threshold_support(x, layer, precision)
    else:
        guess = None if guess is None else guess.contiguous()
        indptr, indices, u = largest.largest_support(x, layer, choice, precision, guess)
        if choice.signed:
            return indptr, indices, u, (u + layer.bias[indices.long()])[None]
    values = u.new_empty(layer.activation.value_sets, u.shape[0])
    first, second = layer.vector_slots()
    _C.activate(
        kind=layer.activation.native, nnz=u.shape[0], indices=indices, u=u, bias=layer.bias, first=first,
        second=second, values=values, threads=threads(),
    )  # fmt: skip
    return indptr, indices, u, values


def _triton(x, layer, choice, precision, guess):
    x, layer = x.contiguous(), layer.contiguous()
    if choice is None:
        return gpu.screened_code(x, layer, precision)
    return gpu.largest_code(x, layer, int(choice.k), choice.whole, precision, guess)


def _reference(x, layer, choice, _precision, _guess):
    return dense.dense_code(x, layer, choice)
