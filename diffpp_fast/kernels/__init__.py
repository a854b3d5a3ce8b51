"""The kernels, by backend. Each backend is a subpackage with one module per operator; `dispatch` chooses among them."""

from diffpp_fast.kernels import dispatch

for _op in dispatch.OPS:
    dispatch.register(_op, "reference", f"diffpp_fast.kernels.reference.{_op}")
