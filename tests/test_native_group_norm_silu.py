"""The compiled group_norm_silu: registration, threads, layouts, sizes. The formula: test_ops_group_norm_silu.py."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from native import assert_compiles_once, assert_same_bits_for_any_threads, check_registration
from torch import Tensor

from diffpp_fast import ops, use_backend

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = torch.randn(2, shape[1]).to(dtype)
    return torch.randn(shape).to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def with_gradients(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, activation: str = "silu", eps: float = 1e-5
) -> tuple[Tensor, ...]:
    """y, then the gradients of x, weight and bias for an upstream gradient that depends on the shape alone."""
    y = ops.group_norm_silu(x, groups, weight, bias, eps, activation)
    outer = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(y)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    return (y.detach(), *torch.autograd.grad(y, leaves, outer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype: torch.dtype, cpu_backend: Any) -> None:
    grad, weight, bias = (tensor.detach() for tensor in inputs(2, 6, 3, 5, dtype=dtype))
    # One order that kernels know, one that they copy.
    x = grad.contiguous(memory_format=torch.channels_last) if dtype.itemsize > 2 else grad.mT.contiguous().mT
    forward, backward = cpu_backend.group_norm_silu.default, cpu_backend.group_norm_silu_backward.default
    offset = torch.randn(2, 6).to(dtype)
    check_registration(forward, x, 2, weight, bias, 1e-5, True, offset)
    _, mean, rstd = forward(x, 2, weight, bias, 1e-5, True, offset)
    check_registration(backward, grad, grad, x, mean, rstd, weight, bias, offset, True, True, True, True)
    check_registration(cpu_backend.group_norm_silu_of_sum.default, x, grad, 2, weight, bias, 1e-5, True)


def test_registration_of_what_is_optional(cpu_backend: Any) -> None:
    x, weight, bias = (tensor.detach() for tensor in inputs(2, 6, 3, dtype=torch.bfloat16))
    forward, backward = cpu_backend.group_norm_silu.default, cpu_backend.group_norm_silu_backward.default
    check_registration(forward, x, 2, None, bias.double(), 1e-5, False, None)
    _, mean, rstd = forward(x, 2, None, bias, 1e-5, True, None)
    check_registration(backward, x, None, x, mean, rstd, weight.double(), None, None, False, True, True, False)
    check_registration(backward, x, None, x, mean, rstd, None, bias, None, True, False, False, True)
    check_registration(cpu_backend.group_norm_silu_of_sum.default, x, x, 2, None, bias.double(), 1e-5, False)


def with_what_is_added(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Results and gradients of the sum with a residual, then of offsets, which depend on the shape alone."""
    generator = torch.Generator().manual_seed(2)
    residual, outer = (torch.randn(x.shape, generator=generator).to(x).requires_grad_() for _ in range(2))
    offset = torch.randn(x.shape[:2], generator=generator, dtype=torch.float64).requires_grad_()
    outputs = ops.group_norm_silu(x, groups, weight, bias, residual=residual)
    grads = torch.autograd.grad(outputs, (x, residual, weight, bias), (outer, residual))
    y = ops.group_norm_silu(x, groups, weight, bias, offset=offset)
    return (*outputs, *grads, y, *torch.autograd.grad(y, (x, offset, weight, bias), outer))


@pytest.mark.parametrize("shape", [(1, 32, 61, 67), (3, 6, 95, 97), (1, 96, 41, 43)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_for_any_threads(shape: tuple[int, ...], channels_last: bool) -> None:
    x, weight, bias = inputs(*shape)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_same_bits_for_any_threads(lambda: with_gradients(x, 2, weight, bias))
    assert_same_bits_for_any_threads(lambda: with_what_is_added(x, 2, weight, bias))


def test_compiles_once() -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 2, weight, bias)

    assert_compiles_once(norm, *(inputs(2, 4, 8, 8) for _ in range(3)))


def test_compiles_once_with_what_is_added() -> None:
    def norm(x: Tensor, residual: Tensor, offset: Tensor) -> Tensor:
        y, total = ops.group_norm_silu(x, 2, residual=residual)
        return ops.group_norm_silu(y + total, 2, offset=offset)

    drawn = ((torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4)) for _ in range(3))
    assert_compiles_once(norm, *(tuple(value.requires_grad_() for value in values) for values in drawn))


@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 5),
    per_group=st.integers(1, 7),
    spatial=st.lists(st.integers(1, 37), max_size=2),
    video=st.booleans(),
    channels_last=st.booleans(),
    activation=st.sampled_from(["silu", "identity"]),
)
def test_any_size_agrees_with_the_reference(
    batch: int, groups: int, per_group: int, spatial: list[int], video: bool, channels_last: bool, activation: str
) -> None:
    spatial = [2, *spatial] if video and len(spatial) == 2 else spatial
    x, weight, bias = inputs(batch, groups * per_group, *spatial, dtype=torch.float64)
    if channels_last and x.dim() in CHANNELS_LAST:
        x = x.detach().contiguous(memory_format=CHANNELS_LAST[x.dim()]).requires_grad_()
    actual = with_gradients(x, groups, weight, bias, activation, 1e-2)
    with use_backend("reference"):
        expected = with_gradients(x, groups, weight, bias, activation, 1e-2)
    torch.testing.assert_close(actual, expected)
    if per_group * x.shape[2:].numel() > 2:  # of one or two values the gradient is rounding
        more = with_what_is_added(x, groups, weight, bias)
        with use_backend("reference"):
            torch.testing.assert_close(more, with_what_is_added(x, groups, weight, bias), rtol=1e-6, atol=1e-6)
    assert [tensor.stride() for tensor in actual] == [tensor.stride() for tensor in expected]


