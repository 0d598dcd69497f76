"""What is measured, by whom, in which order, and what it should reach.

The order is that of importance: the budget may cut the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import sae_fast as sf
from benchmarks.cases import CASES
from benchmarks.cases.floors import step_bytes
from benchmarks.cases.step import L1, SETTINGS
from benchmarks.data import Shape, World
from benchmarks.gate import sift
from benchmarks.gpu import kinds
from benchmarks.gpu.goals import PRECISIONS, PRODUCT, TWINS, named
from benchmarks.gpu.measure import Contender, Job, Running, Sink, Unavailable, wrong
from benchmarks.gpu.rivals import Dense, DictionaryLearning, gated_loss
from benchmarks.gpu.world import LARGE, SMALL
from benchmarks.registry import OURS
from sae_fast import GatedSAE, reference

# ---- Truth ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def true_losses(here: World) -> tuple[float, ...]:
    """total, reconstruction, sparsity, auxiliary of the first batch in float64, some rows at a time."""
    with torch.no_grad():
        parameters = {name: p.double() for name, p in here.sae.named_parameters()}
        x, sums = here.batches[0], [0.0] * 4
        step = max(1, 2**25 // here.sae.d_sae)
        for first in range(0, x.shape[0], step):
            rows = x[first : first + step].double()
            losses = reference.gated_loss(rows, **parameters, l1_coefficient=L1)  # type: ignore[arg-type]
            sums = [s + float(term) * rows.shape[0] for s, term in zip(sums, losses, strict=True)]
    return tuple(s / x.shape[0] for s in sums)


def wrong_losses(here: World, got: dict[str, float], precision: str) -> list[str]:
    truth = dict(zip(("loss", "reconstruction", "sparsity", "auxiliary"), true_losses(here), strict=True))
    return wrong(got, truth, precision)


@torch.no_grad()
def wrong_support(sae: GatedSAE, x: Tensor, code: sf.SparseCode, precision: str, rows: int = 256) -> list[str]:
    """Entries of the first rows whose gate is on the wrong side of 0 by more than the precision's rounding."""
    x, indptr = x[:rows], code.indptr[: rows + 1]
    nnz = int(indptr[-1])
    got = torch.zeros(x.shape[0], sae.d_sae, dtype=torch.bool, device=x.device)
    at = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), indptr.diff())
    got[at, code.indices[:nnz].long()] = True
    x_c, W = (x - sae.b_dec).double(), sae.W_enc.double()
    pi = x_c @ W.T + sae.b_gate.double()
    # A dot's rounding; of operands with 8 bits in front of it, twice 2⁻⁹ and what their product leaves.
    unit = (x.shape[1] + 8) * 2.0**-24 if precision == "exact" else 2.0**-7
    slack = unit * (x_c.norm(dim=1)[:, None] * W.norm(dim=1) + sae.b_gate.abs().double())
    wrong = int(((got != (pi > 0)) & (pi.abs() > slack)).sum())
    return [f"support: {wrong} entries of {rows} rows are wrong beyond ties"] if wrong else []


# ---- Contenders -----------------------------------------------------------------------------------------------------


def ours(here: World, precision: str) -> GatedSAE:
    sae = here.new_sae()
    sae.precision = precision
    return sae


@contextmanager
def cuda_bodies(ops: frozenset[str]) -> Iterator[None]:
    """In the block these ops run their CUDA bodies, and only these."""
    from sae_fast.kernels import native

    before = dict(native.FASTER)
    native.FASTER.update({generation: ops for generation in before})
    try:
        yield
    finally:
        native.FASTER.update(before)


