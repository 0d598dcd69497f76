"""Ops over faulty builds of the kernels: ``python -m cuda_shim.scenarios GOOD.so SCENARIO=BAD.so …``.

Each in a process of its own, forked from this one, which has imported torch.  A JSON line for each: "" for the bits of the
good one under every schedule, else what was seen; of the good one, whether its schedules differ.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from helpers import same_bits, tensors_in

import cuda_shim
from sae_fast import use_backend
from sae_fast.kernels import native

torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)


def decode_loss(rows: int = 5, V: int = 2):
    from problems.cuda_decode_loss import problem, run

    code, arguments = problem(V, shape=(rows, 132, 200))
    return run(code, arguments, u=code.u, scale=arguments[3] if V == 2 else None, step=True)


def one_row():
    """What is written past its end is past the end of a buffer."""
    return decode_loss(1, 1)


def verify():
    from problems.cuda_verify import problem, rows_like, verified

    return [verified(problem(d, "gated", torch.float32), rows_like(5, 150)) for d in (63, 256)]


def code_by_feature():
    from problems.cuda_decode_loss import problem

    from sae_fast import ops

    return ops.transpose(problem(1, shape=(260, 1, 50))[0])


def gradients():
    """outer and weight_step, with features of several runs of five entries."""
    from problems.bodies import Body
    from problems.weight_step import make_step, stepped

    from sae_fast import ops
    from sae_fast.kernels import _config

    for generation in _config.SHIPPED.values():
        generation["outer"] = {**generation["outer"], "run": 5}
    step, body = make_step(40, 260, 9, unit=True, long=True), Body("cuda")
    gradient = step.gradient()
    return [ops.outer(gradient.csc, gradient.values, gradient.A), *stepped(body, step, True).tensors()]


SCENARIOS: dict[str, Callable] = {f.__name__: f for f in (decode_loss, one_row, verify, code_by_feature, gradients)}


def results(scenario: Callable, path: Path) -> list[list[torch.Tensor]]:
    """Of every schedule."""
    module = native.module = cuda_shim.load_file(path)
    found = []
    with use_backend("cuda"):
        for schedule in range(module.schedules):
            module.set_schedule(schedule)
            found.append([t.clone() for t in tensors_in(scenario())])
    return found


def seen(scenario: Callable, path: Path, good: list[torch.Tensor]) -> str:
    try:
        found = results(scenario, path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if any(not same_bits(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True)):
        return "schedules differ"
    if any(
        int(a.isnan().sum()) != int(b.isnan().sum()) for a, b in zip(found[0], good, strict=True) if a.is_floating_point()
    ):
        return "NaN"
    return "" if all(same_bits(a, b) for a, b in zip(found[0], good, strict=True)) else "wrong numbers"


def apart(work: Callable[[], str]) -> str:
    """What ``work`` says, in a forked process: which may crash."""
    with tempfile.TemporaryDirectory() as folder:
        said, errors = Path(folder) / "said", Path(folder) / "errors"
        child = os.fork()
        if child == 0:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
            said.write_text(work())
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return said.read_text()
        lines = [
            line for line in errors.read_text(errors="replace").splitlines() if "ERROR:" in line or "runtime error" in line
        ]
        return lines[0] if lines else f"exit {status}"


def main() -> None:
    good, *bad = sys.argv[1:]
    saved = Path(tempfile.mkdtemp())
    torch.set_num_threads(1)  # a fork keeps one thread only

    def of_good(name: str) -> str:
        found = results(SCENARIOS[name], Path(good))
        torch.save(found[0], saved / name)
        return (
            ""
            if all(same_bits(a, b) for other in found for a, b in zip(other, found[0], strict=True))
            else "schedules differ"
        )

    for name in dict.fromkeys(one.partition("=")[0] for one in bad):
        print(json.dumps([name, apart(lambda name=name: of_good(name))]), flush=True)
    for one in bad:
        name, _, path = one.partition("=")
        wanted = torch.load(saved / name)
        print(json.dumps([one, apart(lambda: seen(SCENARIOS[name], Path(path), wanted))]), flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