# More channels than a row, than fit in a chunk, and than channels_last keeps on the stack; many bands and runs.
@pytest.mark.parametrize("shape", [(1, 48, 67, 71), (2, 600, 9, 11), (1, 2560, 9, 9), (2, 4160, 3, 2), (2, 4160)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_channels_and_pixels(shape: tuple[int, ...], channels_last: bool) -> None:
    x, weight, bias = inputs(*shape, dtype=torch.float64)
    if channels_last and len(shape) == 4:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    actual = with_gradients(x, 8, weight, bias)
    more = with_what_is_added(x, 8, weight, bias)
    with use_backend("reference"):
        torch.testing.assert_close(actual, with_gradients(x, 8, weight, bias))
        torch.testing.assert_close(more, with_what_is_added(x, 8, weight, bias))


# What clusters of blocks keep on GPUs: eight or a single block, several groups in a pack, fewer pixels than blocks.
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 80, 24, 24), 8), ((2, 128, 3, 3), 32), ((1, 48, 9, 11), 16), ((1, 16, 50, 48), 2)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_whole_groups_against_float64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x, weight, bias = inputs(*shape, dtype=dtype)
    x = (x + 3).detach().contiguous(memory_format=memory_format).requires_grad_()
    actual = with_gradients(x, groups, weight, bias)
    again = with_gradients(x, groups, weight, bias)
    with use_backend("reference"):
        expected = with_gradients(x.double(), groups, weight.double(), bias.double())
    tolerance = 8 * torch.finfo(dtype).eps
    for value, same, correct in zip(actual, again, expected, strict=True):
        assert torch.equal(value, same)
        torch.testing.assert_close(value.double(), correct, rtol=tolerance, atol=tolerance * correct.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_hold_the_same_numbers(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x, weight, bias = inputs(2, 6, 19, 31, dtype=dtype)
    expected = with_gradients(x, 3, weight, bias)
    actual = with_gradients(layout(x.detach()).requires_grad_(), 3, weight, bias)
    # The orders of the sums differ, so an element may round to the neighbouring number of its dtype.
    tolerance = 16 * torch.finfo(dtype).eps
    for value, correct in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, correct, rtol=tolerance, atol=tolerance * correct.abs().max().item())


@pytest.mark.parametrize("channels_last", [False, True])
def test_mean_and_deviation_far_apart(channels_last: bool, cpu_backend: Any) -> None:
    x = 3e4 + torch.randn(1, 4, 61, 67)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    _, mean, rstd = cpu_backend.group_norm_silu.default(x, 2, None, None, 0.0, True, None)
    variance, expected = torch.var_mean(x.double().reshape(1, 2, -1), dim=2, correction=0)
    torch.testing.assert_close(mean, expected.float(), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(rstd, variance.rsqrt().float(), rtol=1e-6, atol=0.0)


def test_silu_at_every_magnitude() -> None:
    ends = [0.0, -0.0, 1e-40, 87.0, 88.0, 89.0, 1e4, 1e30, 3.4e38, float("inf"), float("nan")]
    y = torch.cat((torch.linspace(-90, 90, 10_001), torch.tensor(ends), -torch.tensor(ends)))
    # With weight 0 the output is silu(bias).
    actual = ops.group_norm_silu(torch.randn(1, len(y), 2), len(y), torch.zeros_like(y), y)[0, :, 0]
    torch.testing.assert_close(actual, F.silu(y.double()).float(), rtol=4e-7, atol=1e-36, equal_nan=True)
    bias = y[y.abs() < 90].requires_grad_()
    x = torch.randn(1, len(bias), 1)
    (grad,) = torch.autograd.grad(ops.group_norm_silu(x, len(bias), torch.zeros_like(bias), bias).sum(), bias)
    wide = bias.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.silu(wide).sum(), wide)
    torch.testing.assert_close(grad, expected.float(), rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_not_finite_stays_in_its_group(value: float, channels_last: bool) -> None:
    x, weight, bias = inputs(2, 4, 5, 7)
    with torch.no_grad():
        x[1, 2, 3, 4] = value
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    actual = with_gradients(x, 2, weight, bias)
    assert actual[0][1, 2:].isnan().all() and actual[0].isnan().sum() == 2 * 5 * 7
    with use_backend("reference"):
        torch.testing.assert_close(actual, with_gradients(x, 2, weight, bias), equal_nan=True, rtol=1e-4, atol=1e-5)


def test_inputs_are_not_written_and_the_upstream_gradient_may_be_expanded() -> None:
    x, weight, bias = inputs(2, 4, 5, 7)
    before = [tensor.detach().clone() for tensor in (x, weight, bias)]
    y = ops.group_norm_silu(x, 2, weight, bias)
    expanded = torch.autograd.grad(y, (x, weight, bias), torch.ones(1, 1, 1, 1).expand_as(y), retain_graph=True)
    for grad, same in zip(expanded, torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y)), strict=True):
        assert torch.equal(grad, same)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((x, weight, bias), before, strict=True))


