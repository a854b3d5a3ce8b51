"""The definitions in plain torch of the operators that are not yet made of one file."""

from diffpp_fast.plain import compute_dtype, per_sample, stored_like, sum_per_sample

__all__ = ["compute_dtype", "per_sample", "stored_like", "sum_per_sample"]
