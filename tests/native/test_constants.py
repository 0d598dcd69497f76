"""Numbers that Python and the engines share: the engines say theirs."""

import pytest
import torch
import ways

from sae_fast import activations
from sae_fast.ops.dispatch import _C
from sae_fast.ops.encode import screen


@pytest.mark.skipif(_C is None, reason="the extension sae_fast._C is not built")
def test_of_the_cpu_engine():
    assert _C.screen_pieces + _C.screen_margins == screen.MARGINS
    assert len(screen.TERMS) == len(ways.TERMS) == _C.screen_terms
    numbers = {name: a.native for name, a in activations.BY_NAME.items()}
    assert {name: int(kind) for name, kind in _C.Activation.__members__.items()} == numbers


def test_of_the_cuda_kernels():
    pytest.importorskip("triton", reason="Triton is not installed")
    import cuda_shim

    from sae_fast.kernels import flag, round, weight_step

    module = cuda_shim.load()
    assert module.step_columns == round.SLICE == weight_step.SLICE
    assert set(module.Storage.__members__) == {
        str(t).removeprefix("torch.") for t in (torch.float32, torch.float16, torch.bfloat16)
    }
    bits = [flag.OVERFLOW, flag.NOT_FINITE, flag.STALE, flag.NOT_FINITE_LOSS]
    assert sorted(bits) == [1, 2, 4, 8]
    assert [flag.overflow.value, flag.not_finite.value, flag.stale.value] == bits[:3]
