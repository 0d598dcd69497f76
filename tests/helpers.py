"""What the op tests share: the rule that judges an error, random problems, and comparison of bits."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from types import ModuleType
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from sae_fast.code import SparseCode, Transposed

T = TypeVar("T")
# Seconds for what ends by itself unless it hangs: no machine is so busy that it takes this long.
PATIENCE = 600

# (B, d, F).  Every pair of a d with an F occurs once, and every B with every d and with every F.
SHAPES = [
    (1, 1, 1), (3, 1, 31), (257, 1, 33), (3, 1, 100), (257, 1, 4099),
    (257, 63, 1), (1, 63, 31), (3, 63, 33), (257, 63, 100), (1, 63, 4099),
    (3, 100, 1), (257, 100, 31), (1, 100, 33), (257, 100, 100), (3, 100, 4099),
    (1, 769, 1), (3, 769, 31), (257, 769, 33), (1, 769, 100), (257, 769, 4099),
]  # fmt: skip
# One shape of each d and of each F: for what multiplies the tests (instruction sets, routes, activations).
FEW_SHAPES = [(1, 1, 33), (3, 63, 31), (257, 100, 4099), (257, 769, 100), (3, 100, 1)]


def op_module(op: str) -> ModuleType:
    """The module of an op: ``sae_fast.ops.encode`` as an attribute is the function of the same name."""
    return importlib.import_module(f"sae_fast.ops.{op}")


# ---- Judging results ------------------------------------------------------------------------------------------------


def assert_close_2x(kernel: Tensor, torch_same_dtype: Tensor, ref64: Tensor, name: str = "result") -> None:
    """‖kernel − ref64‖ ≤ 2 ‖torch at the same dtype − ref64‖ + 2⁻²⁴ max|ref64|.  A NaN anywhere fails."""
    assert kernel.shape == ref64.shape == torch_same_dtype.shape, f"{name}: shape {kernel.shape}, want {ref64.shape}"
    assert ref64.dtype == torch.float64
    if ref64.numel() == 0:
        return
    error = (kernel.detach().double() - ref64).norm()
    torchs = (torch_same_dtype.detach().double() - ref64).norm()
    allowed = 2 * torchs + 2.0**-24 * ref64.abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, torch's own {torchs:.3e}, allowed {allowed:.3e}"


def both(formula: Callable, *inputs: Tensor) -> tuple:
    """``formula``, plain PyTorch, of the inputs in their own dtype and in float64."""
    return formula(*inputs), formula(*(t.double() for t in inputs))


def judge(kernel: Tensor, formula: Callable[..., Tensor], *inputs: Tensor, name: str = "result") -> None:
    """``kernel`` by the 2× rule against ``formula``, plain PyTorch, run in the inputs' dtype and in float64."""
    assert_close_2x(kernel, *both(formula, *inputs), name)


class Judge:
    """The 2× rule over several trials together: of a handful of numbers, luck decides whose rounding is smaller."""

    def __init__(self):
        self.trials: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, name: str, kernel: Tensor, torch_same_dtype: Tensor, ref64: Tensor) -> None:
        assert kernel.shape == ref64.shape == torch_same_dtype.shape, f"{name}: shape {kernel.shape}, want {ref64.shape}"
        triple = (kernel.detach().flatten(), torch_same_dtype.detach().flatten(), ref64.detach().flatten())
        self.trials.setdefault(name, []).append(triple)

    def verdict(self) -> None:
        assert self.trials
        for name, triples in self.trials.items():
            assert_close_2x(*(torch.cat(part) for part in zip(*triples, strict=True)), name=name)


