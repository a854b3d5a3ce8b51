"""What all operators' backward passes have in common."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops

FOUR = (2, 4, 3, 5)


def gradient(op: str, create_graph: bool) -> tuple[Tensor, Tensor]:
    """An argument and the gradient of an operator's sum by it: the upstream gradient is a constant."""
    x = torch.randn(FOUR, requires_grad=True)
    others = torch.randn(3, *FOUR).unbind()
    alpha, sigma = torch.rand(2, 2).add(0.5).unbind()
    noise = Noise(1, torch.arange(2))
    results = {
        "add_noise": lambda: ops.add_noise(x, alpha, sigma, noise),
        "denoising_loss": lambda: ops.denoising_loss(x, others[0], noise, alpha, sigma),
        "sid_loss": lambda: ops.sid_loss(x, *others, noise, alpha, sigma, guidance_scale=2.0),
        "sim_loss": lambda: ops.sim_loss(x, *others, noise, alpha, sigma, guidance_scale=2.0),
        "reward_pixels": lambda: ops.reward_pixels(x, 3, mean=[0.5] * 4, std=[0.5] * 4),
        "group_norm_silu": lambda: ops.group_norm_silu(x, 2),
    }
    (grad,) = torch.autograd.grad(results[op]().sum(), x, create_graph=create_graph)
    return x, grad


OPS = ("add_noise", "denoising_loss", "sid_loss", "sim_loss", "reward_pixels", "group_norm_silu")


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_penalty_is_refused_by_name(op: str) -> None:
    x, grad = gradient(op, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (x.square().sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("op", OPS)
def test_create_graph_changes_no_gradient(op: str) -> None:
    grads = []
    for create_graph in (False, True):
        torch.manual_seed(1)
        grads.append(gradient(op, create_graph)[1].detach())
    assert torch.equal(*grads)


@pytest.mark.parametrize("op", ["denoising_loss", "sid_loss", "sim_loss", "score_gap"])
def test_an_x0_that_the_target_does_not_hold_widens_nothing(op: str) -> None:
    fake, cond, uncond = torch.randn(3, *FOUR).bfloat16().unbind()
    alpha, sigma = torch.rand(2, 2).add(0.5).unbind()
    noise = Noise(1, torch.arange(2))

    def compute(x0: Tensor) -> Tensor:
        if op == "denoising_loss":
            return ops.denoising_loss(fake, x0, noise, alpha, sigma)
        if op == "score_gap":
            target = {"x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma, "normalizer": "mean_abs"}
            return ops.score_gap(fake, cond, uncond, guidance_scale=2.0, **target).gradient
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
