"""The Triton kernels of rms_norm_rope, in the interpreter where there is no GPU."""

from typing import Any

import pytest
import torch
from test_ops_rms_norm_rope import arguments, with_gradients
from torch import Tensor

from diffpp_fast import ops, use_backend
from diffpp_fast.ops.triton import rms_norm_rope as kernels

#: The interpreter truncates casts to bfloat16 instead of rounding them.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def assert_agrees(tensors: tuple[Tensor, ...], **options: Any) -> None:
    """Values and gradients are those of the definition in float64."""
    actual = with_gradients(ops.rms_norm_rope, tensors, **options)
    with use_backend("reference"):
        wide = tuple(value.detach().double().requires_grad_(value.requires_grad) for value in tensors)
        oracles = with_gradients(ops.rms_norm_rope, wide, **options)
    for value, oracle in zip(actual, oracles, strict=True):
        tolerance = max(TOLERANCE[value.dtype], TOLERANCE[actual[0].dtype])
        scale = float(oracle.abs().max()) if oracle.numel() else 1.0
        torch.testing.assert_close(value.double(), oracle, rtol=tolerance, atol=tolerance * scale)


def on(device: torch.device, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.detach().to(device).requires_grad_(value.requires_grad) for value in tensors)


@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
@pytest.mark.parametrize("sequence_dim", [1, 2])
# Heads of one tile and of two, rows that fill their block and that don't.
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 1, 2), (1, 9, 20, 64), (0, 2, 2, 4)])
def test_values_and_gradients(
    shape: tuple[int, ...], sequence_dim: int, interleaved: bool, triton_backend: torch.device
) -> None:
    tensors = on(triton_backend, arguments(*shape, dtype=torch.float32, sequence_dim=sequence_dim))
    options: dict[str, Any] = {"sequence_dim": sequence_dim, "interleaved": interleaved, "eps": 1e-2}
    for some in (tensors, tensors[:3]):
        assert_agrees(some, **options)


def test_16_bits(triton_backend: torch.device) -> None:
    assert_agrees(on(triton_backend, arguments(2, 5, 3, 34, dtype=torch.float16)))


def test_several_tokens_of_a_program(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    assert_agrees(on(triton_backend, arguments(2, 7, 3, 6, dtype=torch.float32)))


def test_parts_of_one_projection_are_read_where_they_lie(triton_backend: torch.device) -> None:
    x, *others = on(triton_backend, arguments(2, 5, 9, 6, dtype=torch.float32))
    part = x.detach()[:, :, 3:6].requires_grad_()
    assert_agrees((part, *others))
    permuted = x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    assert_agrees((permuted, *others))
    y, grad, _ = with_gradients(ops.rms_norm_rope, (permuted, *others))
    assert y.stride() == grad.stride() == permuted.stride()
    strided = x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
    assert_agrees((strided, *others))
    windows = torch.randn(2 * 5 * 9 * 2, device=x.device).as_strided((2, 5, 3, 6), (18, 6, 1, 1)).requires_grad_()
    assert_agrees((windows, *others))


@pytest.mark.parametrize("which", [0, 3], ids=["x", "weight"])
def test_each_gradient_only_where_needed(which: int, triton_backend: torch.device) -> None:
    tensors = on(triton_backend, arguments(2, 5, 3, 6, dtype=torch.float32))
    whole = with_gradients(ops.rms_norm_rope, tensors)
    some = tuple(value if place == which else value.detach() for place, value in enumerate(tensors))
    alone = with_gradients(ops.rms_norm_rope, some)
    # The weight's gradient alone is summed in other tiles.
    torch.testing.assert_close(alone[1], whole[1 if which == 0 else 2], rtol=1e-6 * which, atol=1e-6 * which)


def test_rows_too_wide_are_refused_by_name(triton_backend: torch.device) -> None:
    x, angle = torch.zeros(1, 1, 1, 1026, device=triton_backend), torch.zeros(1, 1026, device=triton_backend)
    with pytest.raises(ValueError, match=r"rms_norm_rope: backend 'triton' serves rows of up to 1024 elements"):
        ops.rms_norm_rope(x, angle, angle)