def seeds(outputs: int) -> range:
    """As many trials as it takes for about 300 numbers, at most 64."""
    return range(max(1, min(64, 300 // max(outputs, 1))))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits: 0 is not −0, and a NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        a, b = (t.detach().contiguous().view(integer[t.element_size()]) for t in (a, b))
    return torch.equal(a, b)


def tensors_in(result) -> list[Tensor]:
    """The tensors of a result: a tensor, a dataclass, or nested lists and tuples of those."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [t for part in result for t in tensors_in(part)]
    if hasattr(result, "__dataclass_fields__"):
        return [t for f in fields(result) for t in tensors_in(getattr(result, f.name))]
    return []


def assert_same_bits(a, b) -> None:
    for i, (x, y) in enumerate(zip(tensors_in(a), tensors_in(b), strict=True)):
        assert same_bits(x, y), f"tensor {i} of the result differs"


def assert_repeats(run: Callable[[], object], threads: Iterable[int] = (1, 2, 3)) -> None:
    """``run`` gives the same bits every time and at every thread count."""
    first = run()
    assert tensors_in(first)
    assert_same_bits(first, run())
    for n in threads:
        torch.set_num_threads(n)
        assert_same_bits(first, run())


@contextmanager
def raises_and_changes_nothing(match: str, *arguments):
    """A ``ValueError`` whose message matches, and arguments whose bits are as before."""
    before = [t.clone() for t in tensors_in(arguments)]
    with pytest.raises(ValueError, match=match):
        yield
    assert_same_bits(before, tensors_in(arguments))


def strided(t: Tensor) -> Tensor:
    """The same values in a tensor that is not contiguous (when it has an element to skip); a hole holds NaN."""
    hole = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), hole, dtype=t.dtype)
    view = wide[..., 1::2]
    view.copy_(t)
    return view


def opcheck(op, arguments, utils=None) -> None:
    """torch.library.opcheck: the schema tells the truth about mutation and aliasing, and the fake and autograd agree."""
    utils = utils or (
        "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )  # fmt: skip
    torch.library.opcheck(op, arguments, test_utils=utils)


def wait_until(condition: Callable[[], T]) -> T:
    """What ``condition()`` gives once that is true; fails where something hangs."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"{condition} is still {found!r}"
        time.sleep(0.02)
    return found


# ---- Random problems ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The input and parameters of a Gated SAE."""

    x: Tensor
    W_enc: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(*(t.to(dtype) for t in self.tensors()))

    def leaves(self, dtype: torch.dtype | None = None) -> Problem:
        """Fresh copies that require gradients."""
        return Problem(*(t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in self.tensors()))

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def gated(self) -> tuple[Tensor, ...]:
        """The arguments of reference.gated_encode."""
        return self.x, self.W_enc, self.b_gate, self.b_mag, self.r_mag, self.b_dec

    @property
    def x_c(self) -> Tensor:
        return self.x - self.b_dec


@cache
def make_inputs(B: int, d: int, F: int, density: float = 0.05, seed: int = 0) -> Problem:
    """A random gated problem in float32, about ``density`` of whose gates are open.

    Each bias puts its kink in the middle of a gap between the batch's pre-activations, so that float32 and float64 agree
    on every gate.  By turns a feature has gates open at magnitude 0 (S \\ S′) and magnitudes behind closed gates.
    """
    g = torch.Generator().manual_seed(1000 * seed + B + 7 * d + 13 * F)
    x = torch.randn(B, d, generator=g)
    W_enc = torch.randn(F, d, generator=g) / d**0.5
    b_dec = 0.1 * torch.randn(d, generator=g)
    r_mag = 0.2 * torch.randn(F, generator=g)
    W_dec = torch.nn.functional.normalize(torch.randn(F, d, generator=g), dim=1)
    u = (x - b_dec).double() @ W_enc.double().T
    open_gates = torch.bernoulli(torch.full((B, F), density), generator=g).sum(0).long()
    open_gates[0] = max(1, int(open_gates[0]))
    turn = torch.arange(F) % 2 == 1
    positive = torch.where(turn, (open_gates * 0.6).long(), (open_gates * 1.5).long() + 1)
    b_gate = -_between(u, open_gates)
    b_mag = -r_mag.double().exp() * _between(u, positive)
    return Problem(x, W_enc, b_gate.float(), b_mag.float(), r_mag, W_dec, b_dec)


def _between(u: Tensor, above: Tensor) -> Tensor:
    """[F]: a level that about ``above`` [F] of the rows of u [B, F] exceed, in the middle of the widest gap nearby."""
    levels = u.sort(0, descending=True).values
    levels = torch.cat([levels[:1] + 0.5, levels, levels[-1:] - 0.5])
    gaps = levels[:-1] - levels[1:]
    reach = 3 if u.shape[0] > 30 else 0
    distance = (torch.arange(gaps.shape[0])[:, None] - above.clamp(max=u.shape[0])).abs()
    best = torch.where(distance <= reach, gaps, -1.0).argmax(0, keepdim=True)
    return ((levels.gather(0, best) + levels.gather(0, best + 1)) / 2)[0]


@cache
def random_code(B: int, F: int, V: int = 2, density: float = 0.05, seed: int = 0) -> SparseCode:
    """A code with non-negative values [V, nnz], a fifth of them 0.  Row 1 has no entry; rows 2 and 7 have all of them,
    where that leaves the batch as sparse as it is (of few features or many rows)."""
    g = torch.Generator().manual_seed(1000 * seed + B + 17 * F)
    member = torch.rand(B, F, generator=g) < max(density, min(1.0, 4 / F))
    member[0:1, 0] = True
    member[1:2] = False
    if F <= 100 or B > 100:
        member[2:3] = member[7:8] = True
    return code_of(member, V, g)


def code_of(member: Tensor, V: int, g: torch.Generator) -> SparseCode:
    """A code with random values on the support ``member`` [B, F]."""
    nnz = int(member.sum())
    values = torch.randn(V, nnz, generator=g).abs() * (torch.rand(V, nnz, generator=g) > 0.2)
    indptr = torch.zeros(member.shape[0] + 1, dtype=torch.int64)
    indptr[1:] = member.sum(1).cumsum(0)
    u = torch.randn(nnz, generator=g)
    return SparseCode(member.shape, indptr, member.nonzero()[:, 1].int(), u, values)


def rows_of(code: SparseCode, first: int, last: int) -> SparseCode:
    """The code of the rows first .. last."""
    a, b = int(code.indptr[first]), int(code.indptr[last])
    return SparseCode(
        shape=torch.Size((last - first, code.d_sae)),
        indptr=code.indptr[first : last + 1] - a,
        indices=code.indices[a:b],
        u=code.u[a:b],
        values=code.values[:, a:b],
    )


def dense(code: SparseCode, values: Tensor) -> Tensor:
    """[..., B, F] from values [..., nnz], without the engine."""
    counts = code.indptr.diff()
    rows = torch.repeat_interleave(torch.arange(code.batch), counts)
    out = torch.zeros(*values.shape[:-1], code.batch, code.d_sae, dtype=values.dtype)
    out[..., rows, code.indices.long()] = values
    return out


def decoded(code: SparseCode, values: Tensor, W: Tensor) -> Tensor:
    """[V, B, d]: the sums of W's rows weighted by values [V, nnz].  In float32 by embedding_bag, torch's own op for a
    sparse sum and the one to beat; in any other dtype by a dense product."""
    if values.dtype != torch.float32:
        return dense(code, values) @ W
    bags = (code.indices.long(), W, code.indptr[:-1])
    sums = [torch.nn.functional.embedding_bag(*bags, mode="sum", per_sample_weights=v.contiguous()) for v in values]
    return torch.stack(sums)


def at_entries(code: SparseCode, matrix: Tensor) -> Tensor:
    """[..., nnz]: the entries of [..., B, F] on the support."""
    rows = torch.repeat_interleave(torch.arange(code.batch), code.indptr.diff())
    return matrix[..., rows, code.indices.long()]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grid(*shape: int, step: float, reach: int, seed: int) -> Tensor:
    """Multiples of ``step`` up to ±reach·step: sums of their products are exact in float32."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-reach, reach + 1, shape, generator=g).float() * step


def assert_is_code(code: SparseCode) -> None:
    """The invariants of a SparseCode."""
    assert code.indptr.dtype == torch.int64 and code.indices.dtype == torch.int32
    assert code.indptr[0] == 0 and code.indptr[-1] == code.nnz and bool((code.indptr.diff() >= 0).all())
    assert code.indptr.shape == (code.batch + 1,) and code.u.shape == (code.nnz,) and code.values.shape[1:] == (code.nnz,)
    if code.nnz:
        assert int(code.indices.min()) >= 0 and int(code.indices.max()) < code.d_sae
    rows = torch.repeat_interleave(torch.arange(code.batch), code.indptr.diff())
    keys = rows * code.d_sae + code.indices.long()
    assert bool((keys.diff() > 0).all()), "features ascend within a row"


def corrupt_codes(B: int, F: int) -> list:
    """Codes that no op may take, as pytest parameters.  The checks come before the choice of a body, so the tests choose
    ``reference``: there a missing check is a wrong result or exception, not a write to someone else's memory."""
    code = random_code(B, F)

    def wrong(name: str, at: int, value: int) -> SparseCode:
        tensor = getattr(code, name).clone()
        tensor[at] = value
        return replace(code, **{name: tensor})

    cases = {
        "int32 indptr": replace(code, indptr=code.indptr.int()),
        "int64 indices": replace(code, indices=code.indices.long()),
        "indptr of two dimensions": replace(code, indptr=code.indptr[None]),
        "indices of two dimensions": replace(code, indices=code.indices[None]),
        "empty indptr": replace(code, indptr=code.indptr[:0]),
        "index of F": wrong("indices", 0, F),
        "negative index": wrong("indices", 0, -1),
        "first offset not 0": wrong("indptr", 0, 1),
        "last offset below nnz": wrong("indptr", -1, code.nnz - 1),
        "descending offsets": wrong("indptr", 1, int(code.indptr[3]) + 1),
    }
    return [pytest.param(name, case, id=name) for name, case in cases.items()]


def corrupt_transposed(csc: Transposed) -> list:
    """Transposed entries that no op may take, as pytest parameters."""

    def wrong(name: str, at: int, value: int) -> Transposed:
        tensor = getattr(csc, name).clone()
        tensor[at] = value
        return replace(csc, **{name: tensor})

    nnz = csc.rows.shape[0]
    cases = {
        "int32 colptr": replace(csc, colptr=csc.colptr.int()),
        "int64 rows": replace(csc, rows=csc.rows.long()),
        "int32 perm": replace(csc, perm=csc.perm.int()),
        "perm too short": replace(csc, perm=csc.perm[:-1]),
        "rows of two dimensions": replace(csc, rows=csc.rows[None]),
        "a row beyond A": wrong("rows", 0, 1000),
        "a negative row": wrong("rows", 0, -1),
        "perm beyond nnz": wrong("perm", 0, nnz),
        "negative perm": wrong("perm", 0, -1),
        "first offset not 0": wrong("colptr", 0, 1),
        "last offset below nnz": wrong("colptr", -1, nnz - 1),
    }
    return [pytest.param(name, case, id=name) for name, case in cases.items()]
