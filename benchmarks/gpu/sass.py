"""The machine code of a kernel, counted: instructions of each loop and outside them, without a GPU.

`python -m benchmarks.gpu.sass` prints the counts that model.py takes, of the kernels of this tree, as JSON: into
kernels.json here, for what is predicted; of kernels that were measured, beside their profile.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, dataclass

WANTED = {  # by the model's names: the kernel, and words of its variant's key
    "residuals": ("decode_loss._residuals", "V=2"),
    "partial_dots": ("sampled_dots._partial_dots", "sm_90 ENTRIES"),  # float32
    "partial_dots of 16 bits": ("sampled_dots._partial_dots", "W_ptr:*fp16"),
    "step of slices": ("weight_step._step", "m_ptr=None grad_ptr=None", "A2_ptr=None own_ptr=None", "shadow_ptr:*fp16"),
    "step of whole rows up to 1024": ("weight_step._step", "m_ptr=None grad_ptr=None", "UNIT=True", "COLUMNS=1024"),
    "step of whole rows up to 4096": ("weight_step._step", "m_ptr=None grad_ptr=None", "UNIT=True", "COLUMNS=4096"),
    "screen": ("screen._screen", "x_ptr:*fp16"),
    "screen of wide rows": ("screen._screen_persistent", "FEATURES=256"),
}


@dataclass(frozen=True)
class Compiled:
    """``key``: of the manifest; registers of a thread and bytes of shared memory; instructions of a warp in each innermost
    loop, in their order, outside these, and after the last tensor-core product (0 where there is none)."""

    key: str
    registers: int
    shared: int
    loops: tuple[int, ...]
    outside: int
    epilogue: int

    def constant(self, name: str) -> int:
        """A constexpr or option, such as COLUMNS or warps."""
        found = re.search(rf"\b{name}=(\d+)", self.key)
        if found is None:
            raise ValueError(f"name: got {name!r}, want a constant of {self.key!r}")
        return int(found[1])


def count(assembly: str) -> tuple[tuple[int, ...], int, int]:
    """(loops, outside, epilogue) of nvdisasm's text of one kernel.  A loop is what a branch backwards spans."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*)", line):
            code.append(instruction[1])
    backwards = [
        (labels[target[1]], at)
        for at, text in enumerate(code)
        if text.startswith("BRA") and (target := re.search(r"(\.L_x_\d+)", text)) and labels[target[1]] < at
    ]
    inner = [(a, b) for a, b in backwards if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in backwards)]
    loops = tuple(b - a + 1 for a, b in sorted(inner) if b - a > 4)  # shorter ones wait for something
    products = [at for at, text in enumerate(code) if text.startswith(("HGMMA", "HMMA"))]
    ends = [at for at, text in enumerate(code) if text.startswith("EXIT")]
    outer = [b for a, b in backwards if products and a <= products[-1] < b and (a, b) not in inner]
    epilogue = min(outer or ends[-1:], default=0) - products[-1] if products else 0
    return loops, sum(not text.startswith("NOP") for text in code) - sum(loops), epilogue


def compiled(wanted: dict[str, tuple[str, ...]] = WANTED, arch: int = 90) -> dict[str, Compiled]:
    """The kernels ``wanted``, compiled here: the first variant that has all words of each."""
    import triton

    from sae_fast.kernels import aot, aot_calls

    variants = aot.variants({arch: list(aot_calls.calls(arch))})
    found = {}
    for name, (kernel, *words) in wanted.items():
        it = next(v for (own, key), v in variants.items() if own == kernel and all(word in key for word in words))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(triton.compile(it.source, target=it.target, options=it.options).asm["cubin"])
            file.flush()
            counts = count(aot.tool("nvdisasm", "-c", file.name))
        needs = aot.needs(it)
        found[name] = Compiled(it.key, needs["registers"], needs["shared"], *counts)
    return found


if __name__ == "__main__":
    print(json.dumps({name: asdict(it) for name, it in compiled().items()}, indent=1))
