"""Group norm and SiLU, against torch's own in float64."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from diffpp_fast import ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64


def formula(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def arguments(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    x, (weight, bias) = torch.randn(shape, dtype=dtype), torch.randn(2, shape[1], dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    spatial=st.lists(st.integers(1, 4), max_size=3),
    affine=st.sampled_from(["both", "weight", "bias", "none"]),
    activation=st.sampled_from(["silu", "identity"]),
)
def test_formula_and_gradients(
    batch: int, groups: int, per_group: int, spatial: list[int], affine: str, activation: str
) -> None:
    x, weight, bias = arguments(batch, groups * per_group, *spatial)
    parameters = (weight if affine in ("both", "weight") else None, bias if affine in ("both", "bias") else None)
    inputs = [tensor for tensor in (x, *parameters) if tensor is not None]
    y = ops.group_norm_silu(x, groups, *parameters, eps=1e-2, activation=activation)
    # F.group_norm refuses a group of one element, so the oracle is the definition.
    grouped = x.reshape(batch, groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    oracle = ((grouped - mean) / (variance + 1e-2).sqrt()).reshape(x.shape)
    channels = (-1, *[1] * len(spatial))
    oracle = oracle if parameters[0] is None else oracle * weight.reshape(channels)
    oracle = oracle if parameters[1] is None else oracle + bias.reshape(channels)
    oracle = oracle * torch.sigmoid(oracle) if activation == "silu" else oracle
    torch.testing.assert_close(y, oracle)
    outer = torch.randn_like(y)
    for grad, expected in zip(
        torch.autograd.grad(y, inputs, outer), torch.autograd.grad(oracle, inputs, outer), strict=True
    ):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_gradcheck(activation: str) -> None:
    torch.autograd.gradcheck(
        lambda *x: ops.group_norm_silu(x[0], 2, x[1], x[2], 1e-3, activation), arguments(2, 4, 3, 2)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_low_precision(dtype: torch.dtype, activation: str, assert_twice_unfused: Callable[..., None]) -> None:
    args = arguments(2, 8, 16, 16, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in args]
    outer = torch.randn_like(args[0])
    results = []
    for function, (x, weight, bias) in ((ops.group_norm_silu, args), (formula, args), (formula, wide)):
        y = function(x, 4, weight, bias, 1e-5, activation)
        results.append((y.detach(), *torch.autograd.grad(y, (x, weight, bias), outer.to(y.dtype))))
    for actual, unfused, oracle in zip(*results, strict=True):
        assert_twice_unfused(actual, unfused, oracle)


def test_large_mean_keeps_the_variance() -> None:
    x = 1e4 + torch.randn(2, 4, 64, dtype=torch.float32)
    expected = formula(x.double(), 2, None, None, 1e-5, "silu")
    torch.testing.assert_close(ops.group_norm_silu(x, 2).double(), expected, rtol=1e-2, atol=1e-2)


def test_float32_parameters_with_low_precision_input() -> None:
    x, weight, bias = arguments(2, 4, 8, dtype=torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    y = ops.group_norm_silu(low, 2, weight, bias)
    assert torch.equal(y, ops.group_norm_silu(low.float(), 2, weight, bias).bfloat16())
    grads = torch.autograd.grad(y.sum(), (low, weight, bias))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x, weight, bias = arguments(2, 4, 5, 7, dtype=torch.float32)
    y = ops.group_norm_silu(x, 2, weight, bias)
    outer = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight, bias), outer)
    laid_out = layout(x.detach()).requires_grad_()
    actual_y = ops.group_norm_silu(laid_out, 2, weight, bias)
    torch.testing.assert_close(actual_y, y)
    actual = torch.autograd.grad(actual_y, (laid_out, weight, bias), layout(outer))
    for grad, correct in zip(actual, expected, strict=True):
        torch.testing.assert_close(grad, correct)
    assert actual_y.stride() == actual[0].stride() == torch.empty_like(laid_out).stride()


def test_a_residual_is_added_first() -> None:
    x, weight, bias = arguments(2, 4, 3, 5)
    residual = torch.randn(2, 4, 3, 5, dtype=F64, requires_grad=True)
    inputs = x, residual, weight, bias
    y, total = ops.group_norm_silu(x, 2, weight, bias, residual=residual)
    oracle = formula(x + residual, 2, weight, bias, 1e-5, "silu"), x + residual
    torch.testing.assert_close((y, total), oracle)
    outer = torch.randn(2, *x.shape, dtype=F64).unbind()
    expected = torch.autograd.grad(oracle, inputs, outer)
    torch.testing.assert_close(torch.autograd.grad((y, total), inputs, outer, retain_graph=True), expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, outer[0], retain_graph=True),
        torch.autograd.grad(formula(x + residual, 2, weight, bias, 1e-5, "silu"), inputs, outer[0]),
    )
    assert torch.equal(torch.autograd.grad(total, residual, outer[1])[0], outer[1])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradcheck_of_what_is_added(groups: int, memory_format: torch.memory_format) -> None:
    x, weight, bias = arguments(2, 4, 3, 2)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    residual = torch.randn(2, 4, 3, 2, dtype=F64, requires_grad=True)
    offset = torch.randn(8, 2, dtype=F64)[::2].T.requires_grad_()
    torch.autograd.gradcheck(
        lambda x, r, w, b: ops.group_norm_silu(x, groups, w, b, 1e-3, residual=r), (x, residual, weight, bias)
    )
    torch.autograd.gradcheck(
        lambda x, o, w, b: ops.group_norm_silu(x, groups, w, b, 1e-3, offset=o), (x, offset, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", ["residual", "offset"])
def test_low_precision_of_what_is_added(
    dtype: torch.dtype, added: str, assert_twice_unfused: Callable[..., None]
) -> None:
    x, weight, bias = arguments(2, 8, 16, 16, dtype=dtype)
    more = torch.randn((2, 8, 16, 16) if added == "residual" else (2, 8)).to(dtype).requires_grad_()

    def unfused(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + (more if more.dim() == 4 else more[:, :, None, None])
        return formula(total, 4, weight, bias, 1e-5, "silu"), total

    def fused(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        if added == "residual":
            return ops.group_norm_silu(x, 4, weight, bias, residual=more)
        return (ops.group_norm_silu(x, 4, weight, bias, offset=more),)

    narrow = x, more, weight, bias
    outer = torch.randn_like(x)
    results = []
    for function, inputs in (
        (fused, narrow),
        (unfused, narrow),
        (unfused, [i.detach().double().requires_grad_() for i in narrow]),
    ):
        outputs = function(*inputs)[: 2 if added == "residual" else 1]
        grads = torch.autograd.grad(outputs, inputs, [outer.to(outputs[0].dtype)] * len(outputs))
        results.append((*(output.detach() for output in outputs), *grads))
    for actual, without, oracle in zip(*results, strict=True):
        assert_twice_unfused(actual, without, oracle)
    if added == "residual":
        assert torch.equal(results[0][1], (x + more).detach())


def test_layouts_of_what_is_added(layout: Callable[[Tensor], Tensor]) -> None:
    x, residual, outer = torch.randn(3, 2, 4, 5, 7).unbind()
    offset = torch.randn(2, 4)
    results = []
    for arranged in (lambda x: x, layout):
        leaves = [value.detach().requires_grad_() for value in (arranged(x), arranged(residual), offset)]
        y, total = ops.group_norm_silu(leaves[0], 2, residual=leaves[1])
        grads = torch.autograd.grad((y, total), leaves[:2], (arranged(outer), arranged(x)))
        moved = ops.group_norm_silu(leaves[0], 2, offset=leaves[2])
        more = torch.autograd.grad(moved, (leaves[0], leaves[2]), arranged(outer))
        results.append((y, total, *grads, moved, *more))
        assert y.stride() == total.stride() == moved.stride() == torch.empty_like(leaves[0]).stride()
    torch.testing.assert_close(*results)


def test_only_what_needs_gradient_gets_it() -> None:
    x, weight, bias = arguments(2, 4, 3)
    ops.group_norm_silu(x.detach(), 2, weight, bias.detach()).sum().backward()
    assert weight.grad is not None
    assert x.grad is None and bias.grad is None


def test_empty_batch() -> None:
    x, weight, bias = arguments(0, 4, 3)
    y = ops.group_norm_silu(x, 2, weight, bias)
    assert y.shape == (0, 4, 3)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4, dtype=F64))
    residual, offset = (torch.zeros(shape, dtype=F64, requires_grad=True) for shape in ((0, 4, 3), (0, 4)))
    y, total = ops.group_norm_silu(x, 2, weight, bias, residual=residual)
    assert y.shape == total.shape == (0, 4, 3)
    (y + total).sum().backward()
    ops.group_norm_silu(x, 2, weight, bias, offset=offset).sum().backward()
    assert residual.grad.shape == (0, 4, 3) and offset.grad.shape == (0, 4)


def test_errors_name_what_is_wrong() -> None:
    x, weight, _ = arguments(2, 4, 3)
    with pytest.raises(ValueError, match="group_norm_silu: num_groups must divide the 4 channels, got 3"):
        ops.group_norm_silu(x, 3)
    with pytest.raises(ValueError, match="num_groups must divide"):
        ops.group_norm_silu(x, 0)
    with pytest.raises(ValueError, match="group_norm_silu: unknown activation 'relu'; known: silu, identity"):
        ops.group_norm_silu(x, 2, activation="relu")
    with pytest.raises(ValueError, match=r"group_norm_silu: bias must have shape \[C\] = \[4\], got \[3\]"):
        ops.group_norm_silu(x, 2, weight, weight[:3])
    with pytest.raises(ValueError, match=r"x must have shape \[B, C, ...\]"):
        ops.group_norm_silu(x[0, 0], 2)
    with pytest.raises(ValueError, match="a sample of x has no elements"):
        ops.group_norm_silu(x[..., :0], 2)
    with pytest.raises(
        ValueError, match=r"group_norm_silu: residual must be as x, \[2, 4, 3\] torch.float64, got \[2, 4\]"
    ):
        ops.group_norm_silu(x, 2, residual=x[..., 0])
    with pytest.raises(ValueError, match="group_norm_silu: residual must be as x"):
        ops.group_norm_silu(x, 2, residual=x.float())
    with pytest.raises(ValueError, match=r"group_norm_silu: offset must have shape \[B, C\] = \[2, 4\], got \[4\]"):
        ops.group_norm_silu(x, 2, offset=weight)
    with pytest.raises(ValueError, match="group_norm_silu: takes a residual or an offset, not both"):
        ops.group_norm_silu(x, 2, residual=x, offset=x[..., 0])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="eps must not be negative"):
        ops.group_norm_silu(x, 2, eps=-1.0)
