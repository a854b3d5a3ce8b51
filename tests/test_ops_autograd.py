"""Derivatives of every operator beyond the first of its large arguments, and what transforms make of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import diffpp_fast
from diffpp_fast import Noise, ops
from diffpp_fast.backends import use_backend
from diffpp_fast.methods.base import inject_gradient

FOUR = (2, 4, 3, 5)
F64 = torch.float64
NOISE = Noise(3, torch.arange(2))

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def cases() -> dict[str, Case]:
    """Every operator as a function of all its tensors, in float64: those that kernels differentiate come first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, y, u, x0, eps = torch.randn(5, 2, 4, 2, 2, dtype=F64).unbind()
        alpha, sigma, weight = torch.rand(3, 2, dtype=F64).add(0.5).unbind()
        channels, rows = torch.randn(2, 4, dtype=F64), torch.randn(2, 2, 6, dtype=F64)
    guided: dict[str, Any] = {"guidance_scale": 2.0, "prediction_type": "v_prediction"}
    pixels: dict[str, Any] = {"size": 3, "mean": [0.5] * 4, "std": [0.5] * 4}
    return {
        "add_noise": (ops.add_noise, (x, alpha, sigma, eps)),
        "add_noise, drawn": (lambda x, a, s: ops.add_noise(x, a, s, NOISE), (x, alpha, sigma)),
        "denoising_loss": (
            lambda p, x0, e, a, s, w: ops.denoising_loss(p, x0, e, a, s, prediction_type="v_prediction", weight=w),
            (x, x0, eps, alpha, sigma, weight),
        ),
        "denoising_loss, drawn": (lambda p, x0, a, s: ops.denoising_loss(p, x0, NOISE, a, s), (x, x0, alpha, sigma)),
        "sid_loss": (lambda *tensors: ops.sid_loss(*tensors, **guided), (x, y, u, x0, eps, alpha, sigma)),
        "sim_loss": (lambda *tensors: ops.sim_loss(*tensors, **guided), (x, y, u, x0, eps, alpha, sigma)),
        "reward_pixels": (lambda x: ops.reward_pixels(x, **pixels), (x,)),
        "reward_pixels, straight": (lambda x: ops.reward_pixels(x, **pixels, clamp="straight_through"), (x,)),
        "group_norm_silu": (lambda x, w, b: ops.group_norm_silu(x, 2, w, b), (x, *channels)),
        "group_norm_silu, of a sum": (
            lambda x, r, w, b: torch.cat(ops.group_norm_silu(x, 2, w, b, residual=r)),
            (x, y, *channels),
        ),
        "group_norm_silu, offset": (lambda x, o: ops.group_norm_silu(x, 2, offset=o), (x, y[:, :, 0, 0])),
        "group_norm": (lambda x: ops.group_norm_silu(x, 2, activation="identity"), (x,)),
        "geglu": (ops.geglu, (rows,)),
        "ada_layer_norm": (ops.ada_layer_norm, (rows, rows[:, 0], rows[:, 1])),
        "gated_residual_norm": (
            lambda *tensors: torch.cat(ops.gated_residual_norm(*tensors)),
            (rows, 2.0 * rows.cos(), rows[:, 0], rows[:, 1], rows[:, :1].sin()),
        ),
        "gated_residual_norm, rms": (
            lambda x, branch, scale, w: torch.cat(
                ops.gated_residual_norm(x, branch, scale=scale, norm="rms", weight=w)
            ),
            (rows, rows.cos(), rows.sin(), rows[0, 0].exp()),
        ),
        "gated_residual_norm, bare": (lambda *pair: torch.cat(ops.gated_residual_norm(*pair)), (rows, rows.cos())),
        "rms_norm_rope": (
            lambda x, w, cos, sin: ops.rms_norm_rope(x, cos, sin, w, interleaved=False, sequence_dim=2),
            (x, channels[0, :2], eps[:, 0], u[:, 0]),
        ),
        "inject_gradient": (lambda x: inject_gradient(x, y), (x,)),
    }


