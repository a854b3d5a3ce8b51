"""Triton kernels: one module per operator, with functions of the arguments of its schema that launch them."""
