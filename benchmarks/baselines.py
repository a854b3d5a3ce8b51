"""The code that the operators replace, as one writes it by hand in plain torch; autograd does the gradients.

These functions are timed twice: eagerly and under torch.compile. They are in the form that training scripts use, and
in low precision each does what is usual for its step: losses and score gaps cast the networks' outputs to float32
first; noising stays in the dtype of the sample with the coefficients cast to it, as diffusers' schedulers do; group
norm runs in the dtype of the activations, whose kernel keeps float32 statistics; images are resized in float32, since
torch's antialiased resize on the CPU takes no lower precision. [B] values are float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normals from torch's global generator."""
    return torch.randn(shape, dtype=dtype, device=device)


def add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t [B, ...] of x0 [B, ...], with noise drawn from torch's global generator."""
    eps = torch.randn_like(x0)
    return _expand(alpha.to(x0.dtype), x0) * x0 + _expand(sigma.to(x0.dtype), x0) * eps


def denoising_loss(
    prediction: Tensor, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, *, prediction_type: str
) -> Tensor:
    """The scalar mean squared error of the prediction [B, ...]: one fused call of torch's, forward and backward."""
    target = regression_target(prediction_type, x0.float(), eps.float(), alpha, sigma)
    return F.mse_loss(prediction.float(), target)


def weighted_denoising_loss(
    prediction: Tensor, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor, *, prediction_type: str
) -> Tensor:
    """The same with a weight [B] per sample, as training scripts have it for weightings by noise level."""
    target = regression_target(prediction_type, x0.float(), eps.float(), alpha, sigma)
    error = F.mse_loss(prediction.float(), target, reduction="none")
    return (error.flatten(1).mean(1) * weight).mean()


def score_gap(
    fake: Tensor, cond: Tensor, uncond: Tensor | None, scale: Tensor, *, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient scale d [B, ...] in the dtype of `fake`, and sum d^2 [B]."""
    with torch.no_grad():
        gap = guide(cond, uncond, guidance_scale) - fake.float()
        return (_expand(scale, gap) * gap).to(fake.dtype), gap.square().flatten(1).sum(1)


def score_gap_mean_abs(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor,
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient scale d / mean|r| [B, ...] in the dtype of `fake`, and sum d^2, mean|r| and sum d r [B]."""
    with torch.no_grad():
        guided = guide(cond, uncond, guidance_scale)
        gap = guided - fake.float()
        residual = guided - regression_target(prediction_type, x0.float(), eps.float(), alpha, sigma)
        mean_abs = residual.abs().flatten(1).mean(1)
        gradient = _expand(scale / mean_abs.clamp(min=1e-6), gap) * gap
        gap_sq = gap.square().flatten(1).sum(1)
        return gradient.to(fake.dtype), gap_sq, mean_abs, (gap * residual).flatten(1).sum(1)


def score_gap_with_reward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor,
    scale: Tensor,
    reward_score: Tensor,
    reward_scale: Tensor,
    *,
    guidance_scale: float,
) -> tuple[Tensor, ...]:
    """The gradient scale d - reward_scale s [B, ...] in the dtype of `fake`, and sum d^2, sum s^2 and sum d s [B].

    A sample whose reward term is not finite gets none.
    """
    with torch.no_grad():
        gap = guide(cond, uncond, guidance_scale) - fake.float()
        score = reward_score.float()
        gap_sq, reward_sq = gap.square().flatten(1).sum(1), score.square().flatten(1).sum(1)
        defined = (reward_scale * reward_sq.sqrt()).isfinite()
        term = torch.where(_expand(defined, gap), _expand(reward_scale, gap) * score, 0.0)
        gradient = (_expand(scale, gap) * gap - term).to(fake.dtype)
        return gradient, gap_sq, reward_sq, (gap * score).flatten(1).sum(1), defined.to(gap.dtype)


