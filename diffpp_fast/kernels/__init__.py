"""The kernels, by backend. Each backend is a subpackage with one module per operator; `dispatch` chooses among them."""

from diffpp_fast.kernels import dispatch, native, triton

for _op in dispatch.OPS:
    dispatch.register(_op, "reference", f"diffpp_fast.kernels.reference.{_op}")
    dispatch.register(
        _op, "cpu", f"diffpp_fast.kernels.native.{_op}", unavailable=native.unavailable, refuses=native.only_cpu
    )
    dispatch.register(
        _op, "triton", f"diffpp_fast.kernels.triton.{_op}", unavailable=triton.unavailable, refuses=triton.refuses
    )

for _op in (
    "philox",
    "add_noise",
    "denoising_loss",
    "score_gap",
    "reward_pixels",
    "group_norm_silu",
):
    dispatch.register(
        _op, "cuda", f"diffpp_fast.kernels.native.{_op}", unavailable=native.gpu_unavailable, refuses=native.only_gpu
    )
