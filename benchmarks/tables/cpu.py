"""`make bench` on a CPU: the step, what it is next to, and the candidates of the screen."""

from __future__ import annotations

from benchmarks.data import FULL, SMALL
from benchmarks.registry import OURS
from benchmarks.tables._figures import Figures
from benchmarks.tables._markdown import grid, number, shape, source, times
from benchmarks.tables._region import RESULTS, table

CSV = RESULTS / "intel-r-xeon-r-processor-2-threads.csv"
PRODUCT = "bare_product"
STEPS = {
    PRODUCT: "the encoder's product alone, `x @ W_enc.T`, fp32",
    "bf16_product": "the same in bfloat16, into existing memory",
    OURS: "**sae_fast, the whole step**",
    "eager_compiled": "`torch.compile` of the eager step",
    "eager": "eager PyTorch (one encoder product, fused Adam)",
    "dictionary_learning": "dictionary_learning {}, `GatedSAETrainer.update`",
}
RIVALS = (  # work, rival, case, provider, shape
    ("a step in SAELens' dialect", "SAELens {}", "step_saelens", "sae_lens", FULL),
    ("`encode_sparse`", "the bare product alone, fp32", "encode_sparse", PRODUCT, FULL),
    ("a step with half of all gates open, as at the peers' start", "eager PyTorch", "step", "eager", FULL.dense),
    ("a step at *small*", "eager PyTorch", "step", "eager", SMALL),
    ("a step at *small*", "dictionary_learning {}", "step", "dictionary_learning", SMALL),
    ("a step in SAELens' dialect at *small*", "SAELens {}", "step_saelens", "sae_lens", SMALL),
)
KINDS = {
    "step": "Gated",
    "kind_relu": "ReLU",
    "kind_jumprelu": "JumpReLU",
    "kind_topk": "TopK",
    "kind_topk_dead": "TopK, a tenth dead, with AuxK",
    "kind_batchtopk": "BatchTopK",
    "kind_matryoshka": "Matryoshka BatchTopK",
}
KINDS_SAID = (
    "A step of each kind, with all that dictionary_learning's trainer of that kind has around it: its Adam, its clip, its\n"
    "threshold; and how many times faster it is than that trainer's `update`:"
)
BATCHES = {
    "superposition": "the benchmark's data: few directions out of many",
    "noise": "white noise",
    "offset": "the benchmark's data, two dimensions offset by 300 σ",
}


@table
def step() -> str:
    """A step at the headline's shape, by provider."""
    figures = Figures(CSV)
    rows = []
    for provider, what in STEPS.items():
        row = figures.row("step", provider)
        cells = [what.format(_version(row.versions)), f"{number(row.p50)} ms", number(row.p50 / figures("step", PRODUCT))]
        cells.append("" if provider == OURS else times(row.p50 / figures("step", OURS)))
        known = figures.has("step", provider, "peak_memory")
        cells.append(f"{number(figures('step', provider, 'peak_memory'))} MiB" if known else "")
        rows.append([cells[0], *(f"**{cell}**" if cell and provider == OURS else cell for cell in cells[1:])])
    headings = ["", "time", "÷ bare product", "÷ sae_fast's", "peak memory above parameters and optimizer state"]
    return grid(headings, rows) + source(CSV, figures.about())


@table
def rivals() -> str:
    """Other work, other dialects, other shapes: a rival and ours."""
    figures = Figures(CSV)
    rows = []
    for work, rival, case, provider, at in RIVALS:
        theirs, ours = figures.row(case, provider, at=at), figures(case, OURS, at=at)
        cells = [f"{number(theirs.p50)} ms", f"{number(ours)} ms", times(theirs.p50 / ours)]
        rows.append([work, rival.format(_version(theirs.versions)), *cells])
    about = f"*small* is {shape(SMALL)}; {figures.about()}"
    return grid(["", "rival", "it takes", "sae_fast takes", ""], rows) + source(CSV, about)


@table
def kinds() -> str | None:
    """A whole step of each kind, beside the bare product and dictionary_learning's trainer of that kind."""
    figures, rows, peer = Figures(CSV), [], "dictionary_learning"
    measured = [case for case in KINDS if all(figures.has(case, peer, at=at) for at in (FULL, SMALL))]
    if measured in ([], ["step"]):
        return None
    for case in measured:
        cells = [KINDS[case], f"{number(figures(case, OURS))} ms"]
        for at in (FULL, SMALL):
            ours, product, theirs = (figures(case, provider, at=at) for provider in (OURS, PRODUCT, peer))
            cells += [number(ours / product), times(theirs / ours)]
            if at == FULL:
                cells.append(number(figures(case, OURS, "peak_memory") / figures(case, peer, "peak_memory"), 2))
        rows.append(cells)
    headings = ["", "a whole step", "÷ bare product", "faster than dictionary_learning's trainer", "memory ÷ its"]
    headings += ["÷ bare product at *small*", "faster at *small*"]
    about = f"{shape(FULL)}, *small* {shape(SMALL)}; {figures.about()}"
    return f"{KINDS_SAID}\n\n" + grid(headings, rows) + source(CSV, about)


@table
def candidates() -> str:
    """How much more than the support passes the screen."""
    figures = Figures(CSV)
    rows = [[what, number(figures(f"screen_{name}", OURS, "candidates_per_entry"))] for name, what in BATCHES.items()]
    return grid(["batch", "candidates for each true entry"], rows) + source(CSV, f"{shape(FULL)}; {figures.about()}")


def _version(versions: str) -> str:
    """Of the package whose figure it is, which is named last."""
    return versions.split(", ")[-1].split()[-1]
