"""The tables of measured figures in README.md and docs/: made from the committed results, never by hand.

    <!-- table: step -->
    <!-- /table -->

What stands between the two comments is what the function `step` returns, which a file of this folder registers:
Markdown, its links written from the root of the repository ("](/docs/...)").  `python -m benchmarks.tables` writes them
all, and a test compares.  A new table is a function, and the comments where it is to stand.
"""

from benchmarks.tables import analysis, cpu, demo, gpu, kernels, peers
from benchmarks.tables._region import REGION, TABLES, documents, fill, filled

__all__ = ["REGION", "TABLES", "analysis", "cpu", "demo", "documents", "fill", "filled", "gpu", "kernels", "peers"]
