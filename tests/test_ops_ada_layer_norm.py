"""Adaptive layer norm, against torch's own in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpp_fast import ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64


def formula(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    per_sample = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
    normalized = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normalized * (1 + scale.reshape(per_sample)) + shift.reshape(per_sample)


def arguments(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    x, (scale, shift) = torch.randn(shape, dtype=dtype), torch.randn(2, shape[0], 1, shape[-1], dtype=dtype)
    return x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_()


def with_gradients(function: Callable[..., Tensor], args: tuple[Tensor, ...], outer: Tensor) -> tuple[Tensor, ...]:
    y = function(*args)
    return (y.detach(), *torch.autograd.grad(y, args, outer.to(y.dtype)))


# One row, rows for one sum and for several, rows of one piece and of several.
@pytest.mark.parametrize("shape", [(2, 4), (1, 3, 7), (3, 70, 6), (2, 3, 5, 6), (2, 33, 2048 + 5)])
def test_formula_and_gradients(shape: tuple[int, ...]) -> None:
    x, scale, shift = arguments(*shape)
    if x.dim() != 3:
        scale, shift = (values.detach().flatten(1).requires_grad_() for values in (scale, shift))
    outer = torch.randn(shape, dtype=F64)
    actual = with_gradients(lambda *args: ops.ada_layer_norm(*args, eps=1e-2), (x, scale, shift), outer)
    expected = with_gradients(lambda *args: formula(*args, eps=1e-2), (x, scale, shift), outer)
    for value, oracle in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, oracle)


def test_gradcheck() -> None:
    torch.autograd.gradcheck(ops.ada_layer_norm, arguments(2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    args = arguments(2, 48, 96, dtype=dtype)
    wide = tuple(value.detach().double().requires_grad_() for value in args)
    outer = torch.randn(2, 48, 96).to(dtype)
    results = [
        with_gradients(function, values, outer)
        for function, values in ((ops.ada_layer_norm, args), (formula, args), (formula, wide))
    ]
    for actual, unfused, oracle in zip(*results, strict=True):
        assert_twice_unfused(actual, unfused, oracle)


def test_large_mean_keeps_the_variance() -> None:
    x, scale, shift = arguments(2, 3, 256, dtype=torch.float32)
    far = (x.detach() + 1e4).requires_grad_()
    y = ops.ada_layer_norm(far, scale, shift)
    torch.testing.assert_close(y.double(), formula(far.double(), scale.double(), shift.double()), rtol=1e-2, atol=1e-2)


def test_modulation_of_another_dtype() -> None:
    x, scale, shift = arguments(2, 3, 8, dtype=torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    y = ops.ada_layer_norm(low, scale, shift)
    assert torch.equal(y, ops.ada_layer_norm(low.float(), scale, shift).bfloat16())
    grads = torch.autograd.grad(y.sum(), (low, scale, shift))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]
    mixed = ops.ada_layer_norm(x, scale.double(), shift.half())
    torch.testing.assert_close(mixed, ops.ada_layer_norm(x, scale, shift.half()))
    wide = ops.ada_layer_norm(x.double(), scale, shift)
    torch.testing.assert_close(wide, formula(x.double(), scale.double(), shift.double()))


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x, scale, shift = arguments(2, 4, 5, 6, dtype=torch.float32)
    scale, shift = scale.flatten(1).detach().requires_grad_(), shift.flatten(1).detach().requires_grad_()
    outer = torch.randn(2, 4, 5, 6)
    expected = with_gradients(ops.ada_layer_norm, (x, scale, shift), outer)
    laid_out = layout(x.detach()).requires_grad_()
    actual = with_gradients(ops.ada_layer_norm, (laid_out, scale, shift), layout(outer))
    for value, correct in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, correct)
    assert actual[0].stride() == actual[1].stride() == torch.empty_like(laid_out).stride()


def test_modulation_is_read_where_it_lies() -> None:
    """Parts of one tensor, as networks have them, and a row for all samples."""
    x, *_ = arguments(3, 4, 6)
    table = torch.randn(3, 6, 6, dtype=F64, requires_grad=True)
    _, scale, shift, *_ = table.chunk(6, dim=1)
    y = ops.ada_layer_norm(x, scale, shift)
    torch.testing.assert_close(y, formula(x, scale, shift))
    (grad,) = torch.autograd.grad(y.square().sum(), table)
    (expected,) = torch.autograd.grad(formula(x, scale, shift).square().sum(), table)
    torch.testing.assert_close(grad, expected)
    row, transposed = torch.randn(1, 6, dtype=F64).expand(3, 6), torch.randn(6, 3, dtype=F64).mT
    torch.testing.assert_close(ops.ada_layer_norm(x, row, transposed), formula(x, row, transposed))


@pytest.mark.parametrize("which", range(3))
def test_only_what_needs_gradient_gets_it(which: int) -> None:
    leaves = arguments(2, 40, 5)
    args = [leaf if place == which else leaf.detach() for place, leaf in enumerate(leaves)]
    outer = torch.randn(2, 40, 5, dtype=F64)
    (alone,) = torch.autograd.grad(ops.ada_layer_norm(*args), leaves[which], outer)
    assert torch.equal(alone, torch.autograd.grad(ops.ada_layer_norm(*leaves), leaves, outer)[which])


def test_empty_batch() -> None:
    x, scale, shift = arguments(0, 4, 3)
    y = ops.ada_layer_norm(x, scale, shift)
    assert y.shape == (0, 4, 3)
    y.sum().backward()
    assert scale.grad is not None and scale.grad.shape == (0, 1, 3)


def test_errors_name_what_is_wrong() -> None:
    x, scale, shift = arguments(2, 4, 3)
    with pytest.raises(ValueError, match=r"scale must have shape \[B, D\] = \[2, 3\] or \[B, 1, D\], got \[2, 1, 2\]"):
        ops.ada_layer_norm(x, scale[..., :2], shift)
    with pytest.raises(ValueError, match=r"ada_layer_norm: shift must have shape"):
        ops.ada_layer_norm(x, scale, x)
    with pytest.raises(ValueError, match=r"x must have shape \[B, ..., D\], got \[3\]"):
        ops.ada_layer_norm(x[0, 0], scale, shift)
    with pytest.raises(ValueError, match="a sample of x has no elements"):
        ops.ada_layer_norm(x[..., :0], scale[..., :0], shift[..., :0])
    with pytest.raises(ValueError, match="eps must not be negative"):
        ops.ada_layer_norm(x, scale, shift, eps=-1.0)
