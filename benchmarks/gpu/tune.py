"""Other tile sizes, warps and stages for what ships: `python -m benchmarks.gpu.tune --out DIR --known DIR --seconds N`.

One key at a time, each value checked against the shipped configuration's results and timed in turns with the best so far.
tuning.json is what SAE_FAST_TUNING reads, and holds only what was faster by 3 % or more.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import jsonfile
from benchmarks.cases import CASES
from benchmarks.data import World
from benchmarks.gate import reason
from benchmarks.gpu import environment, sources
from benchmarks.gpu.measure import Clock, Running, times
from benchmarks.gpu.record import BEGUN, DONE, TUNING, Record
from benchmarks.registry import OURS

GAIN = 0.97  # a time below this part of the other's is faster
TOLERANCE = 1e-5  # of an output's norm: another order of sums, not another result
ROUNDS = 7
CASE_OF = dict.fromkeys(("screen", "screen_wide", "compact", "round"), "encode") | {"largest": "kind_topk"}
NARROW = ("screen",)  # of rows up to 1024: tuned at the small shape


@contextmanager
def configured(op: str, values: dict[str, int]) -> Iterator[None]:
    """The op with these values instead of the shipped ones."""
    from sae_fast.kernels import _config

    shipped = _config.SHIPPED[_config.generation()]
    before = shipped[op]
    shipped[op] = {**before, **values}
    try:
        yield
    finally:
        shipped[op] = before


def differs(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> str | None:
    for name, truth in want.items():
        if got[name].shape != truth.shape:
            return f"{name}: got shape {tuple(got[name].shape)}, want {tuple(truth.shape)}"
        error, scale = float((got[name].double() - truth.double()).norm()), float(truth.double().norm())
        if not error <= TOLERANCE * scale:
            return f"{name}: is {error:.3g} from the shipped configuration's, want at most {TOLERANCE * scale:.3g}"
    return None


def tune_op(
    op: str, shipped: dict[str, int], outcome: Callable[[], dict[str, Any]], running: Callable[[], Running], clock: Clock,
    deadline: float, log: Callable[[str], None] = print,
) -> dict[str, int]:  # fmt: skip
    """The values that are faster than the shipped ones, by key."""
    from sae_fast.kernels._config import TRIED

    want, best = outcome(), {}

    def under(values: dict[str, int]) -> Running:
        it = running()

        def call(x: Any) -> Any:
            with configured(op, values):
                return it.run(x)

        return Running(call, it.inputs)

    for key, now in shipped.items():
        for value in TRIED.get(key, ()):
            if value == best.get(key, now):
                continue
            if time.monotonic() > deadline:
                return best
            trial = {**best, key: value}
            try:
                with configured(op, trial):
                    wrong = differs(outcome(), want)
                if wrong:
                    log(f"{op} {trial}: {wrong}")
                    continue
                found = times({"best": under(best), "trial": under(trial)}, clock, ROUNDS, deadline)
            except Exception as error:  # too much shared memory, for one
                log(f"{op} {trial}: {reason(error)}")
                continue
            a, b = median(found["best"]), median(found["trial"])
            log(f"{op} {trial}: {b:.4g} ms, best so far {a:.4g} ms")
            if b <= GAIN * a:
                best = trial
    return best


def tune(
    world: Callable[[str], World], ops: dict[str, dict[str, int]], folder: Path, clock: Clock, seconds: float,
    note: Callable[[str, str], None] = lambda op, state: None,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """tuning.json of the folder, rewritten after each op: what is faster, nothing where nothing is.  ``note`` is told what
    became of each op."""
    deadline, out = time.monotonic() + seconds, folder / TUNING
    found: dict[str, dict[str, int]] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for op, shipped in ops.items():
        if time.monotonic() > deadline:
            break
        note(op, BEGUN)
        case, here = CASES[CASE_OF.get(op, op)], world(op)

        def running(case: Any = case, here: World = here) -> Running:
            return Running(case.providers[OURS].start(here.new_sae()), case.inputs(here))

        def outcome(case: Any = case, here: World = here) -> dict[str, torch.Tensor]:
            sae = here.new_sae()
            run = case.providers[OURS].start(sae)
            return {k: v.detach() for k, v in case.outcome(sae, [run(case.inputs(here)[0])]).items()}

        try:
            with torch.device(here.sae.W_enc.device):
                found[op] = tune_op(op, shipped, outcome, running, clock, deadline)
            state = DONE if time.monotonic() <= deadline else "cut"
        except Exception as error:
            state = reason(error)
        jsonfile.write(out, found)
        note(op, state)
    return found


FIRST = ("screen_wide", "weight_step", "decode_loss", "sampled_dots")  # where the time goes


def pieces() -> dict[str, str]:
    """The sources of each op that has something to tune, those of the small world last."""
    from sae_fast.kernels import _config

    shipped = _config.SHIPPED[_config.generation()]
    order = (*FIRST, *(op for op in shipped if op not in (*FIRST, *NARROW)), *NARROW)
    return dict.fromkeys(order, sources.digest(sources.of("kernels/*.py"), environment.versions()))


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.gpu.world import LARGE, SMALL, world
    from sae_fast.kernels import _config

    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--known", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args(arguments)
    os.environ.pop("SAE_FAST_TUNING", None)  # over which nothing else could be tried
    record, of = Record(given.out, given.known), pieces()
    shipped = _config.SHIPPED[_config.generation()]
    ops = {op: dict(shipped[op]) for op in record.left("tune", of)}
    here = lambda op: world(SMALL if op in NARROW else LARGE, "uniform")  # noqa: E731
    tune(here, ops, given.out, Clock("cuda"), given.seconds, lambda op, state: record.note("tune", op, of[op], state))


if __name__ == "__main__":
    main()
