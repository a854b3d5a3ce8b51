"""The kernels, by backend. Each backend is a subpackage with one module per operator; `dispatch` chooses among them."""

from diffpp_fast.kernels import dispatch, native

for _op in dispatch.OPS:
    dispatch.register(_op, "reference", f"diffpp_fast.kernels.reference.{_op}")
    dispatch.register(
        _op, "cpu", f"diffpp_fast.kernels.native.{_op}", unavailable=native.unavailable, refuses=native.only_cpu
    )

for _op in ("philox", "add_noise"):
    dispatch.register(
        _op, "cuda", f"diffpp_fast.kernels.native.{_op}", unavailable=native.gpu_unavailable, refuses=native.only_gpu
    )