CASES = cases()
FUNCTIONS = {
    "_AddNoise": "add_noise",
    "_DenoisingLoss": "denoising_loss",
    "_GapLoss": "sid_loss and sim_loss",
    "_RewardPixels": "reward_pixels",
    "_GroupNormSilu": "group_norm_silu",
    "_GroupNormSiluOfSum": "group_norm_silu, of a sum",
    "_Geglu": "geglu",
    "_AdaLayerNorm": "ada_layer_norm",
    "_GatedResidualNorm": "gated_residual_norm",
    "_RmsNormRope": "rms_norm_rope",
    "_InjectGradient": "inject_gradient",
    "_Convolution": "test_decoder.py",
    "_EnlargedConvolution": "test_decoder.py",
    "_Linear": "test_decoder.py",
    "_ResidualBlock": "test_decoder.py",
    "_NormedConvolution": "test_decoder.py",
    "_Attention": "test_decoder.py",
    "_ChannelNorm": "test_decoder.py",
    "_Through": "test_quantization.py",
    "_Refused": "score_gap, inject_gradient, and test_decoder.py",
}
#: Where a constant stands for a quantity that depends on the arguments, finite differences see another function.
STOPPED = ("sid_loss", "reward_pixels, straight", "inject_gradient")
#: The noise that plain torch draws has other last bits than that of kernels, in float32.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
every_case = pytest.mark.parametrize("name", CASES)


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def first_argument(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A case as a function of what its kernels differentiate."""
    function, (x, *others) = CASES[name]
    return lambda x: function(x, *others), x


def tangent_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


def test_every_function_of_the_package_is_tried_here() -> None:
    found = set()
    for path in Path(diffpp_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                found |= {node.name} if bases & {"Function", "Operator"} else set()
    assert found - {"Operator"} == set(FUNCTIONS)


@every_case
def test_gradients_by_all_tensors(name: str) -> None:
    """A learned schedule or weight gets its gradient; what the kernels and plain torch say is the same."""
    function, tensors = CASES[name]
    if name not in STOPPED:
        torch.autograd.gradcheck(function, leaves(tensors), check_forward_ad=True)
    one, x = first_argument(name)
    x = x.clone().requires_grad_()
    y = one(x)
    outer = torch.randn_like(y)
    (by_kernels,) = torch.autograd.grad(y, x, outer)
    by_definition = torch.autograd.grad(function(x, *leaves(tensors)[1:]), x, outer)[0]
    torch.testing.assert_close(by_kernels, by_definition, **CLOSE)
    torch.testing.assert_close(by_kernels, vjp(one, x.detach())[1](outer)[0], **CLOSE)


@every_case
def test_gradients_accumulate_each_in_its_own_memory(name: str) -> None:
    """autograd adds the second pass's in place to the first's, which two tensors of one memory would both get."""
    function, tensors = CASES[name]
    for backend in ("auto", "reference"):
        given = leaves(tensors)
        with use_backend(backend):
            y = function(*given)
        outer = torch.randn_like(y)
        once = torch.autograd.grad(y, given, outer, retain_graph=True, allow_unused=True)
        for _ in range(2):
            y.backward(outer, retain_graph=True)
        for leaf, gradient in zip(given, once, strict=True):
            if gradient is not None:
                torch.testing.assert_close(leaf.grad, 2.0 * gradient)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_results_may_be_written(backend: str) -> None:
    """Each of a pair, whose gradients are those of a copy."""
    x, y = CASES["gated_residual_norm, bare"][1]
    for op in (ops.gated_residual_norm, lambda x, y: ops.group_norm_silu(x, 2, residual=y)):
        (leaf,) = leaves((x,))
        with use_backend(backend):
            pair = op(leaf, y)
        expected = torch.autograd.grad(2.0 * pair[1], leaf, torch.ones_like(y), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(pair[1].mul_(2.0), leaf, torch.ones_like(y)), expected)


@every_case
def test_tangents(name: str) -> None:
    """In each of forward mode's three forms, also where nothing requires gradient: the adjoint of the gradient."""
    one, x = first_argument(name)
    tangent = tangent_like(x)
    y, pushed = jvp(one, (x,), (tangent,))
    torch.testing.assert_close(y, one(x), **CLOSE)
    outer = torch.randn_like(y)
    leaf = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(one(leaf), leaf, outer)
    torch.testing.assert_close((pushed * outer).sum(), (tangent * pulled).sum())
    assert pushed.abs().sum() > 0
    for start in (x, leaf):
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.unpack_dual(one(forward_ad.make_dual(start, tangent)))
        torch.testing.assert_close(dual.tangent, pushed)
    torch.testing.assert_close(linearize(one, x)[1](tangent), pushed)


@every_case
def test_second_derivatives(name: str) -> None:
    """The kernels' graph has them: by all tensors, by `grad` with inputs, with a tangent, and of a penalty."""
    function, tensors = CASES[name]
    one, x = first_argument(name)
    if name not in STOPPED:
        torch.autograd.gradgradcheck(one, leaves((x,)), check_fwd_over_rev=True)
        torch.autograd.gradgradcheck(function, leaves(tensors), check_fwd_over_rev=True, fast_mode=True)
    tangent = tangent_like(x)
    leaf = x.clone().requires_grad_()
    scalar = lambda x: one(x).square().sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(scalar(leaf), leaf)[0], **CLOSE)
    (second,) = torch.autograd.grad(gradient, leaf, tangent, retain_graph=True)
    torch.testing.assert_close(second, jvp(grad(scalar), (x,), (tangent,))[1], **CLOSE)
    (leaf.square().sum() + gradient.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, grad(lambda x: x.square().sum() + grad(scalar)(x).square().sum())(x), **CLOSE)
    y = one(leaf)
    with forward_ad.dual_level():
        outer = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2.0))
        pulled = forward_ad.unpack_dual(torch.autograd.grad(y, leaf, outer)[0])
    torch.testing.assert_close(pulled.tangent, 2.0 * pulled.primal)


