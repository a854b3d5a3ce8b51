"""The generator loss of SIM (Luo et al., arXiv 2410.16794) and Diff-Instruct* (arXiv 2410.20898)."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast.arguments import positive
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import sim_loss as definition
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import by_definition, needs_gradient, recorded


def sim_loss(
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
    huber_c: float = 1.0,
) -> Tensor:
    """Q_b / sqrt(D_b + huber_c^2) per sample, in terms of scores: the pseudo-Huber distance of score implicit matching.

    D = sum (score_guided - score_fake)^2 and Q = sum (score_guided - score_fake)(score_fake - score_target), where a
    difference of scores is -m times a difference of outputs: m = 1/sigma for "epsilon", alpha/sigma for "v_prediction"
    and "flow_prediction", alpha/sigma^2 for "sample". In terms of outputs, with d = guided - fake and
    r = guided - target, the loss is m^2 (sum d r - sum d^2) / sqrt(m^2 sum d^2 + huber_c^2). Multiply the result by
    w(t) for a weighted one.

    Args:
        fake: [B, ...], the output of the fake network at (x_t, t).
        cond: [B, ...], the reference network's output with the prompt.
        uncond: [B, ...], its output without; may be None if guidance_scale is 1.
        x0: [B, ...], the generator's samples behind x_t.
        noise: the noise in x_t: a `Noise` of B samples, regenerated from its address, or eps itself.
        alpha: [B], the factor of x0 in x_t.
        sigma: [B], the factor of the noise in x_t; not 0.
        guidance_scale: diffusers' convention, 1 is no guidance.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".
        huber_c: the distance, in units of the whole sample's score, where squared turns into absolute; positive.

    Returns:
        [B], float32 (float64 for float64 inputs).

    Transforms:
        Kernels compute the loss and the gradients of `fake`, `cond`, `uncond` and `x0`, the last as far as the target
        holds it (all but "epsilon"). Plain torch computes gradients of `alpha`, `sigma` and a noise tensor, second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it; all are
        exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not a number where one is due.
        ValueError: shapes, batch sizes or devices differ; a sample has no elements; `uncond` is missing; unknown
            prediction type; huber_c is not positive and finite, or guidance_scale not finite.
    """
    op = "sim_loss"
    checks.outputs_with_target(op, fake, cond, uncond, x0, alpha, sigma, prediction_type)
    guidance_scale = checks.guidance(op, uncond, guidance_scale)
    huber_c = positive(op, "huber_c", huber_c)
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
        huber_c,
    )
    loss: Tensor
    if by_definition(eps, alpha, sigma):
        loss, *_ = definition.forward(*arguments)
    elif needs_gradient(fake, cond, uncond, x0):
        loss = _SimLoss.apply(*arguments)
    else:
        loss, *_ = dispatch.select(op, fake.device, dtype).forward(*arguments)
    return loss


class _SimLoss(Function):
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
        huber_c: float,
    ) -> Tensor:
        ctx.kernels = dispatch.select("sim_loss", fake.device, fake.dtype)
        noise_tensor, ctx.noise_key = checks.split_noise(noise)
        ctx.options = guidance_scale, prediction_type
        ctx.huber_c = huber_c
        loss: Tensor
        loss, factor, shrink = ctx.kernels.forward(fake, cond, uncond, x0, noise, alpha, sigma, *ctx.options, huber_c)
        ctx.save_for_backward(factor, shrink, fake, cond, uncond, x0, alpha, sigma, noise_tensor)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor, shrink, fake, cond, uncond, x0, alpha, sigma, noise_tensor = ctx.saved_tensors
        noise = checks.join_noise(noise_tensor, ctx.noise_key)
        arguments: Any = fake, cond, uncond, x0, noise, alpha, sigma, *ctx.options
        kernels = ctx.kernels
        if recorded():
            kernels = definition
            _, factor, shrink = definition.forward(*(*arguments, ctx.huber_c))  # which depend on the outputs
        grads = kernels.backward(grad_output, factor, shrink, *arguments, ctx.needs_input_grad[:4])
        return (*grads, None, None, None, None, None, None)