def score_gap_mean_abs_with_reward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor,
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor,
    reward_score: Tensor,
    reward_scale: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str,
) -> tuple[Tensor, ...]:
    """The same with the gradient divided by mean|r|, and after sum d^2 the statistics of r: mean|r| and sum d r [B]."""
    with torch.no_grad():
        guided = guide(cond, uncond, guidance_scale)
        gap = guided - fake.float()
        residual = guided - regression_target(prediction_type, x0.float(), eps.float(), alpha, sigma)
        score = reward_score.float()
        mean_abs = residual.abs().flatten(1).mean(1)
        gap_sq, reward_sq = gap.square().flatten(1).sum(1), score.square().flatten(1).sum(1)
        defined = (reward_scale * reward_sq.sqrt()).isfinite()
        term = torch.where(_expand(defined, gap), _expand(reward_scale, gap) * score, 0.0)
        gradient = (_expand(scale, gap) * gap - term) / _expand(mean_abs.clamp(min=1e-6), gap)
        statistics = gap_sq, mean_abs, (gap * residual).flatten(1).sum(1)
        of_reward = reward_sq, (gap * score).flatten(1).sum(1), defined.to(gap.dtype)
        return gradient.to(fake.dtype), *statistics, *of_reward


def sid_loss(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor,
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str,
    sid_alpha: float = 1.0,
) -> Tensor:
    """The loss of SiD per sample, [B]."""
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.float()
    residual = guided - regression_target(prediction_type, x0.float(), eps.float(), alpha, sigma)
    mean_abs = residual.detach().abs().flatten(1).mean(1).clamp(min=1e-6)
    k = sigma / alpha if prediction_type == "epsilon" else 1.0 if prediction_type == "sample" else sigma
    return k * (gap * (residual - sid_alpha * gap)).flatten(1).sum(1) / mean_abs


def sim_loss(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor,
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str,
    huber_c: float = 1.0,
) -> Tensor:
    """The loss of SIM per sample, [B]."""
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.float()
    residual = guided - regression_target(prediction_type, x0.float(), eps.float(), alpha, sigma)
    if prediction_type == "epsilon":
        m = 1.0 / sigma
    else:
        m = alpha / (sigma.square() if prediction_type == "sample" else sigma)
    m_sq = m.square()
    distance = torch.sqrt(m_sq * gap.square().flatten(1).sum(1) + huber_c**2)
    return m_sq * (gap * (residual - gap)).flatten(1).sum(1) / distance


def reward_pixels(images: Tensor, mean: Tensor, std: Tensor, *, size: int) -> Tensor:
    """Square images [B, 3, H, H] in [-1, 1] to [B, 3, size, size], normalised; `mean` and `std` are [3, 1, 1]."""
    pixels = ((images.float() + 1) / 2).clamp(0, 1)
    pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return ((pixels - mean) / std).to(images.dtype)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """silu(group_norm(x)) of [B, C, ...]; `weight` and `bias` are [C] in the dtype of `x`."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def geglu(x: Tensor) -> Tensor:
    """a gelu(b) of the halves of [..., 2 D], as diffusers has it."""
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Layer norm of [B, N, D] without parameters, modulated by [B, 1, D] in the dtype of `x`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def gated_residual_norm(
    residual: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """A gated residual of [B, N, D], then the layer norm of the sum, modulated; the modulation is [B, 1, D]."""
    hidden = residual + gate * branch
    return hidden, F.layer_norm(hidden, hidden.shape[-1:], eps=eps) * (1 + scale) + shift


def rms_norm_rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMS norm of [B, T, H, D] in its dtype, then the rotary embedding in float32, as diffusers' FLUX has them."""
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-b, a), dim=-1).flatten(-2)
    return (y.float() * cos[:, None] + rotated.float() * sin[:, None]).to(x.dtype)


def regression_target(prediction_type: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the target that the network is to predict, [B, ...]."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow_prediction":
        return eps - x0
    return _expand(alpha, x0) * eps - _expand(sigma, x0) * x0


def guide(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """Classifier-free guidance in float32."""
    if uncond is None:
        return cond.float()
    return uncond.float() + guidance_scale * (cond.float() - uncond.float())


def _expand(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