def with_bodies(start: Callable[[World], Running], ops: frozenset[str]) -> Callable[[World], Running]:
    """A contender whose ops take these CUDA bodies, from its start on: a captured graph keeps what it was captured with."""

    def started(here: World) -> Running:
        from sae_fast.kernels import native

        if ops and native.module is None:
            raise Unavailable("the extension sae_fast._C_cuda is not built")
        with cuda_bodies(ops):
            it = start(here)

        def inside(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                with cuda_bodies(ops):
                    return function(*arguments)

            return call

        return replace(it, run=inside(it.run), check=inside(it.check))

    return started


def step(precision: str) -> Callable[[World], Running]:
    def start(here: World) -> Running:
        sae = ours(here, precision)
        trainer = sf.Trainer(sae, **SETTINGS)

        def check() -> list[str]:
            log = trainer.step(here.batches[0])
            got = {name: getattr(log, name) for name in ("loss", "reconstruction", "sparsity", "auxiliary")}
            return wrong_losses(here, got, precision)

        return Running(trainer.step, here.batches, check, own=_bytes(sae))

    return start


def encode(precision: str) -> Callable[[World], Running]:
    def start(here: World) -> Running:
        sae = ours(here, precision)
        frozen = sae.frozen()
        frozen.__enter__()  # what the product needs of fixed weights is made once, as for any model in use

        @torch.no_grad()
        def run(x: Tensor) -> sf.SparseCode:
            return sae.encode_sparse(x)

        return Running(run, here.batches, lambda: wrong_support(sae, here.batches[0], run(here.batches[0]), precision))

    return start


def rival(make: Callable[[GatedSAE], Any], precision: str) -> Callable[[World], Running]:
    def start(here: World) -> Running:
        one = make(here.new_sae())
        check = lambda: wrong_losses(here, {"loss": float(one(here.batches[0]))}, precision)  # noqa: E731
        return Running(one, here.batches, check, own=sum(p.numel() * p.element_size() for p in one.parameters().values()))

    return start


def compiled(precision: str, mode: str = "default") -> Callable[[World], Running]:
    return rival(lambda sae: Dense(sae, gated_loss(L1), SETTINGS["lr"], precision, mode), precision)


def product(dtype: torch.dtype, tf32: bool = False) -> Callable[[World], Running]:
    """The encoder's product alone, of operands that are there already, into memory that is there already."""

    def start(here: World) -> Running:
        W, inputs = here.sae.W_enc.detach().to(dtype), [x.to(dtype) for x in here.batches]
        out = torch.empty(inputs[0].shape[0], W.shape[0], dtype=dtype, device=W.device)

        def run(x: Tensor) -> None:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.mm(x, W.T, out=out)
            torch.backends.cuda.matmul.allow_tf32 = before

        return Running(run, inputs, flops=2.0 * out.numel() * W.shape[1])

    return start


def screen(how: str) -> Callable[[World], Running]:
    """The encoder's screen alone, by the fused kernel, its persistent form, or the library's product and a scan of its
    signs: whichever is fastest ships."""

    def start(here: World) -> Running:
        from sae_fast.kernels import compact
        from sae_fast.kernels import screen as kernels
        from sae_fast.kernels._mask import places, words
        from sae_fast.kernels.round import bound_terms, padded, rounded

        sae, B = here.sae, here.shape.B
        (W, norms), K = rounded(sae.W_enc.detach()), padded(sae.d_in)
        mask = torch.empty(B, words(sae.d_sae), dtype=torch.int32, device=W.device)
        inputs = []
        for x in here.batches:
            rows, x_norms = rounded((x - sae.b_dec).detach())
            inputs.append((rows, *bound_terms(x_norms, norms, sae.b_gate.detach(), None, K)))

        def run(it: tuple[Tensor, Tensor, Tensor]) -> None:
            rows, *terms = it
            if how == "library":
                kernels.screen_by_library(rows, W, *terms, mask)
            else:
                kernels.screen(rows, W, *terms, mask, persistent=how == "persistent")

        @torch.no_grad()
        def check() -> list[str]:
            mask.fill_(0)
            run(inputs[0])
            code = sae.encode_sparse(here.batches[0])
            word, bit = places(code.indices)
            missed = int(((mask[code.row_ids(), word.long()] >> bit) & 1 == 0).sum())
            found = int(compact.count(mask, sae.d_sae).rows.sum())
            if missed or found > 2 * code.nnz:
                return [f"mask: misses {missed} of {code.nnz} members, and lets {found} pass"]
            return []

        return Running(run, inputs, check, flops=2.0 * B * sae.d_in * sae.d_sae)

    return start


def copy(here: World) -> Running:
    """Device to device, bytes read and written."""
    source = here.sae.W_enc.detach()
    out = torch.empty_like(source)
    return Running(lambda _: out.copy_(source), [None], moved=2 * source.numel() * source.element_size())


def gather(here: World) -> Running:
    """Rows of W_dec in random order, read and written."""
    W = here.sae.W_dec.detach()
    inputs = [torch.randint(W.shape[0], (here.shape.B * 8,), device=W.device) for _ in range(4)]
    out = W.new_empty(inputs[0].shape[0], W.shape[1])
    return Running(lambda i: torch.index_select(W, 0, i, out=out), inputs, moved=2 * out.numel() * out.element_size())


def op(name: str) -> Callable[[World], Running]:
    """Ours among the providers of an op's case, checked by the project's own gate on a few rows."""

    def start(here: World) -> Running:
        case = CASES[name]
        provider = case.providers[OURS]
        with torch.device(here.sae.W_enc.device):

            def check() -> list[str]:
                with torch.device(here.sae.W_enc.device):
                    faults, _ = sift(case, here.head(128, 2), {OURS: provider})
                return faults.get(OURS, [])

            return Running(provider.start(here.new_sae()), case.inputs(here), check)

    return start


def _bytes(sae: GatedSAE) -> int:
    return sum(p.numel() * p.element_size() for p in sae.parameters())


# ---- Roofline -------------------------------------------------------------------------------------------------------


def work(case: str, s: Shape, nnz: int, touched: int) -> tuple[float, float, float]:
    """(flops on the tensor cores, all flops, bytes) that an op must at least spend: each input read once, each output
    written once; of a weight only the rows that are touched."""
    x, W, entry = 4 * s.B * s.d, 4 * touched * s.d, 2.0 * nnz * s.d
    product = 2.0 * s.B * s.d * s.F
    return {
        "encode": (product, product + entry, x + 2 * s.F * s.d + W + 16 * nnz),
        "decode": (0, entry, W + x + 8 * nnz),
        "decode_loss": (0, 4 * entry, W + 3 * x + 20 * nnz),
        "sampled_dots": (0, entry, W + x + 8 * nnz),
        "transpose": (0, 0, 16 * nnz + 8 * s.F),
        "outer": (0, entry, x + 4 * s.F * s.d + 16 * nnz),
        "grad_sqnorm": (0, entry, x + 16 * nnz),
        "weight_step": (0, entry + 10 * touched * s.d, x + 4 * W + 16 * nnz),
        "step": (product, product + 7 * entry + 20 * touched * s.d, step_bytes(s, touched)),
    }[case]


def roofline(job: Job, here: World, sink: Sink) -> None:
    """Beside an op's time: its flops, its bytes, and the larger of the two times that they need by the product and the copy
    measured in this run."""
    if job.case.startswith("kind_"):
        return
    kind = "encode" if job.case.startswith("encode") else "step" if job.case.startswith("step") else job.case
    with torch.no_grad():
        code = here.sae.encode_sparse(here.batches[0])
    sink.add(job.case, OURS, job.mode, "l0", job.shape, [code.nnz / job.shape.B])
    dots, flops, moved = work(kind, job.shape, code.nnz, code.indices.unique().numel())
    rate, bandwidth = sink["ceilings", PRODUCT, "tflops", LARGE], sink["ceilings", "copy", "rate", LARGE]
    sink.add(job.case, OURS, job.mode, "flops", job.shape, [flops / 1e9])
    sink.add(job.case, OURS, job.mode, "bytes", job.shape, [moved / 1e6])
    floor = max(dots / (rate * 1e9), moved / (bandwidth * 1e6))
    if floor == floor:
        note = "bytes ÷ copy (a row that several entries name counted once), tensor flops ÷ product, the larger"
        sink.add(job.case, "floor", job.mode, "floor", job.shape, [floor], note)
    gathered = code.nnz * job.shape.d * 4 / (sink["ceilings", "gather", "rate", LARGE] * 1e6)
    if kind in ("decode_loss", "weight_step", "decode", "outer", "grad_sqnorm", "sampled_dots") and gathered == gathered:
        note = "the rows that the entries name, each time they do, ÷ gather"
        sink.add(job.case, "gather_floor", job.mode, "floor", job.shape, [gathered], note)


# ---- The order ------------------------------------------------------------------------------------------------------

BARE = Contender(PRODUCT, product(torch.bfloat16), "cuBLAS, into existing memory")
COMPILED = Contender("compiled_bf16", compiled("bf16"), "torch.compile, autocast", optional=True)
TF32 = Contender("compiled_tf32", compiled("tf32"), "torch.compile, TF32", optional=True)
AUTOTUNED = Contender(
    "compiled_bf16_autotuned", compiled("bf16", "max-autotune-no-cudagraphs"), "torch.compile", optional=True
)
DL = Contender(
    "dictionary_learning", rival(partial(DictionaryLearning, lr=SETTINGS["lr"], l1=L1), "fp32"),
    "our rewriting of GatedSAETrainer.update's operations (0.1.0, its fp32 defaults)", optional=True,
)  # fmt: skip
OPS = ("decode_loss", "weight_step", "encode", "transpose", "decode", "sampled_dots", "outer", "grad_sqnorm")


def mine(start: Callable[[str], Callable[[World], Running]]) -> tuple[Contender, ...]:
    return tuple(Contender(name, start(precision)) for name, precision in PRECISIONS.items())


def jobs(large: Shape = LARGE, small: Shape = SMALL, earned: frozenset[str] = frozenset()) -> Iterator[Job]:
    """``earned``: the ops whose CUDA bodies were found to be faster, which a step is to show."""

    def steps(shape: Shape, frequencies: str, *rivals: Contender, needs: float = 30.0) -> Job:
        who = (BARE, *mine(step), *rivals)
        return Job(named("step", frequencies), "train", shape, frequencies, who, memory=True, needs=needs)

    def encodes(shape: Shape, frequencies: str) -> Job:
        return Job(named("encode_sparse", frequencies), "inference", shape, frequencies, (BARE, *mine(encode)))

    ceilings = (BARE, Contender("copy", copy), Contender("gather", gather))
    yield Job("ceilings", "floor", large, "uniform", ceilings)
    yield steps(large, "uniform", COMPILED)
    yield encodes(large, "uniform")
    yield Job("step", "train", large, "uniform", (TF32, DL), memory=True, needs=30.0)
    yield steps(small, "uniform", COMPILED, TF32, DL)
    yield encodes(small, "uniform")
    for shape in (large, small):
        yield from map(partial(kinds.job, at=shape), ("topk", "batchtopk"))
    yield steps(large, "zipf", COMPILED)
    yield encodes(large, "zipf")
    for shape in (large, small):
        for name in OPS if shape == large else TWINS:
            bodies = {"triton": frozenset(), "cuda": frozenset({TWINS[name]})} if name in TWINS else {}
            both = tuple(Contender(body, with_bodies(op(name), ops)) for body, ops in bodies.items())
            mine_too = (Contender(OURS, op(name)),) if shape == large else ()
            yield Job(name, CASES[name].mode, shape, "uniform", mine_too + both)
    if earned:
        faster = Contender(
            f"{OURS}_faster_bodies", with_bodies(step("exact"), earned), f"cuda: {', '.join(sorted(earned))}"
        )
        yield Job("step", "train", large, "uniform", (BARE, Contender(OURS, step("exact")), faster))
    for shape in (large, small):
        ways = tuple(Contender(how, screen(how), optional=True) for how in ("fused", "persistent", "library"))
        yield Job("screen", "forward", shape, "uniform", (BARE, *ways))
    yield steps(small, "zipf", COMPILED)
    for shape in (large, small):
        yield from map(partial(kinds.job, at=shape), ("gated", "matryoshka", "jumprelu", "relu"))
    slow = (Contender("tf32_product", product(torch.float32, True)), Contender("fp32_product", product(torch.float32)))
    yield Job("ceilings", "floor", large, "uniform", slow)
    yield Job("step", "train", large, "uniform", (AUTOTUNED,), memory=True, needs=60.0)
