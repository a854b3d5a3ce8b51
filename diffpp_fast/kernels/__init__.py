"""The compiled library, and the former name of `diffpp_fast.backends`."""
