"""The meaning of a network's output, for x_t = alpha x0 + sigma eps.

| prediction type   | target o*              | implied x0 from output o     | k           |
|-------------------|------------------------|------------------------------|-------------|
| "epsilon"         | eps                    | (x_t - sigma o) / alpha      | sigma/alpha |
| "v_prediction"    | alpha eps - sigma x0   | alpha x_t - sigma o          | sigma       |
| "flow_prediction" | eps - x0               | x_t - sigma o                | sigma       |
| "sample"          | x0                     | o                            | -1          |

A difference of outputs o1 - o2 is a difference of implied x0 of -k (o1 - o2), and a difference of scores of
-k alpha / sigma^2 (o1 - o2), since score = (alpha x0 - x_t) / sigma^2. "v_prediction" takes alpha^2 + sigma^2 = 1 and
"flow_prediction" alpha + sigma = 1.
"""

import torch
from torch import Tensor

from diffpp_fast.philox import normal_like
from diffpp_fast.plain import compute_dtype, per_sample

#: Registered operators take the index of one of these.
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction", "sample")
#: mean|r| is of order one; below this the guided prediction is its target, and d has no direction to normalise.
MEAN_ABS_FLOOR = 1e-6


def guide(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """Return uncond + w (cond - uncond) in the compute dtype; cond itself where there is no `uncond`."""
    dtype = compute_dtype(cond)
    if uncond is None:
        return cond.to(dtype)
    return uncond.to(dtype) + guidance_scale * (cond.to(dtype) - uncond.to(dtype))


def regression_target(
    prediction_type: str, x0: Tensor, noise: Tensor, seed: int, stream: int, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Return o* [B, ...] in the compute dtype of `x0`. noise, seed and stream are as in `diffpp_fast.philox`."""
    dtype = compute_dtype(x0)
    if prediction_type == "sample":
        return x0.to(dtype)
    eps = normal_like(noise, seed, stream, x0, dtype)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return per_sample(alpha, x0) * eps - per_sample(sigma, x0) * x0.to(dtype)
    return eps - x0.to(dtype)


def implied(
    prediction_type: str, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return x0 and eps that an output at x_t implies. alpha and sigma are numbers, or broadcast with x_t."""
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    if prediction_type == "flow_prediction":
        return x_t - sigma * output, x_t + alpha * output
    # Without noise in x_t there is none to read off, and none is needed.
    sigma = torch.as_tensor(sigma, dtype=x_t.dtype, device=x_t.device)
    noisy = sigma > 0.0
    return output, ((x_t - alpha * output) / sigma.where(noisy, 1.0)).where(noisy, 0.0)


def target_slope(prediction_type: str, sigma: Tensor) -> Tensor | float:
    """do*/dx0, the same for every element of a sample."""
    if prediction_type == "epsilon":
        return 0.0
    if prediction_type == "v_prediction":
        return -sigma
    if prediction_type == "flow_prediction":
        return -1.0
    return 1.0


def gap_scale(prediction_type: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """k [B]: infinite for "epsilon" where alpha = 0, because x0 can't be read from pure noise."""
    if prediction_type == "epsilon":
        return sigma / alpha
    if prediction_type == "sample":
        return torch.full_like(sigma, -1.0)
    return sigma


def score_scale(prediction_type: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """m [B] = |k| alpha / sigma^2: the size of a score difference per size of an output difference."""
    if prediction_type == "epsilon":
        return 1.0 / sigma
    if prediction_type == "sample":
        return alpha / sigma.square()
    return alpha / sigma
