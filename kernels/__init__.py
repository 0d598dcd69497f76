"""The GPU kernels in Triton, installed as ``sae_fast.kernels``: one file an op, and in each file first the kernels, then
the function that launches them.  Nothing here is imported before the first tensor on a GPU.

A launcher takes tensors that its caller has checked (contiguous, on one device, in float32, bfloat16 or float16) and the
memory to write; it reads no value back from the device, so that all of them can stand in a CUDA graph.  Accumulation is in
float32, in an order that the arguments decide: every sum has one owner, and results repeat bit for bit.

  row b of a code      entries begin[b] .. end[b] of indices, u and values.  A packed code has begin = indptr[:-1] and
                       end = indptr[1:]; one from :mod:`compact` may have gaps, in which nothing is ever read.
  feature i            entries colptr[i] .. colptr[i + 1] of rows and perm; always packed
"""

if __name__ == "sae_fast.kernels":  # in the repository's folder, transformers takes this for the Hub's package kernels
    from sae_fast.extras import require

    require("triton", extra="gpu")
