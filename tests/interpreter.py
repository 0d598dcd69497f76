"""Triton's interpreter in less time: what it puts into triton.language for a kernel stays there for what that calls."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace


def quicken() -> None:
    """From now on, in this process; leaves an interpreter of other insides as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, dtype_of = interpreter._patch_lang, cache(interpreter._get_np_dtype)
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def once(fn):
        """Nothing to undo, where it is there already."""
        return patch(everything) if tl.core.is_builtin(tl.load) else interpreter._LangPatchScope()

    def np_dtype(of):
        of = of.scalar
        return dtype_of(tl.uint64 if of.is_ptr() else of)

    interpreter._patch_lang, interpreter._get_np_dtype = once, np_dtype
