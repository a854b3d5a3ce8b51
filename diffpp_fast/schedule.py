"""The noise process x_t = alpha_t x0 + sigma_t eps on a grid of timesteps, and what the network predicts."""

import warnings
from typing import Any

import torch
from torch import Tensor

from diffpp_fast.kernels.reference.prediction import PREDICTION_TYPES, gap_scale

# A table is called inconsistent with its prediction type beyond this; schedulers keep theirs in float32.
CONSISTENCY_TOLERANCE = 1e-3


class NoiseSchedule:
    """Tables of alpha and sigma over the timesteps 0 .. T - 1.

    Args:
        alphas: [T], the factor of x0, one per timestep.
        sigmas: [T], the factor of the noise.
        prediction_type: what the networks of this schedule predict: "epsilon", "v_prediction" (alpha eps - sigma x0),
            "flow_prediction" (eps - x0) or "sample" (x0).

    The tables are kept in float64 on the CPU (`alphas`, `sigmas`); each device gets one float32 copy when it first
    asks, so a CUDA graph is captured after one ordinary call.

    Raises:
        ValueError: unknown prediction type, or the tables are not two vectors of one length.
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"NoiseSchedule: unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}"
            )
        self.alphas = torch.as_tensor(alphas).detach().to("cpu", torch.float64, copy=True)
        self.sigmas = torch.as_tensor(sigmas).detach().to("cpu", torch.float64, copy=True)
        self.prediction_type = prediction_type
        if self.alphas.dim() != 1 or self.alphas.shape != self.sigmas.shape or len(self.alphas) == 0:
            raise ValueError(
                "NoiseSchedule: alphas and sigmas must be non-empty vectors of one length, "
                f"got shapes {list(self.alphas.shape)} and {list(self.sigmas.shape)}"
            )
        self._warn_if_inconsistent()
        scale = gap_scale(prediction_type, self.alphas, self.sigmas)
        self._tables = {torch.device("cpu"): torch.stack((self.alphas, self.sigmas, scale)).to(torch.float32)}

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule a diffusers scheduler trains with.

        Schedulers with `alphas_cumprod` (DDPM, DDIM, DPM-Solver, Euler, ...) give alpha = sqrt(alphas_cumprod),
        sigma = sqrt(1 - alphas_cumprod) and their `prediction_type`. Flow-matching schedulers (FlowMatchEulerDiscrete
        and its kin, or `prediction_type="flow_prediction"`) give sigma = t / T, alpha = 1 - sigma: the network's
        timestep is T sigma, and the scheduler's `shift` only says which timesteps a sampler visits.

        Raises:
            ValueError: the scheduler has neither form, or a prediction type that is not known.
        """
        config = scheduler.config
        prediction_type = getattr(config, "prediction_type", None)
        products = getattr(scheduler, "alphas_cumprod", None)
        flow_matching = prediction_type is None and products is None and hasattr(config, "shift")
        if prediction_type == "flow_prediction" or flow_matching:
            if getattr(config, "invert_sigmas", False):
                raise ValueError("NoiseSchedule: a flow scheduler with invert_sigmas=True counts noise downwards")
            sigmas = torch.arange(config.num_train_timesteps, dtype=torch.float64) / config.num_train_timesteps
            return cls(1.0 - sigmas, sigmas, "flow_prediction")
        if products is None:
            raise ValueError(
                f"NoiseSchedule: {type(scheduler).__name__} has no alphas_cumprod and is not a flow-matching scheduler"
            )
        products = products.detach().to("cpu", torch.float64)
        return cls(products.sqrt(), (1.0 - products).sqrt(), "epsilon" if prediction_type is None else prediction_type)

    def __len__(self) -> int:
        return len(self.alphas)

    def __repr__(self) -> str:
        return f"NoiseSchedule(T={len(self)}, prediction_type={self.prediction_type!r})"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha [B] and sigma [B], float32 on the device of `t` (int64 [B], in [0, T))."""
        alpha, sigma, _ = self._lookup(t)
        return alpha, sigma

    def gap_scale(self, t: Tensor) -> Tensor:
        """k [B], float32: the x0 implied by output o1 minus that implied by o2 is -k (o1 - o2).

        sigma / alpha for "epsilon" (infinite where alpha is 0), sigma for "v_prediction" and "flow_prediction",
        -1 for "sample".
        """
        return self._lookup(t)[2]

    def _lookup(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.dim() != 1:
            got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"NoiseSchedule: t must be an int64 tensor of shape [B], got {got}")
        # On a GPU the gather asserts the range on the device; reading it here would wait for it.
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and ((t < 0) | (t >= len(self))).any():
            raise ValueError(f"NoiseSchedule: t must be in [0, {len(self)}), got {t.tolist()}")
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        alpha, sigma, scale = self._tables[t.device].index_select(1, t).unbind(0)
        return alpha, sigma, scale

    def _warn_if_inconsistent(self) -> None:
        if self.prediction_type == "v_prediction":
            assumption, total = "alpha^2 + sigma^2 = 1", self.alphas.square() + self.sigmas.square()
        elif self.prediction_type == "flow_prediction":
            assumption, total = "alpha + sigma = 1", self.alphas + self.sigmas
        else:
            return
        if not torch.allclose(total, torch.ones_like(total), rtol=0.0, atol=CONSISTENCY_TOLERANCE):
            warnings.warn(
                f"NoiseSchedule: {self.prediction_type} takes {assumption}, which these tables break",
                stacklevel=3,
            )
