"""The backends that ``use_backend`` forces, innermost last; read by the ops and by the kernels' launchers.

Process-wide on purpose: autograd runs backward passes in threads of its own, which see no context variable.
"""

forced: list[str] = []
