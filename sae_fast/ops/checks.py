"""Argument checks shared by the ops: every message names the argument, what was got and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from sae_fast.code import Adam, Rows, Shadow
from sae_fast.ops.dispatch import trusts
from sae_fast.ops.native import _C, in_memory


def shape(name: str, tensor: Tensor, *want: int | str) -> None:
    """``want`` mixes numbers, which must match, and names such as "B", which stand for any size."""
    ok = tensor.dim() == len(want) and all(
        isinstance(w, str) or size == w for size, w in zip(tensor.shape, want, strict=True)
    )
    if not ok:
        wanted = ", ".join(map(str, want))
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want [{wanted}]")


def dtype(name: str, tensor: Tensor, *want: torch.dtype) -> None:
    if tensor.dtype not in want:
        raise ValueError(f"{name}: got {tensor.dtype}, want {' or '.join(map(str, want))}")


def floating(name: str, tensor: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    """A floating-point tensor, of the dtype and device of ``like`` when that is given."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: got {tensor.dtype}, want a floating-point dtype")
    if like is not None and tensor.dtype != like.dtype:
        raise ValueError(f"{name}: got {tensor.dtype}, want {like.dtype}, the dtype of {like_name}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, want {like.device}, the device of {like_name}")


def offsets(name: str, starts: Tensor, nnz: int) -> None:
    """Ascending from 0 to nnz.  On the CPU only: a GPU would synchronise."""
    if starts.device.type == "cpu" and not (starts[0] == 0 and starts[-1] == nnz and bool((starts.diff() >= 0).all())):
        raise ValueError(
            f"{name}: got offsets from {int(starts[0])} to {int(starts[-1])}, want them ascending from 0 to {nnz}"
        )


def within(name: str, tensor: Tensor, size: int) -> None:
    """Every value in 0 .. size - 1: the engine reads and writes there.  On the CPU only: a GPU would synchronise."""
    if tensor.device.type == "cpu" and tensor.numel():
        low, high = (int(t) for t in tensor.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name}: got values from {low} to {high}, want them within 0 … {size - 1}")


def ascending(indptr: Tensor, indices: Tensor) -> None:
    """Features ascend within each row.  On the CPU only: a GPU would synchronise."""
    if indices.device.type != "cpu" or indices.shape[0] < 2:
        return
    falls = indices[1:] <= indices[:-1]
    starts = indptr[(indptr > 0) & (indptr < indices.shape[0])]
    falls[starts - 1] = False
    if bool(falls.any()):
        at = int(falls.nonzero()[0]) + 1
        raise ValueError(f"indices: got {int(indices[at])} after {int(indices[at - 1])}, want them ascending in each row")


def _native(*tensors: Tensor) -> bool:
    """True if one pass of the engine can find them sound; what is wrong is said by the checks in torch."""
    return _C is not None and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def csr(indptr: Tensor, indices: Tensor, features: int) -> None:
    shape("indptr", indptr, "B + 1")
    shape("indices", indices, "nnz")
    dtype("indptr", indptr, torch.int64)
    dtype("indices", indices, torch.int32)
    if indptr.shape[0] < 1:
        raise ValueError("indptr: got no element, want B + 1 of them")
    if trusts() or (_native(indptr, indices) and _C.sound_csr(indptr, indices, features)):
        return
    offsets("indptr", indptr, indices.shape[0])
    within("indices", indices, features)
    ascending(indptr, indices)


def csc(colptr: Tensor, rows: Tensor, perm: Tensor, batch: int) -> None:
    shape("colptr", colptr, "F + 1")
    shape("rows", rows, "nnz")
    shape("perm", perm, rows.shape[0])
    dtype("colptr", colptr, torch.int64)
    dtype("rows", rows, torch.int32)
    dtype("perm", perm, torch.int64)
    if colptr.shape[0] < 1:
        raise ValueError("colptr: got no element, want F + 1 of them")
    if trusts() or (_native(colptr, rows, perm) and _C.sound_csc(colptr, rows, perm, batch)):
        return
    offsets("colptr", colptr, rows.shape[0])
    within("rows", rows, batch)
    within("perm", perm, rows.shape[0])


def sources(values: list[Tensor], A: list[Tensor], nnz: int) -> None:
    if len(values) != len(A) or not values:
        raise ValueError(f"values, A: got {len(values)} and {len(A)} tensors, want as many of each, at least one")
    shape("A[0]", A[0], "B", "d")
    for s, (v, a) in enumerate(zip(values, A, strict=True)):
        shape(f"values[{s}]", v, nnz)
        shape(f"A[{s}]", a, *A[0].shape)
        floating(f"values[{s}]", v, A[0], "A[0]")
        floating(f"A[{s}]", a, A[0], "A[0]")


def largest(x: Tensor) -> Tensor:
    """0-d: the largest magnitude; NaN if there is one, 0 for an empty tensor.  One pass, nothing of the size of x."""
    if x.numel() == 0:
        return x.new_zeros(())
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high)


