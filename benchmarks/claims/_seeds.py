"""What each seed of a claim measured, kept on disk one file a seed, so that an interrupted run goes on after the last whole
one; and seeds side by side, a process each."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks import jsonfile

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ENGINE = ("sae_fast", "csrc")
SHOWN = ("_claim", "_page", "_seeds")  # what is made of the seeds, and how they are kept: no part of what they measured
folder = Path("out/claims-seeds")  # the runner's --work


def kept(name: str, of: Callable[..., Any], seed: int, quick: bool, sources: Iterable[Path]) -> dict[str, Any]:
    """of(seed, quick), from the folder ``name`` if it is there, else computed and written there whole.

    The file's name carries a hash of the programs that made it, ``sources`` and the engine, so that what an older program
    measured is not taken for what this one would.
    """
    size = "quick" if quick else "full"
    path = folder / name / f"{size}-{_digest(frozenset(sources))}-seed-{seed}.json"
    if not path.is_file():
        jsonfile.write(path, of(seed, quick))
    return json.loads(path.read_text(encoding="utf-8"))  # as a later run will see it


@cache  # as the programs were when they were first asked for, whatever is written to them while they run
def _digest(sources: frozenset[Path]) -> str:
    engine = [path for part in ENGINE for path in (ROOT / part).rglob("*") if path.suffix in (".py", ".cpp", ".hpp")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted({*sources, *engine}))).hexdigest()[:12]


def programs(path: Path) -> set[Path]:
    """A module of this folder, and the shared ones that it names, and those that these do."""
    found, new = set(), {path}
    while new:
        found |= new
        text = "".join(path.read_text(encoding="utf-8") for path in new)
        new = {p for p in HERE.glob("_[a-z]*.py") if re.search(rf"\b{p.stem}\b", text) and p.stem not in SHOWN} - found
    return found


def measure(name: str, claim: Any, quick: bool, seeds: int | None = None, jobs: int = 1) -> list[dict[str, Any]]:
    """What every seed of a claim shows, ``jobs`` of them at a time, each with its share of the processor's cores.

    ``claim``: its module, or for one job anything with its functions.
    """
    wanted = range(seeds or (claim.QUICK_SEEDS if quick else claim.SEEDS))
    if hasattr(claim, "prepare"):
        claim.prepare(quick)
    with tqdm(total=len(wanted), desc=name, unit="seed", dynamic_ncols=True, leave=False) as bar:
        jobs = min(jobs, len(wanted))
        if jobs == 1:
            found = {}
            for seed in wanted:
                found[seed] = _of_seed(name, claim, seed, quick)
                bar.update()
            return list(found.values())
        threads = max(1, (os.cpu_count() or 1) // jobs)
        spawn = multiprocessing.get_context("spawn")
        before = os.environ.get("TQDM_DISABLE")
        os.environ["TQDM_DISABLE"] = "1"  # in the processes, whose bars would write over each other; read on their import
        pool = ProcessPoolExecutor(jobs, spawn)
        try:
            asked = {pool.submit(_in_a_process, name, seed, quick, folder, threads): seed for seed in wanted}
            found = {}
            for done in as_completed(asked):
                found[asked[done]] = done.result()
                bar.update()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            os.environ.pop("TQDM_DISABLE") if before is None else os.environ.update(TQDM_DISABLE=before)
        return [found[seed] for seed in wanted]


def _of_seed(name: str, claim: Any, seed: int, quick: bool) -> dict[str, Any]:
    return kept(name, claim.measure, seed, quick, programs(HERE / f"{name}.py"))


def _in_a_process(name: str, seed: int, quick: bool, work: Path, threads: int) -> dict[str, Any]:
    global folder
    folder = work
    torch.set_num_threads(threads)
    return _of_seed(name, importlib.import_module(f"benchmarks.claims.{name}"), seed, quick)