@every_case
def test_maps_over_samples_and_jacobians(name: str) -> None:
    function, tensors = CASES[name]
    stacked = tuple(torch.stack((tensor, 1.1 * tensor, 0.9 * tensor)) for tensor in tensors)
    rows = [tuple(tensor[i] for tensor in stacked) for i in range(3)]
    torch.testing.assert_close(vmap(function)(*stacked), torch.stack([function(*row) for row in rows]), **CLOSE)
    first = vmap(function, (0, *[None] * (len(tensors) - 1)))(stacked[0], *tensors[1:])
    torch.testing.assert_close(first, torch.stack([function(row[0], *tensors[1:]) for row in rows]), **CLOSE)
    summed = grad(lambda *tensors: function(*tensors).sum())
    torch.testing.assert_close(vmap(summed)(*stacked), torch.stack([summed(*row) for row in rows]))
    one, x = first_argument(name)
    jacobian = jacrev(one)(x)
    torch.testing.assert_close(jacfwd(one)(x), jacobian)
    torch.testing.assert_close(torch.autograd.functional.jacobian(one, x, vectorize=True), jacobian, **CLOSE)
    scalar = lambda x: one(x).square().sum()  # noqa: E731
    torch.testing.assert_close(hessian(scalar)(x), jacrev(jacrev(scalar))(x))


@every_case
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_batches_of_outer_gradients(name: str, backend: str) -> None:
    """`torch.autograd` maps over them itself, with a `vmap` that is not `torch.func`'s."""
    for function, tensors in (CASES[name], (first_argument(name)[0], CASES[name][1][:1])):
        given = leaves(tensors)
        with use_backend(backend):
            y = function(*given)
        outer = torch.randn(3, *y.shape, dtype=y.dtype)
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        rows = [torch.autograd.grad(y, given, row, **options) for row in outer]
        for create_graph in (False, True):
            every = torch.autograd.grad(y, given, outer, is_grads_batched=True, create_graph=create_graph, **options)
            for batched, *single in zip(every, *rows, strict=True):
                if batched is not None:  # "epsilon" has no x0 in its target
                    torch.testing.assert_close(batched, torch.stack(single), **CLOSE)


@pytest.mark.parametrize("name", ["add_noise, drawn", "group_norm_silu"])
def test_transforms_inside_compiled_functions(name: str) -> None:
    one, x = first_argument(name)
    x, tangent = x.clone(), tangent_like(x)

    def push(x: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(one, (x,), (tangent,))

    compiled = torch.compile(push, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), push(x))


def score_gap(x: Tensor, y: Tensor) -> Tensor:
    gap = ops.score_gap(x, y, x0=y, noise=NOISE, alpha=torch.ones(2), sigma=torch.ones(2), normalizer="mean_abs")
    return gap.gradient + gap.gap_sq[:, None]


def rewarded_score_gap(x: Tensor, y: Tensor) -> Tensor:
    gap = ops.score_gap(y.detach(), y.square().detach(), reward_score=x * y, reward_scale=y.mean(1), reward_clip=0.3)
    return gap.gradient + gap.gap_dot_reward[:, None] + gap.reward_share[:, None]


