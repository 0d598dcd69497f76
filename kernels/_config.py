"""The shipped configuration of every kernel, by GPU generation, and the one way to replace it.

A configuration is part of a result's definition: it fixes the order of sums.  So it never depends on timing; ``make gpu``
writes what it found to be faster into a file, and ``SAE_FAST_TUNING=file.json`` reads one.
"""

from __future__ import annotations

import json
import os
from functools import cache

import torch

from sae_fast.kernels import _launch

_target: int | None = None

# columns: of a row that a program holds at once; entries: gathered rows at once; run: entries of a feature that are
# summed in one go; finish: entries whose slices are summed at once.
_EVERY = {
    "round": {"warps": 4},
    "compact": {"words": 1024, "warps": 4},
    "decode": {"entries": 8, "columns": 256},
    "decode_loss": {"entries": 8, "columns": 128, "finish": 64},
    "sampled_dots": {"entries": 8, "columns": 256, "finish": 64},
    "transpose": {"entries": 256, "features": 32, "chunks": 32, "warps": 4},
    "outer": {"entries": 8, "columns": 512, "run": 512},
    "weight_step": {"entries": 4, "columns": 512},
}
# The product has a configuration for rows of up to 1024, whose tiles are short and end often, and one for wider rows.
_TILE = {"rows": 128, "features": 128, "depth": 64, "warps": 8, "stages": 3, "group": 8, "persistent": 0, "library": 0}
SHIPPED: dict[int, dict[str, dict[str, int]]] = {
    80: {**_EVERY, "screen": {**_TILE, "warps": 4}, "screen_wide": {**_TILE, "warps": 4}},
    # Narrow: 128 registers, so that a multiprocessor has two tiles, one of which multiplies while the other ends.
    90: {**_EVERY, "screen": _TILE, "screen_wide": {**_TILE, "features": 256, "persistent": 1}},
}


def config(op: str) -> dict[str, int]:
    """The configuration of an op on the current device."""
    own = _file(os.environ.get("SAE_FAST_TUNING")).get(op, {})
    return {**SHIPPED[generation()][op], **own}


def generation() -> int:
    """80 (Ampere, Ada) or 90 (Hopper and later): which column of SHIPPED holds."""
    if _target is not None:
        return _target
    if _launch.INTERPRETED or not torch.cuda.is_available():
        return 80
    return 90 if torch.cuda.get_device_capability()[0] >= 9 else 80


@cache
def _file(path: str | None) -> dict[str, dict[str, int]]:
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"SAE_FAST_TUNING: cannot read {path!r}: {error}") from error
    for op, values in found.items():
        known = SHIPPED[80].get(op)
        if known is None or not isinstance(values, dict) or not set(values) <= set(known):
            raise ValueError(f"SAE_FAST_TUNING: got {op}: {values} in {path!r}, want {known or sorted(SHIPPED[80])}")
        for key, value in values.items():
            # Tiles past a mask's words or a 16-bit copy's columns would touch memory that is not theirs.
            limit = {"depth": 64, "features": 256}.get(key, 65536)
            power = isinstance(value, int) and (value & (value - 1) == 0 or key in ("stages", "group"))
            if not power or not (0 if key in ("persistent", "library") else 1) <= value <= limit:
                want = f"a power of two up to {limit}"
                raise ValueError(f"SAE_FAST_TUNING: got {op}.{key} = {value!r} in {path!r}, want {want}")
    return found