def test_parameters_with_strides_and_other_dtypes() -> None:
    x, _, _ = inputs(2, 4, 5)
    wide = torch.randn(8, dtype=torch.float64)
    bias = torch.randn(4).bfloat16().requires_grad_()
    weight = wide[::2].requires_grad_()
    _, grad_x, grad_weight, grad_bias = with_gradients(x, 2, weight, bias)
    assert [grad_weight.dtype, grad_bias.dtype] == [torch.float64, torch.bfloat16]
    with use_backend("reference"):
        expected = with_gradients(x, 2, weight, bias)
    torch.testing.assert_close(grad_x, expected[1])
    torch.testing.assert_close(grad_weight, expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_bias, expected[3])


def test_the_binding_itself_refuses_what_it_does_not_serve(cpu_backend: Any) -> None:
    x, weight, bias = (tensor.detach() for tensor in inputs(2, 4, 3))
    forward, backward = cpu_backend.group_norm_silu.default, cpu_backend.group_norm_silu_backward.default
    dtypes = "float32, bfloat16, float16 or float64"
    for arguments, message in (
        ((x.int(), 2, weight, bias), f"group_norm_silu: x must be {dtypes}, got Int"),
        ((x[:, 0, 0], 2, weight, bias), r"group_norm_silu: x must have shape \[B, C, ...\], got 1 dimensions"),
        ((x, 3, weight, bias), "group_norm_silu: num_groups must divide the 4 channels, got 3"),
        ((x, 0, weight, bias), "group_norm_silu: num_groups must divide the 4 channels, got 0"),
        ((x[..., :0], 2, weight, bias), "group_norm_silu: a sample of x has no elements"),
        ((x, 2, weight[:3], bias), r"group_norm_silu: weight must have shape \[C\] = \[4\]"),
        ((x, 2, weight, bias.int()), f"group_norm_silu: bias must be {dtypes}, got Int"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments, 1e-5, True, None)
    with pytest.raises(RuntimeError, match=r"group_norm_silu: offset must have shape \[B, C\] = \[2, 4\]"):
        forward(x, 2, weight, bias, 1e-5, True, x[:, :2, 0])
    with pytest.raises(RuntimeError, match="group_norm_silu_of_sum: residual must have the shape"):
        cpu_backend.group_norm_silu_of_sum.default(x, x[:1], 2, weight, bias, 1e-5, True)
    _, mean, rstd = forward(x, 2, weight, bias, 1e-5, True, None)
    with pytest.raises(RuntimeError, match="group_norm_silu_backward: grad_sum is Double, the tensors before"):
        backward(x, x.double(), x, mean, rstd, weight, bias, None, True, True, True, True)
    for arguments, message in (
        ((x[:1], x, mean, rstd), "group_norm_silu_backward: grad_output must have the shape"),
        ((x.double(), x, mean, rstd), "group_norm_silu_backward: grad_output is Double, the tensors before"),
        ((x, x, mean.double(), rstd), "group_norm_silu_backward: mean must be as group_norm_silu returned it"),
        ((x, x, mean, rstd[:, :1]), "group_norm_silu_backward: rstd must be as group_norm_silu returned it"),
        ((x, x, mean[:1], rstd[:1]), "group_norm_silu_backward: mean must have the batch of x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(arguments[0], None, *arguments[1:], weight, bias, None, True, True, True, True)


def test_fakes_beyond_2_to_the_31_elements(cpu_backend: Any) -> None:
    with torch.device("meta"):
        x = torch.empty(2, 4, 2**15, 2**15, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = torch.empty(4)
        y, mean, rstd = cpu_backend.group_norm_silu.default(x, 2, weight, None, 1e-5, True, None)
        backward = cpu_backend.group_norm_silu_backward.default
        grads = backward(y, None, x, mean, rstd, weight, None, None, True, True, True, False)
    for result in (y, grads[0]):
        assert result.shape == x.shape and result.stride() == x.stride() and result.dtype == x.dtype
    assert mean.shape == rstd.shape == (2, 2) and mean.dtype == rstd.dtype == torch.float32
    assert grads[1].shape == (4,) and grads[1].dtype == torch.float32 and grads[2].shape == (0,)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    pixels = 2**16
    x = torch.zeros(1, 2**15 + 3, pixels, dtype=torch.bfloat16)
    x[0, -1] = torch.randn(pixels)
    y = ops.group_norm_silu(x, 2**15 + 3)
    torch.testing.assert_close(y[:, -1:], F.silu(F.group_norm(x[:, -1:].float(), 1)).bfloat16())
