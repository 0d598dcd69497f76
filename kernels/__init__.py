"""GPU kernels in Triton, installed as ``sae_fast.kernels``.  None yet: CPU tensors take the C++ engine."""
