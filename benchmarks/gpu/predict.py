"""The figures behind the goals as the cost model has them, before a GPU has run what is in the tree.

A step's kernels take what they took when they were measured, less what the cuts that are made since should save; kinds that
were never measured are built from the same kernels.  The host is taken to keep ahead.  Of rivals a measured figure is taken
where there is one; a dense step of another kind is its products and passes, as `dense` has them, which is held against the
measured Gated one.  sparsify's step is not predicted: atomic additions are not in the model.
"""

from __future__ import annotations

from benchmarks.data import Shape
from benchmarks.gpu import cuts, goals, model
from benchmarks.gpu.goals import OURS_BF16, PRECISIONS, PRODUCT
from benchmarks.gpu.model import BF16, Kernel, Machine, Phase, cost
from benchmarks.gpu.profile import Run, read
from benchmarks.gpu.sass import Compiled
from benchmarks.registry import OURS
from benchmarks.results import Row

AHEAD = 4  # batches that steps under way keep
BELOW = 1.2  # candidates a member, of a floor that is taken from the last batch and a little lower
ENCODES = ("_round", "_compact", "_scan", "_verify")  # the small kernels of the encoder, measured
PASSES = {"gated": 16, "topk": 26, "batchtopk": 26}  # bytes of memory an entry of [B, F], all of a dense step's passes
PRODUCTS = {"gated": 7, "topk": 5, "batchtopk": 5}  # of a dense step, each 2BdF
OF_WEIGHTS = 112  # bytes an element of one weight: casts, gradients, Adam, of both; projection and norm of one
Values = dict[tuple[str, str, str, str], float]


def figures(rows: list[Row], here: Machine | None = None) -> Values:
    """What `goals.reach` asks for, by case, provider, metric and shape: predicted of ours, and of rivals measured or, at
    last, by ``dense``.  In ms and MiB."""
    here = here or Machine()
    found = {key: value for key, value in goals.figures(rows).items() if key[0] == "step" and key[1] not in PRECISIONS}
    counts = model.counts_of(model.RUN)
    for run in read(model.RUN / "profile.txt"):
        at, provider = str(run.shape), OURS_BF16 if run.precision == BF16 else OURS
        found["step", provider, "time", at] = gated(run, counts, here)
        found["step", provider, "peak_memory", at] = peak(run.shape) / 2**20
        found["encode_sparse", provider, "time", at] = encode(run, counts, here)
        found["encode_sparse", PRODUCT, "time", at] = found["step", PRODUCT, "time", at]
        for kind in ("topk", "batchtopk"):
            found[f"kind_{kind}", provider, "time", at] = largest(run, counts, here)
            product = found["step", PRODUCT, "time", at]
            found[f"kind_{kind}", "compiled_bf16", "time", at] = dense(kind, run.shape, product, here)
    return found


def gated(run: Run, counts: dict[str, Compiled], here: Machine) -> float:
    """A step without momentum."""
    saved = cuts.saved(run, counts, here)
    return run.total - sum(saved[cut.name] for cut in cuts.CUTS if cut.made)


def encode(run: Run, counts: dict[str, Compiled], here: Machine) -> float:
    """The encoder: its kernels of a step."""
    saved = cuts.saved(run, counts, here)
    of = [cut for cut in cuts.CUTS if cut.made and cut.of_encode]
    names = ("_screen", "_screen_persistent", "_partial_dots", *ENCODES)
    return sum(run.kernels.get(name, 0.0) for name in names) - sum(saved[cut.name] for cut in of)


def largest(run: Run, counts: dict[str, Compiled], here: Machine) -> float:
    """A step of TopK or BatchTopK with momentum: the Gated one, but for more candidates, from which the largest are taken,
    and for weights of which every row is visited, 24 bytes an element."""
    at = run.shape
    touched = model.touched_at(at)
    dots = model.dots(at, run.precision, counts, touched, here)
    more = (BELOW - 1) * cost(dots, here).total
    entries = cost(model.stream("", 3 * 8 * BELOW * at.B * at.l0, here), here).total
    sliced = [model.weight_step(at, counts["step of slices"], touched, here, copied) for copied in (True, False)]
    before = sum(cost(kernel, here).total for kernel in [*sliced, normalise(at, touched, here)])
    after = sum(cost(kernel, here).total for kernel in [*map(_with_momentum(at), sliced), normalise(at, at.F, here)])
    return gated(run, counts, here) + more + entries + after - before


def normalise(at: Shape, rows: float, here: Machine) -> Kernel:
    return model.stream("_normalise", 8 * rows * at.d, here)


def _with_momentum(at: Shape):
    def changed(kernel: Kernel) -> Kernel:
        gather, update = kernel.phases
        copied = update.memory - 16 * model.touched_at(at) * at.d
        return kernel._replace(phases=[gather, Phase(24 * at.F * at.d + copied, 0, 0, update.instructions)])

    return changed


def dense(kind: str, at: Shape, product: float, here: Machine) -> float:
    """A compiled bf16 step: its products as cuBLAS takes them, then its passes over [B, F] and over the weights."""
    moved = PASSES[kind] * at.B * at.F + OF_WEIGHTS * at.F * at.d
    return PRODUCTS[kind] * product + 1e3 * moved / here.memory


def peak(at: Shape) -> float:
    """Bytes beside weights and optimizer: the 16-bit copy of W_enc; the screen's mask; x of the steps under way and of the
    report; x − b_dec with its copy; residuals of both decodings; a code with room for 128 candidates an example."""
    x, n, room = 4 * at.B * at.d, at.B * at.l0, 128 * at.B
    slices = -(-at.d // 128)
    return 2 * at.F * at.d + at.B * at.F / 8 + AHEAD * x + 1.5 * x + 2 * x + 8 * n * slices + 52 * room
