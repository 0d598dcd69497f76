"""The ops: each declared once with torch.library, one file an op.  See each file for its contract and its bodies."""

from sae_fast.code import Shadow
from sae_fast.ops.decode import decode
from sae_fast.ops.decode_loss import DecodeLoss, decode_loss
from sae_fast.ops.dense_step import dense_gradients, dense_step_pays
from sae_fast.ops.dispatch import use_backend
from sae_fast.ops.encode import encode
from sae_fast.ops.encode.cpu import PRECISIONS
from sae_fast.ops.encode.shadow import KeptShadow, make_shadow, refresh_shadow, stale_columns, stale_rows
from sae_fast.ops.grad_sqnorm import grad_sqnorm
from sae_fast.ops.outer import outer, touched
from sae_fast.ops.sampled_dots import sampled_dots
from sae_fast.ops.transpose import transpose
from sae_fast.ops.weight_step import dense_gradient, project_rows, row_step, weight_step

__all__ = [
    "PRECISIONS",
    "DecodeLoss",
    "KeptShadow",
    "Shadow",
    "decode",
    "decode_loss",
    "dense_gradient",
    "dense_gradients",
    "dense_step_pays",
    "encode",
    "grad_sqnorm",
    "make_shadow",
    "outer",
    "project_rows",
    "refresh_shadow",
    "row_step",
    "sampled_dots",
    "stale_columns",
    "stale_rows",
    "touched",
    "transpose",
    "use_backend",
    "weight_step",
]
