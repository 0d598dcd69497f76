"""What the Gated SAE paper and its public critique say, as programs that anyone can run: one file a claim.

`python -m benchmarks.claims` (or `make claims`) runs them all: of each a result (JSON), a picture, and rows of a table that
say what was claimed, what came out, and how far it holds.

The paper: Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders" (arXiv 2404.16014).
The critique: S. Marks' comments on its announcement (lesswrong.com/posts/vdoiWXeouGsZEYgrg), and what followed from them.

A claim is a module with

    TITLE, SETTING                   a line; on what data and at what size, and what the verdicts ask for
    SEEDS, QUICK_SEEDS               how many seeds the full and the quick run take
    prepare(quick)                   optional: what all seeds need, before the first
    measure(seed, quick) -> dict     what one seed shows: plain JSON; kept on disk, so an interrupted run goes on after it
    conclude(results) -> [Row]       the rows of the table, from the results of all seeds
    draw(results, figure)            the picture, on a matplotlib figure

Modules whose names begin with an underscore are what several claims share.
"""

NAMES = ("loss_terms", "bias", "ablations", "pareto", "kinds", "attribution", "shift", "cognition", "perturbation")
