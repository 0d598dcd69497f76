"""Where and with what a figure was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from datetime import date
from pathlib import Path

import torch

import sae_fast


def device() -> str:
    """The processor's name and the number of threads."""
    return f"{_processor()}, {torch.get_num_threads()} threads"


def slug() -> str:
    """The device as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-")


def versions() -> str:
    return f"torch {torch.__version__}, python {platform.python_version()}, sae_fast {sae_fast.__version__}"


def commit() -> str:
    """The commit, with + where tracked files differ from it; empty outside a git checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (
            "+" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


class Others:
    """What other processes take of the machine's cores from now on."""

    def __init__(self) -> None:
        self.start = self._ticks()

    def share(self) -> float:
        """0 to 1; NaN where /proc/stat is missing.  Above a few hundredths the figures are too high."""
        all_, idle, own = (now - then for now, then in zip(self._ticks(), self.start, strict=True))
        return max(0.0, 1 - (idle + own) / all_) if all_ else float("nan")

    @staticmethod
    def _ticks() -> tuple[float, float, float]:
        """Seconds of all cores together: passed, idle, and of this process."""
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return 0.0, 0.0, 0.0
        rate = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / rate, (ticks[3] + ticks[4]) / rate, time.process_time()


def about() -> dict[str, str]:
    """What a file of figures says of where they come from."""
    return {"device": device(), "versions": versions(), "commit": commit(), "date": date.today().isoformat()}


def cache_bytes() -> int:
    """The size of the largest cache (64 MiB where it is unknown), at most 1 GiB."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()  # such as 1024K
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return min(max(sizes) or 2**26, 2**30)


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    ).stdout.strip()
