"""Triton kernels, one module per operator; imported only when one is launched or compiled.

Each module has, from top to bottom, its kernels, the function that launches them, with the
arguments and results of the PyTorch version of the operator, and ``launches()``: every form in
which they can be launched, which ``python -m alphaspin_kernels.gate`` compiles for GPUs that are
not there.
"""
