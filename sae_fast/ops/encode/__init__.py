"""encode: which features are active, and how strongly.

Body ``cpu``: screened or dotted tile by tile, see cpu.py and, for ``topk`` and ``batch_topk``, largest.py.
Bodies ``cuda`` and ``triton``: screened by one kernel that keeps a bit an entry, see gpu.py; they differ in the
kernel that verifies.
Body ``reference``: dense, any device and dtype; on a GPU it serves ``topk`` and ``batch_topk``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import Shadow, SparseCode
from sae_fast.ops import autograd, checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.encode import cpu, gpu, largest
from sae_fast.ops.encode.cpu import PRECISIONS
from sae_fast.ops.native import _C, threads

ACTIVATIONS = ("gated", "relu", "jumprelu")
SUPPORTS = ("threshold", "topk", "batch_topk")


def encode(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    *,
    activation: str,
    r_mag: Tensor | None = None,
    b_mag: Tensor | None = None,
    threshold: Tensor | None = None,
    support: str = "threshold",
    k: int = 0,
    slack: float = 0.0,
    precision: str = "exact",
    shadow: Shadow | None = None,
) -> SparseCode:
    """The sparse code of x [B, d] (b_dec already subtracted), with W_enc [F, d] and bias [F]; u = x W_encᵀ.

    The support, of π = u + bias:
      ``threshold``   π > cut − slack; cut is 0, or max(threshold, 0) for ``jumprelu``.  A slack > 0 also keeps entries
                      just below the threshold, with value 0: the window of a straight-through estimator.
      ``topk``        the k largest π of each row, as far as they are positive; of equal ones, the lower features
      ``batch_topk``  the k · B largest π of the batch, as far as they are positive; of equal ones, the lower rows, and in a
                      row the lower features
      The latter two count a NaN as the largest.  On a GPU and for other dtypes than float32 they take the dense route:
      ``topk`` in chunks of rows, ``batch_topk`` with B · F values in memory at once.
    The values on it, by ``activation``:
      ``gated``       magnitudes 1[π > 0] ReLU(exp(r_mag) u + b_mag) and gates ReLU(π); bias is b_gate
      ``relu``        ReLU(π); bias is b_enc
      ``jumprelu``    1[π > threshold] ReLU(π)
    ``precision``, of u and of the support on the engines (the reference has that of its arguments):
      ``exact``   every member, and u, by fp32 dots in one fixed order: bitwise the same for any chunking, number of threads
                  or route.  Candidates come from a 16-bit product with a proven bound (docs/screen.md); on a CPU that has
                  none, from torch's fp32 product with one; on a GPU a dense block of rows takes torch's fp32 product.
      ``fp32``    torch's fp32 product decides
      ``tf32``    the same with TF32 operands, on a GPU that has them
      ``bf16``    a 16-bit product decides and nothing is verified: entries near the threshold come and go, and u is of
                  rounded operands: 8 bits on a CPU, whose product takes bfloat16, 11 on a GPU, where it takes float16.
    ``shadow``: what ``ops.make_shadow(W_enc)`` gave, to save that pass; it must belong to W_enc as it is now.
    Differentiable with respect to x, W_enc, bias, r_mag and b_mag (not the threshold).  MATH.md §1.
    """
    rows, norms = (None, None) if shadow is None else shadow
    indptr, indices, u, values = autograd.call(
        "encode", x, W_enc, bias, r_mag, b_mag, threshold, activation, support, k, slack, precision, rows, norms
    )
    return SparseCode(torch.Size((x.shape[0], W_enc.shape[0])), indptr, indices, u, values)


@torch.library.custom_op(
    "sae_fast::encode",
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor bias, Tensor? r_mag, Tensor? b_mag, Tensor? threshold, str activation,"
    ' str support, int k, float slack, str precision="exact", Tensor? shadow_rows=None, Tensor? shadow_norms=None)'
    " -> (Tensor indptr, Tensor indices, Tensor u, Tensor values)",
)
def _encode(
    x, W_enc, bias, r_mag, b_mag, threshold, activation, support, k, slack, precision="exact", shadow_rows=None,
    shadow_norms=None,
):  # fmt: skip
    _check(x, W_enc, bias, r_mag, b_mag, threshold, activation, support, k, slack)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, want one of {PRECISIONS}")
    shadow = checks.shadow(W_enc, shadow_rows, shadow_norms)
    dense = None if support == "threshold" else f"support {support!r} takes the dense route on a GPU"
    gpu_other = gpu.rejects(x) or dense
    body = pick(
        "encode",
        {"cpu": _cpu, "cuda": _triton, "triton": _triton, "reference": _reference},
        {
            "cpu": cpu_rejects(x, W_enc),
            "cuda": cuda_rejects("verify", x, W_enc) or gpu_other,
            "triton": triton_rejects(x, W_enc) or gpu_other,
        },
    )
    cut = _cut(threshold, activation, slack, bias)
    scale = None if r_mag is None else torch.exp(r_mag)
    return body(x, W_enc, bias, scale, b_mag, threshold, cut, activation, support, k, precision, shadow)


@_encode.register_fake
def _(x, W_enc, bias, r_mag, b_mag, threshold, activation, *_):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(nnz),
        x.new_empty(2 if activation == "gated" else 1, nnz),
    )


def _check(x, W_enc, bias, r_mag, b_mag, threshold, activation, support, k, slack) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, want one of {ACTIVATIONS}")
    if support not in SUPPORTS:
        raise ValueError(f"support: got {support!r}, want one of {SUPPORTS}")
    checks.shape("W_enc", W_enc, "F", "d")
    features, d = W_enc.shape
    if features < 1:
        raise ValueError(f"W_enc: got shape {tuple(W_enc.shape)}, want at least one feature")
    checks.shape("x", x, "B", d)
    checks.floating("x", x, W_enc, "W_enc")
    vectors = {"bias": bias}
    needed = {"gated": {"r_mag": r_mag, "b_mag": b_mag}, "relu": {}, "jumprelu": {"threshold": threshold}}[activation]
    for name, vector in needed.items():
        if vector is None:
            raise ValueError(f"{name}: got None, want [F] for activation {activation!r}")
    for name, vector in (("r_mag", r_mag), ("b_mag", b_mag), ("threshold", threshold)):
        if vector is not None and name not in needed:
            raise ValueError(f"{name}: got a tensor, want None for activation {activation!r}, which does not use it")
    for name, vector in {**vectors, **needed}.items():
        checks.shape(name, vector, features)
        checks.floating(name, vector, W_enc, "W_enc")
    if support != "threshold" and not 1 <= k <= features:
        raise ValueError(f"k: got {k}, want 1 ≤ k ≤ F = {features}")
    if support == "threshold" and k != 0:
        raise ValueError(f"k: got {k} with support 'threshold', which does not use it, want 0")
    if not slack >= 0 or (slack > 0 and support != "threshold"):
        raise ValueError(f"slack: got {slack} with support {support!r}, want ≥ 0, and 0 unless support is 'threshold'")


def _cut(threshold: Tensor | None, activation: str, slack: float, bias: Tensor) -> Tensor | None:
    """[F], what π has to exceed; None for 0."""
    cut = threshold.clamp(min=0) if activation == "jumprelu" and threshold is not None else None
    if slack == 0:
        return cut
    return (torch.zeros_like(bias) if cut is None else cut) - slack


def _cpu(x, W_enc, bias, scale, b_mag, threshold, cut, activation, support, k, precision, shadow):
    x, W_enc, bias = x.contiguous(), W_enc.contiguous(), bias.contiguous()
    cut = None if cut is None else cut.contiguous()
    if support == "threshold":
        indptr, indices, u = cpu.find(x, W_enc, bias, cut, precision, shadow)
    else:
        indptr, indices, u = largest.find(x, W_enc, bias, k, support == "batch_topk", precision, shadow)
    values = u.new_empty(2 if activation == "gated" else 1, u.shape[0])
    scale, b_mag, threshold = (v if v is None else v.contiguous() for v in (scale, b_mag, threshold))
    _C.activate(
        kind=ACTIVATIONS.index(activation), nnz=u.shape[0], indices=indices, u=u, bias=bias, scale=scale, b_mag=b_mag,
        threshold=threshold, values=values, threads=threads(),
    )  # fmt: skip
    return indptr, indices, u, values


def _triton(x, W_enc, bias, scale, b_mag, threshold, cut, activation, support, k, precision, shadow):
    def contiguous(t):
        return None if t is None else t.contiguous()

    tensors = [contiguous(t) for t in (x, W_enc, bias, scale, b_mag, threshold, cut)]
    return gpu.find(tensors, activation, precision, shadow, by_product=_reference)


def _reference(x, W_enc, bias, scale, b_mag, threshold, cut, activation, support="threshold", k=0, *_):
    if support == "topk":  # a row's choice is its own
        chunks = list(crossovers.chunks(x.shape[0], W_enc.shape[0], x.device.type)) or [(0, 0)]
        return gpu.join([
            _by_product(x[a:b], W_enc, bias, scale, b_mag, threshold, cut, activation, support, k) for a, b in chunks
        ])  # fmt: skip
    return _by_product(x, W_enc, bias, scale, b_mag, threshold, cut, activation, support, k)


def _by_product(x, W_enc, bias, scale, b_mag, threshold, cut, activation, support, k):
    u = x @ W_enc.T
    pi = u + bias
    if support == "threshold":
        member = ~(pi <= (0 if cut is None else cut))  # keeps a NaN
    else:
        member = _largest_of(pi, k) if support == "topk" else _largest_of(pi.reshape(1, -1), k * x.shape[0]).view_as(pi)
    indptr = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    indptr[1:] = member.sum(1).cumsum(0)
    if activation == "gated":
        values = torch.stack([(pi > 0) * torch.relu(scale * u + b_mag), torch.relu(pi)])
    elif activation == "relu":
        values = torch.relu(pi)[None]
    else:
        values = ((pi > threshold) * torch.relu(pi))[None]
    return indptr, member.nonzero()[:, 1].int(), u[member], values[:, member]


def _largest_of(pi: Tensor, k: int) -> Tensor:
    """The k largest positive entries of each row, a NaN before all others, the first of equal ones."""
    if pi.numel() == 0:
        return torch.zeros_like(pi, dtype=torch.bool)
    last = torch.relu(pi).topk(k, dim=1).values[:, -1:]
    nan = pi.isnan()
    above = (pi > last) | (nan & ~last.isnan())
    equal = (pi == last) | (nan & last.isnan())
    left = k - above.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > left).any()):
        equal &= equal.cumsum(1, dtype=torch.int32) <= left
    return (above | equal) & ~(pi <= 0)
