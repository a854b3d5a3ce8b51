"""The gated residual with its modulated norm, against torch's own in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpp_fast import ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64
NAMES = ("residual", "branch", "gate", "scale", "shift", "weight")
#: Which of the tensors there are.
SUBSETS = (NAMES, NAMES[:5], ("residual", "branch"), ("residual", "branch", "scale", "weight"), NAMES[:3])
norms = pytest.mark.parametrize("norm", ["layer", "rms"])


def formula(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    hidden = residual + (branch if gate is None else gate * branch)
    shape = hidden.shape[-1:]
    y = F.layer_norm(hidden, shape, weight, None, eps) if norm == "layer" else F.rms_norm(hidden, shape, weight, eps)
    y = y if scale is None else y * (1 + scale)
    return hidden, y if shift is None else y + shift


def arguments(*shape: int, tokens: bool = False, dtype: torch.dtype = F64) -> dict[str, Any]:
    rows = shape if tokens else (shape[0], *[1] * (len(shape) - 2), shape[-1])
    shapes = (shape, shape, rows, rows, rows, shape[-1:])
    return {name: torch.randn(size, dtype=dtype).requires_grad_() for name, size in zip(NAMES, shapes, strict=True)}


def with_gradients(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    outputs = function(**tensors, **options)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    outer = [torch.randn(y.shape, generator=generator, dtype=F64, device=y.device).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, list(tensors.values()), outer)]


@norms
@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("shape", [(2, 4), (3, 70, 6), (2, 3, 5, 6), (1, 1, 1)])
def test_formula_and_gradients(shape: tuple[int, ...], tokens: bool, norm: str) -> None:
    every = arguments(*shape, tokens=tokens)
    for names in SUBSETS:
        some = {name: every[name] for name in names}
        actual = with_gradients(ops.gated_residual_norm, some, norm=norm, eps=1e-2)
        for value, oracle in zip(actual, with_gradients(formula, some, norm=norm, eps=1e-2), strict=True):
            torch.testing.assert_close(value, oracle)


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, norm: str, assert_twice_unfused: Callable[..., None]) -> None:
    low = arguments(2, 48, 96, dtype=dtype)
    wide = {name: value.detach().double().requires_grad_() for name, value in low.items()}
    results = [
        with_gradients(function, tensors, norm=norm)
        for function, tensors in ((ops.gated_residual_norm, low), (formula, low), (formula, wide))
    ]
    for actual, unfused, oracle in zip(*results, strict=True):
        assert_twice_unfused(actual, unfused, oracle)


def test_the_sum_is_normalised_as_it_is_stored() -> None:
    low: dict[str, Any] = {name: value.detach() for name, value in arguments(2, 9, 33, dtype=torch.bfloat16).items()}
    hidden, modulated = ops.gated_residual_norm(**low)
    assert hidden.dtype == modulated.dtype == torch.bfloat16
    low["residual"], low["branch"] = hidden, torch.zeros_like(hidden)
    assert torch.equal(ops.gated_residual_norm(**low)[1], modulated)


def test_samples_and_tokens_may_be_mixed() -> None:
    every, tokens = arguments(2, 3, 4, 5), arguments(2, 3, 4, 5, tokens=True)
    mixed = {**every, "scale": tokens["scale"], "gate": every["gate"].detach().flatten(1).requires_grad_()}
    by_formula = {**mixed, "gate": every["gate"]}
    for value, oracle in zip(with_gradients(ops.gated_residual_norm, mixed), with_gradients(formula, by_formula)):  # noqa: B905
        torch.testing.assert_close(value, oracle.reshape(value.shape))


def test_dtypes_of_their_own() -> None:
    every = arguments(2, 3, 8, dtype=torch.float32)
    low = {**every, "branch": every["branch"].detach().bfloat16().requires_grad_()}
    low |= {"scale": every["scale"].detach().half().requires_grad_(), "weight": every["weight"].detach().double()}
    low["weight"].requires_grad_()
    results = with_gradients(ops.gated_residual_norm, low)
    assert [each.dtype for each in results[:2]] == [torch.float32] * 2
    assert [each.dtype for each in results[2:]] == [value.dtype for value in low.values()]
    wide = with_gradients(ops.gated_residual_norm, {name: value.detach().double().requires_grad_()
                                                    for name, value in low.items()})  # fmt: skip
    for value, oracle in zip(results, wide, strict=True):
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(value.dtype, 1e-5)
        torch.testing.assert_close(value.double(), oracle, rtol=tolerance, atol=tolerance)


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    every = arguments(2, 4, 5, 6)
    expected = with_gradients(ops.gated_residual_norm, every)
    large = {name: layout(every[name].detach()).requires_grad_() for name in ("residual", "branch")}
    actual = with_gradients(ops.gated_residual_norm, {**every, **large})
    for value, correct in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, correct)
    like = torch.empty_like(large["residual"])
    assert all(each.stride() == like.stride() for each in actual[:4])


@pytest.mark.parametrize("name", NAMES)
def test_only_what_needs_gradient_gets_it(name: str) -> None:
    every = arguments(2, 40, 5)
    some = {each: value if each == name else value.detach() for each, value in every.items()}
    losses = [
        outputs[1].square().sum() + outputs[0].sum()
        for outputs in (ops.gated_residual_norm(**some), ops.gated_residual_norm(**every))
    ]
    alone, among = (torch.autograd.grad(loss, every[name])[0] for loss in losses)
    torch.testing.assert_close(alone, among, rtol=1e-12, atol=1e-12)


def test_what_is_kept_for_the_backward_pass() -> None:
    every = arguments(2, 40, 50)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):  # type: ignore[func-returns-value]
        ops.gated_residual_norm(**every)
        with_gate = kept.count((2, 40, 50))
        kept.clear()
        ops.gated_residual_norm(every["residual"], every["branch"], every["gate"].detach(), every["scale"])
    assert (with_gate, kept.count((2, 40, 50))) == (2, 1)


def test_empty_batch() -> None:
    every = arguments(0, 4, 3)
    hidden, modulated = ops.gated_residual_norm(**every)
    assert hidden.shape == modulated.shape == (0, 4, 3)
    (hidden.sum() + modulated.sum()).backward()
    assert all(value.grad is not None and value.grad.shape == value.shape for value in every.values())
    assert not every["weight"].grad.any()


def test_errors_name_what_is_wrong() -> None:
    every = arguments(2, 4, 3)
    for name, wrong, message in (
        ("gate", every["gate"][..., :2], r"gate must have shape \[B, D\] = \[2, 3\], \[B, 1, D\] or that of residual"),
        ("shift", every["residual"][:, :3], "shift must have shape"),
        ("branch", every["branch"][:, :2], r"branch has shape \[2, 2, 3\], residual has \[2, 4, 3\]"),
        ("weight", every["weight"][:2], r"weight must have shape \[D\] = \[3\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=f"gated_residual_norm: {message}"):
            ops.gated_residual_norm(**{**every, name: wrong})
    with pytest.raises(ValueError, match="unknown norm 'batch'; known: layer, rms"):
        ops.gated_residual_norm(every["residual"], every["branch"], norm="batch")
    with pytest.raises(ValueError, match="eps must not be negative"):
        ops.gated_residual_norm(every["residual"], every["branch"], eps=-1.0)
    with pytest.raises(ValueError, match=r"residual must have shape \[B, ..., D\], got \[3\]"):
        ops.gated_residual_norm(every["weight"], every["weight"])
    with pytest.raises(ValueError, match="a sample of residual has no elements"):
        ops.gated_residual_norm(every["residual"][..., :0], every["branch"][..., :0])
