"""The compiled geglu and ada_layer_norm: registration, threads, torch.compile. The formulas: test_ops_*.py."""

from typing import Any

import pytest
import torch
from native import assert_compiles_once, assert_same_bits_for_any_threads, check_registration
from torch import Tensor

from diffpp_fast import ops

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def modulated(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    scale, shift = torch.randn(2, shape[0], shape[-1]).to(dtype)
    return torch.randn(shape).to(dtype).requires_grad_(), scale.requires_grad_(), shift.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype: torch.dtype, cpu_backend: Any) -> None:
    x, scale, shift = (tensor.detach() for tensor in modulated(2, 5, 6, dtype=dtype))
    check_registration(cpu_backend.geglu.default, x)
    check_registration(cpu_backend.geglu_backward.default, x[..., ::2], x.mT.contiguous().mT)
    forward, backward = cpu_backend.ada_layer_norm.default, cpu_backend.ada_layer_norm_backward.default
    check_registration(forward, x, scale, shift.mT.contiguous().mT, 1e-6)
    check_registration(forward, x.mT.contiguous().mT, scale, shift, 1e-6)
    _, mean, rstd = forward(x, scale, shift, 1e-6)
    check_registration(backward, x, x.mT.contiguous().mT, mean, rstd, scale, True, True, True)
    check_registration(backward, x, x, mean, rstd, scale, True, False, False)
    check_registration(backward, x, x, mean, rstd, scale, False, False, True)


def test_bindings_check_for_themselves(cpu_backend: Any) -> None:
    x, scale, shift = (tensor.detach() for tensor in modulated(2, 5, 6))
    with pytest.raises(RuntimeError, match="geglu: the last dimension of x must be a multiple of 2"):
        cpu_backend.geglu(x[..., :5])
    with pytest.raises(RuntimeError, match="grad_output must have half the elements of x"):
        cpu_backend.geglu_backward(x, x)
    with pytest.raises(RuntimeError, match=r"ada_layer_norm: scale must have shape \[B, D\] = \[2, 6\]"):
        cpu_backend.ada_layer_norm(x, scale[:1], shift, 1e-6)
    with pytest.raises(RuntimeError, match="shift and x must both be float64, or neither"):
        cpu_backend.ada_layer_norm(x, scale, shift.double(), 1e-6)


def test_same_bits_for_any_threads() -> None:
    x = torch.randn(3, 131, 520, requires_grad=True)
    outer = torch.randn(3, 131, 260)

    def gated() -> tuple[Tensor, ...]:
        y = ops.geglu(x)
        return y.detach(), *torch.autograd.grad(y, x, outer)

    assert_same_bits_for_any_threads(gated)
    args = modulated(3, 131, 1100)
    grad = torch.randn_like(args[0])

    def normalised() -> tuple[Tensor, ...]:
        y = ops.ada_layer_norm(*args)
        return y.detach(), *torch.autograd.grad(y, args, grad)

    assert_same_bits_for_any_threads(normalised)


def test_compiles_once() -> None:
    assert_compiles_once(ops.geglu, *[(torch.randn(2, 3, 8, requires_grad=True),) for _ in range(2)])
    assert_compiles_once(ops.ada_layer_norm, *[modulated(2, 3, 8) for _ in range(2)])