@pytest.mark.parametrize("score_gap", [score_gap, rewarded_score_gap])
def test_the_score_gap_lets_no_derivative_vanish(score_gap: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = torch.randn(2, 2, 6, dtype=F64).unbind()
    with pytest.raises(RuntimeError, match=r"score_gap is not differentiable.*: detach its arguments"):
        jvp(lambda x: score_gap(x, y), (x,), (y,))
    with pytest.raises(RuntimeError, match="score_gap is not differentiable"):
        grad(lambda y: score_gap(x, y).sum())(y)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="score_gap is not differentiable"):
        score_gap(forward_ad.make_dual(x, y), y)
    constant = lambda x: (x * score_gap(x.detach(), y)).sum()  # noqa: E731
    torch.testing.assert_close(grad(constant)(x), score_gap(x, y), **CLOSE)
    torch.testing.assert_close(jvp(constant, (x,), (y,))[1], (y * score_gap(x, y)).sum(), **CLOSE)
    mapped = vmap(score_gap)(torch.stack((x, y)), torch.stack((y, x)))
    torch.testing.assert_close(mapped, torch.stack((score_gap(x, y), score_gap(y, x))), **CLOSE)
    assert not score_gap(x.requires_grad_(), y).requires_grad


def test_a_known_gradient_that_wants_a_derivative_is_refused() -> None:
    x, y = torch.randn(2, 2, 6).unbind()
    with pytest.raises(ValueError, match=r"inject_gradient: gradient is a constant .*: detach it"):
        inject_gradient(x, y.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"inject_gradient: gradient is a constant .*: detach it"):
        jvp(lambda y: inject_gradient(x, y), (y,), (x,))


def test_noise_maps_over_sample_numbers() -> None:
    samples = torch.tensor([[3, 5], [2**40, 11]])
    for draw in (
        lambda samples: Noise(7, samples).normal((3, 5)),
        lambda samples: Noise(7, samples).uniform(),
        lambda samples: Noise(7, samples).integers(0, 1000),
    ):
        expected = torch.stack([draw(row) for row in samples])
        torch.testing.assert_close(vmap(draw)(samples), expected, rtol=0, atol=3e-6)
    x = torch.randn(2, 3, 5)
    shifted, tangent = jvp(lambda x: x + Noise(7, samples[0]).normal((3, 5)), (x,), (x,))
    torch.testing.assert_close(shifted, x + Noise(7, samples[0]).normal((3, 5)))
    assert torch.equal(tangent, x)


@pytest.mark.parametrize("op", ["denoising_loss", "sid_loss", "sim_loss", "score_gap"])
def test_an_x0_that_the_target_does_not_hold_widens_nothing(op: str) -> None:
    fake, cond, uncond = torch.randn(3, *FOUR).bfloat16().unbind()
    alpha, sigma = torch.rand(2, 2).add(0.5).unbind()
    noise = Noise(1, torch.arange(2))

    def compute(x0: Tensor) -> Tensor:
        if op == "denoising_loss":
            return ops.denoising_loss(fake, x0, noise, alpha, sigma)
        if op == "score_gap":
            target: dict[str, Any] = {"x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma}
            return ops.score_gap(fake, cond, uncond, guidance_scale=2.0, normalizer="mean_abs", **target).gradient
        return getattr(ops, op)(fake, cond, uncond, x0, noise, alpha, sigma, guidance_scale=2.0)

    wide = compute(torch.full(FOUR, torch.nan))
    assert torch.equal(wide, compute(torch.zeros(FOUR, dtype=torch.bfloat16))) and not wide.isnan().any()
    assert wide.dtype == (torch.bfloat16 if op == "score_gap" else torch.float32)


def test_two_operators_compile_into_one_graph_though_none_was_called_before() -> None:
    code = """
import torch
from diffpp_fast import Noise, ops

def step(x, a, s):
    noise = Noise(1, torch.arange(2))
    return ops.denoising_loss(ops.add_noise(x, a, s, noise), x, noise, a, s)

x, a, s = torch.randn(2, 4, 3, 5), torch.rand(2) + 0.5, torch.rand(2) + 0.5
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, a, s)
torch.testing.assert_close(compiled, step(x, a, s))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
