"""The shipped configuration of every kernel, by GPU generation, and the one way to replace it.

A configuration is part of a result's definition: it fixes the order of sums.  So it never depends on timing; ``make gpu``
writes what it found to be faster into a file, and ``SAE_FAST_TUNING=file.json`` reads one.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache

import torch

from sae_fast.kernels import _launch
from sae_fast.kernels._generations import GENERATIONS, nearest

_target: int | None = None
_log = logging.getLogger("sae_fast")

# The values that tuning tries for a key, with which no result but the order of its sums may change.
TRIED = {
    "columns": (128, 256, 512, 1024),  # of a row, that a program holds at once
    "entries": (4, 8, 16, 32),  # gathered rows at once
    "run": (256, 512, 1024),  # entries of a feature that are summed in one go
    "finish": (32, 64, 128),  # entries whose slices are summed at once
    "counted": (1024, 2048, 4096),  # entries of a code whose digits a program counts
    "block": (128, 256, 512),  # entries of a row that are counted at once
    "words": (256, 512, 1024, 2048),  # of the screen's bits, at once
    "chunks": (16, 32, 64),  # of examples, that a scan takes at once
    "rows": (64, 128, 256),  # of the product's tile: examples, features, columns
    "features": (64, 128, 256),
    "depth": (32, 64),
    "warps": (1, 2, 4, 8),
    "stages": (2, 3, 4, 5),
    "group": (4, 8, 16),  # tiles of examples that share the weights in the L2 cache
    "persistent": (0, 1),  # a program takes tile after tile
    "library": (0, 1),  # the product by cuBLAS
}
_TILE = {"rows": 128, "features": 128, "depth": 64, "warps": 8, "stages": 3, "group": 8, "persistent": 0, "library": 0}
_BASE = {
    "round": {"warps": 4},
    "compact": {"words": 1024, "warps": 4},
    "largest": {"counted": 2048, "block": 256, "warps": 8},
    "decode": {"entries": 8, "columns": 256},
    "decode_loss": {"entries": 8, "columns": 128, "finish": 64},
    "sampled_dots": {"entries": 8, "columns": 256, "finish": 64},
    "transpose": {"entries": 256, "features": 32, "chunks": 32, "warps": 4},
    "outer": {"entries": 8, "columns": 512, "run": 512},
    "weight_step": {"entries": 4, "columns": 512},
    # The product: of rows of up to 1024, whose tiles are short and end often, and of wider rows.
    "screen": _TILE,
    "screen_wide": _TILE,
}
SHIPPED: dict[int, dict[str, dict[str, int]]] = {
    80: _BASE,  # in 4 warps Triton 3.9 puts 32 bytes of the screen on the stack
    # Narrow: 128 registers, so that a multiprocessor has two tiles, one of which multiplies while the other ends.
    90: {**_BASE, "screen_wide": {**_TILE, "features": 256, "persistent": 1}},
}


def config(op: str) -> dict[str, int]:
    """The configuration of an op on the current device."""
    own = _file(os.environ.get("SAE_FAST_TUNING")).get(op, {})
    return {**SHIPPED[generation()][op], **own}


def generation() -> int:
    """The one of GENERATIONS whose kernels the current device takes."""
    if _target is not None:
        return _target
    if _launch.INTERPRETED or not torch.cuda.is_available():
        return min(GENERATIONS)
    major, minor = torch.cuda.get_device_capability()
    return _of(10 * major + minor)


@cache
def _of(capability: int) -> int:
    """The nearest generation; where it is another than the GPU's own, the log says so, once."""
    known = nearest(capability)
    if known != capability:
        name = GENERATIONS[known].name
        _log.info(
            "GPU of compute capability %.1f: not a generation of its own here, takes %s's kernels", capability / 10, name
        )
    return known


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
        known = _BASE.get(op)
        if known is None or not isinstance(values, dict) or not set(values) <= set(known):
            raise ValueError(f"SAE_FAST_TUNING: got {op}: {values} in {path!r}, want {known or sorted(_BASE)}")
        for key, value in values.items():
            # Tiles past a mask's words or a 16-bit copy's columns would touch memory that is not theirs.
            limit = {"depth": 64, "features": 256}.get(key, 65536)
            power = isinstance(value, int) and (value & (value - 1) == 0 or key in ("stages", "group"))
            if not power or not (0 if key in ("persistent", "library") else 1) <= value <= limit:
                want = f"a power of two up to {limit}"
                raise ValueError(f"SAE_FAST_TUNING: got {op}.{key} = {value!r} in {path!r}, want {want}")
    return found