def finite(name: str, x: Tensor) -> None:
    """Raises ``ValueError`` with the first non-finite index.  Synchronises on a GPU.  A fake tensor has no values."""
    if is_fake(x):
        return
    try:
        sound = bool(torch.isfinite(largest(x)))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise NotImplementedError(
            f"{name}: torch.vmap cannot map this; give the layer leading dimensions, or loop"
        ) from error
    if not sound:
        good = torch.isfinite(x)
        index = tuple(int(i) for i in (~good).nonzero()[0])
        raise ValueError(f"{name}: got {x[index].item()} at index {index} of shape {tuple(x.shape)}, want finite values")


def row_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature) -> None:
    """A RowGradient for the features first_feature .. + n of W [n, d]."""
    shape("W", W, "n", "d")
    floating("W", W)
    shape("rows", rows, "nnz")
    sources(values, A, rows.shape[0])
    csc(colptr, rows, perm, A[0].shape[0])
    shape("A[0]", A[0], "B", W.shape[1])
    floating("A[0]", A[0], W, "W")
    if self_coefficient is not None:
        shape("self_coefficient", self_coefficient, W.shape[0])
        floating("self_coefficient", self_coefficient, W, "W")
    total = colptr.shape[0] - 1
    if first_feature < 0 or first_feature + W.shape[0] > total:
        raise ValueError(f"first_feature: got {first_feature} with {W.shape[0]} rows, want a range within F = {total}")


def adam_state(state: Rows, adam: Adam) -> None:
    (W, v, last_step, _, m), step = state, adam.step
    for name, scalar in {"grad_scale": adam.grad_scale, "skip": adam.skip}.items():
        if scalar is not None:
            shape(name, scalar)
    moments = {"v": v} if m is None else {"v": v, "m": m}
    for name, moment in moments.items():
        shape(name, moment, *W.shape)
        floating(name, moment, W, "W")
    shape("last_step", last_step, W.shape[0])
    dtype("last_step", last_step, torch.int64)
    for name, tensor in {"W": W, "last_step": last_step, **moments}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tensor.stride()}, want a contiguous tensor, as it is updated in place")
    if step < 1:
        raise ValueError(f"step: got {step}, want a count from 1")
    if last_step.device.type == "cpu" and last_step.numel() and int(last_step.max()) >= step:
        raise ValueError(f"step: got {step}, want one after the last_step of every row, up to {int(last_step.max())}")
    lr, beta1, beta2, eps = adam.lr, adam.beta1, adam.beta2, adam.eps
    if not (lr >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0):
        raise ValueError(
            f"lr, beta1, beta2, eps: got {lr}, {beta1}, {beta2}, {eps}, want lr ≥ 0, 0 ≤ beta1 < 1, 0 ≤ beta2 < 1, eps ≥ 0"
        )
    if beta1 > 0 and m is None:
        raise ValueError(f"m: got None, want [{W.shape[0]}, {W.shape[1]}], the first moment, for beta1 = {beta1}")


def memory(name: str, tensor: Tensor) -> None:
    """For what reads a tensor's memory outside of any op, where nothing unwraps it."""
    if not in_memory(tensor):
        got = f"a {type(tensor).__name__} that is wrapped or recorded"
        raise ValueError(f"{name}: got {got}, want one with values in memory")


def engine_weight(W: Tensor) -> None:
    """The engine reads a weight wherever it says it is."""
    if W.dtype != torch.float32 or W.dim() != 2 or W.device.type != "cpu":
        raise ValueError(f"W: got {W.dtype} {tuple(W.shape)} on {W.device}, want float32 [F, d] on the CPU")


def shadow(W: Tensor, rows: Tensor | None, norms: Tensor | None) -> Shadow | None:
    """The Shadow of a weight [F, d], from an op's two arguments."""
    if rows is None and norms is None:
        return None
    if rows is None or norms is None:
        raise ValueError("shadow: got one of rows and norms, want both or neither")
    dtype("shadow.rows", rows, torch.bfloat16, torch.float16)
    made = Shadow(rows, norms)
    if made.of_gpu:
        from sae_fast.kernels.round import norm_columns, padded

        widths, norm = (padded(W.shape[1]), norm_columns(W.shape[1])), torch.float32
    else:
        widths, norm = (W.shape[1], 2), torch.float64
        if W.dtype != torch.float32 or W.device.type != "cpu":
            raise ValueError(
                f"shadow: got a weight in {W.dtype} on {W.device}, want float32 on the CPU, of which it was made"
            )
    dtype("shadow.norms", norms, norm)
    for name, tensor, width in zip(("shadow.rows", "shadow.norms"), made, widths, strict=True):
        shape(name, tensor, W.shape[0], width)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tensor.stride()}, want what make_shadow gave")
        if tensor.device != W.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, want {W.device}, the weight's device")
    return made
