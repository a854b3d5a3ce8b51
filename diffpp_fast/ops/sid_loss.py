"""The generator loss of SiD and SiD-LSG (Zhou et al., arXiv 2404.04057 and 2406.01561), for any prediction type."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast.arguments import number
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import sid_loss as definition
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import by_definition, needs_gradient, recorded


def sid_loss(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Noise | Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    sid_alpha: float = 1.0,
) -> Tensor:
    """|k| (sum d r - sid_alpha sum d^2) / mean|r| per sample.

    d = guided - fake, r = guided - target, guided = uncond + guidance_scale (cond - uncond), sums over the elements;
    the target is as in `denoising_loss` and k as in `NoiseSchedule.gap_scale`. In terms of the x0 that the networks
    imply this is sum (X_guided - X_fake)(X_guided - x0) - sid_alpha sum (X_guided - X_fake)^2, over
    mean|x0 - X_guided|.

    Args:
        fake: [B, ...], the output of the fake network at (x_t, t).
        cond: [B, ...], the reference network's output with the prompt.
        uncond: [B, ...], its output without; may be None if guidance_scale is 1.
        x0: [B, ...], the generator's samples behind x_t.
        noise: the noise in x_t: a `Noise` of B samples, regenerated from its address, or eps itself.
        alpha: [B], the factor of x0 in x_t; not 0 for "epsilon".
        sigma: [B], the factor of the noise in x_t.
        guidance_scale: diffusers' convention, 1 is no guidance.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".
        sid_alpha: SiD's alpha.

    Returns:
        [B], float32 (float64 for float64 inputs). mean|r| is taken as at least 1e-6.

    Transforms:
        Kernels compute the loss and the gradients of `fake`, `cond`, `uncond` and `x0`, the last as far as the target
        holds it (all but "epsilon"). Plain torch computes gradients of `alpha`, `sigma` and a noise tensor, second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it. In all of
        them mean|r| is a constant, as SiD has it; else they are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not a number where one is due.
        ValueError: shapes, batch sizes or devices differ; a sample has no elements; `uncond` is missing; a number is
            not finite; unknown prediction type.
    """
    op = "sid_loss"
    sid_alpha = number(op, "sid_alpha", sid_alpha)
    checks.outputs_with_target(op, fake, cond, uncond, x0, alpha, sigma, prediction_type)
    guidance_scale = checks.guidance(op, uncond, guidance_scale)
    eps = checks.noise(op, noise, x0)
    x0 = checks.target_x0(prediction_type, x0, fake)
    dtype = checks.common_dtype(fake, cond, uncond, x0, eps)
    arguments = (
        checks.cast(fake, dtype),
        checks.cast(cond, dtype),
        checks.cast(uncond, dtype),
        checks.cast(x0, dtype),
        checks.cast(eps, dtype),
        alpha,
        sigma,
        guidance_scale,
        prediction_type,
        sid_alpha,
    )
    loss: Tensor
    if by_definition(eps, alpha, sigma):
        loss, *_ = definition.forward(*arguments)
    elif needs_gradient(fake, cond, uncond, x0):
        loss = _SidLoss.apply(*arguments)
    else:
        loss, *_ = dispatch.select(op, fake.device, dtype).forward(*arguments)
    return loss


class _SidLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        fake: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        x0: Tensor,
        noise: Address | Tensor,
        alpha: Tensor,
        sigma: Tensor,
        guidance_scale: float,
        prediction_type: str,
        sid_alpha: float,
    ) -> Tensor:
        ctx.kernels = dispatch.select("sid_loss", fake.device, fake.dtype)
        noise_tensor, ctx.noise_key = checks.split_noise(noise)
        ctx.options = guidance_scale, prediction_type, sid_alpha
        loss: Tensor
        loss, factor = ctx.kernels.forward(fake, cond, uncond, x0, noise, alpha, sigma, *ctx.options)
        ctx.save_for_backward(factor, fake, cond, uncond, x0, alpha, sigma, noise_tensor)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor, fake, cond, uncond, x0, alpha, sigma, noise_tensor = ctx.saved_tensors
        kernels = definition if recorded() else ctx.kernels
        grads = kernels.backward(
            grad_output,
            factor,
            fake,
            cond,
            uncond,
            x0,
            checks.join_noise(noise_tensor, ctx.noise_key),
            alpha,
            sigma,
            *ctx.options,
            ctx.needs_input_grad[:4],
        )
        return (*grads, None, None, None, None, None, None)
