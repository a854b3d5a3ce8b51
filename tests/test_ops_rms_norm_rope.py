"""RMS norm with rotary embedding, against the formula in float64. `test_fuse.py` compares it with diffusers' own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpp_fast import ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64
interleavings = pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])


def formula(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, **options: Any
) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], weight, eps).to(cos.dtype)
    cos, sin = (each.unsqueeze(1 if options.get("sequence_dim", 1) == 1 else 0) for each in (cos, sin))
    rotated = torch.stack((-y[..., 1::2], y[..., ::2]), dim=-1).flatten(3)
    if not options.get("interleaved", True):
        rotated = torch.cat((-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]), dim=-1)
    return (y * cos + rotated * sin).to(x.dtype)


def arguments(*shape: int, dtype: torch.dtype = F64, sequence_dim: int = 1) -> tuple[Tensor, ...]:
    angle = torch.randn(shape[sequence_dim], shape[3], dtype=torch.promote_types(dtype, torch.float32))
    weight = torch.randn(shape[3], dtype=dtype).requires_grad_()
    return torch.randn(shape, dtype=dtype).requires_grad_(), angle.cos(), angle.sin(), weight


def with_gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    y = function(*tensors, **options)
    outer = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), dtype=F64, device=y.device)
    return [y.detach(), *torch.autograd.grad(y, [each for each in tensors if each.requires_grad], outer.to(y.dtype))]


@interleavings
@pytest.mark.parametrize("sequence_dim", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 1, 2), (2, 5, 3, 34)])
def test_formula_and_gradients(shape: tuple[int, ...], sequence_dim: int, interleaved: bool) -> None:
    options: dict[str, Any] = {"interleaved": interleaved, "sequence_dim": sequence_dim, "eps": 1e-2}
    tensors = arguments(*shape, sequence_dim=sequence_dim)
    for some in (tensors, tensors[:3]):
        actual = with_gradients(ops.rms_norm_rope, some, **options)
        for value, oracle in zip(actual, with_gradients(formula, some, **options), strict=True):
            torch.testing.assert_close(value, oracle)


@interleavings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, interleaved: bool, assert_twice_unfused: Callable[..., None]) -> None:
    low = arguments(2, 16, 4, 32, dtype=dtype)
    wide = tuple(value.detach().double().requires_grad_(value.requires_grad) for value in low)
    results = [
        with_gradients(function, tensors, interleaved=interleaved)
        for function, tensors in ((ops.rms_norm_rope, low), (formula, low), (formula, wide))
    ]
    for actual, unfused, oracle in zip(*results, strict=True):
        assert_twice_unfused(actual, unfused, oracle)


def test_positions_of_each_sample() -> None:
    x, *_, weight = arguments(2, 5, 3, 6)
    one, two = torch.randn(2, 5, 6, dtype=F64), torch.randn(2, 5, 6, dtype=F64)
    y = ops.rms_norm_rope(x, one, two, weight)
    for b in range(2):
        torch.testing.assert_close(y[b], ops.rms_norm_rope(x[b : b + 1], one[b], two[b], weight)[0])
    shared = ops.rms_norm_rope(x, one[0], two, weight)
    torch.testing.assert_close(shared, ops.rms_norm_rope(x, one[:1].expand_as(two), two, weight))


def test_cos_and_sin_get_gradients_too() -> None:
    x, cos, sin, weight = arguments(2, 3, 2, 4)
    leaves = (x, cos.requires_grad_(), sin.requires_grad_(), weight)
    for value, oracle in zip(with_gradients(ops.rms_norm_rope, leaves), with_gradients(formula, leaves), strict=True):
        torch.testing.assert_close(value, oracle)


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x, *others = arguments(2, 4, 5, 6)
    expected = with_gradients(ops.rms_norm_rope, (x, *others))
    laid_out = layout(x.detach()).requires_grad_()
    for value, correct in zip(with_gradients(ops.rms_norm_rope, (laid_out, *others)), expected, strict=True):
        torch.testing.assert_close(value, correct)
    y, grad, _ = with_gradients(ops.rms_norm_rope, (laid_out, *others))
    assert y.stride() == grad.stride() == torch.empty_like(laid_out).stride()


def test_empty_batch() -> None:
    x, *others = arguments(0, 4, 3, 2)
    y = ops.rms_norm_rope(x, *others)
    assert y.shape == (0, 4, 3, 2)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert others[2].grad is not None and not others[2].grad.any()


def test_errors_name_what_is_wrong() -> None:
    x, cos, sin, weight = arguments(2, 4, 3, 6)
    for wrong, message in (
        ((x[..., :5], cos, sin), r"x must have shape \[B, T, H, D\] with D even, got \[2, 4, 3, 5\]"),
        ((x[0], cos, sin), "x must have shape"),
        ((x, cos[:3], sin), r"cos must have shape \[T, D\] = \[4, 6\] or \[B, T, D\], got \[3, 6\]"),
        ((x, cos, sin[:, :3]), "sin must have shape"),
        ((x, cos, sin, weight[:3]), r"weight must have shape \[D\] = \[6\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=f"rms_norm_rope: {message}"):
            ops.rms_norm_rope(*wrong)
    with pytest.raises(ValueError, match="sequence_dim must be one of 1, 2, got int 3"):
        ops.rms_norm_rope(x, cos, sin, sequence_dim=3)
    with pytest.raises(ValueError, match="cos must have shape"):
        ops.rms_norm_rope(x, cos, sin, sequence_dim=2)
