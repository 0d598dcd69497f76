"""Two ranks of torch.distributed, a process each: whoever waits for them waits as long as either gets on."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
import torch
from helpers import PATIENCE

with_ranks = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")


def of_two_ranks(work: Callable[[int, TextIO], object], folder: Path, patience: int = PATIENCE) -> list:
    """What ``work(rank, log)`` gave in each; fails, saying where each stands, if neither's log grew in so many seconds."""
    logs, results = ([folder / f"rank{rank}.{kind}" for rank in range(2)] for kind in ("log", "pt"))
    ranks = torch.multiprocessing.spawn(_rank, (work, folder), nprocs=2, join=False)
    written, idle = -1, 0
    try:
        while not ranks.join(timeout=1):
            before, written = written, sum(log.stat().st_size for log in logs if log.exists())
            idle = 0 if written > before else idle + 1
            if idle > patience:
                pytest.fail("the two ranks wait for each other\n" + _where(ranks.processes, logs))
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(result) for result in results]


def _rank(rank: int, work: Callable, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with (folder / f"rank{rank}.log").open("w", buffering=1, encoding="utf-8") as log:
        faulthandler.register(signal.SIGUSR1, log)
        print("starts", file=log)
        rendezvous = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
        torch.save(work(rank, log), folder / f"rank{rank}.pt")
        torch.distributed.destroy_process_group()


def _where(processes: list, logs: list[Path]) -> str:
    """The logs, to which each rank that has begun one adds the lines at which its threads stand."""
    found = []
    for process, log in zip(processes, logs, strict=True):
        if log.exists() and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            process.join(timeout=2)
        found.append(f"{log.name}:\n{log.read_text('utf-8') if log.exists() else 'not begun'}")
    return "\n".join(found)
