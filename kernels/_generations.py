"""The GPU generations that the kernels know.  A new one is an entry here, its configuration in _config.py, and its lines in
manifest.json.  setup.py reads this file too: it imports nothing of torch's."""

from typing import NamedTuple


class Generation(NamedTuple):
    name: str
    shared: int  # bytes of shared memory that a program can have
    target: str  # nvcc's, for the manifest
    reserved: int  # bytes of shared memory that its binaries count though they are the system's
    code: tuple[str, ...]  # what setup.py has nvcc make: -gencode
    # The ops whose CUDA kernels are the default: those that were measured to be 1.15 × as fast as their Triton twins at
    # every shape of the benchmark.
    faster: frozenset[str]


# By compute capability (major · 10 + minor).
GENERATIONS = {
    # PTX for Ada, which is Ampere's kin.
    80: Generation("Ampere", 163 * 1024, "sm_80", 0, ("arch=compute_80,code=[sm_80,compute_80]",), frozenset()),
    # PTX for what comes after Hopper.  On an H100 transpose (1.23 ×) and weight_step (1.17 ×) were faster at the large
    # shape, and the small one has not been measured.
    90: Generation(
        "Hopper", 227 * 1024, "sm_90a", 1024,
        ("arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"), frozenset(),
    ),
}  # fmt: skip


def nearest(capability: int) -> int:
    """The generation whose kernels a GPU of this capability takes: the last that is not newer, else the first."""
    return max((known for known in GENERATIONS if known <= capability), default=min(GENERATIONS))
