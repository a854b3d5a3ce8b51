"""The noise process x_t = alpha_t x0 + sigma_t eps on a grid of timesteps, and what the network predicts."""

from typing import Any

import torch
from torch import Tensor

from diffpp_fast.prediction import PREDICTION_TYPES, gap_scale

# Schedulers keep their tables in float32, some in products of a thousand factors.
CONSISTENCY_TOLERANCE = 1e-3
ORDER_TOLERANCE = 1e-6
# Where sigma / alpha is larger, the x0 that an epsilon prediction implies is the prediction's error: a millionth of the
# signal's power is left in x_t.
LARGEST_GAP_SCALE = 1e3


class NoiseSchedule:
    """Tables of alpha and sigma over the timesteps 0 .. T - 1.

    Args:
        alphas: [T], the factor of x0, one per timestep; not negative.
        sigmas: [T], the factor of the noise; not negative. sigma / alpha never falls: noise grows with t.
        prediction_type: what the networks of this schedule predict: "epsilon" or "sample" (x0), for any such tables;
            "v_prediction" (alpha eps - sigma x0), which takes alpha^2 + sigma^2 = 1; or "flow_prediction" (eps - x0),
            which takes alpha + sigma = 1.

    The tables are kept in float64 on the CPU (`alphas`, `sigmas`); each device gets one float32 copy when it first
    asks, so a CUDA graph is captured after one ordinary call.

    Raises:
        ValueError: unknown prediction type; the tables are not two vectors of one length, have a number that is
            negative or not finite, or count noise downwards; or they break what the prediction type takes.
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
        self._refuse_no_noise_process()
        self._refuse_inconsistent()
        scale = gap_scale(prediction_type, self.alphas, self.sigmas)
        self._tables = {torch.device("cpu"): torch.stack((self.alphas, self.sigmas, scale)).to(torch.float32)}

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> "NoiseSchedule":
        """Return the schedule that a diffusers scheduler trains with.

        Schedulers with `alphas_cumprod` (DDPM, DDIM, DPM-Solver, Euler, ...) give alpha = sqrt(alphas_cumprod),
        sigma = sqrt(1 - alphas_cumprod) and their `prediction_type`. Flow-matching schedulers (FlowMatchEulerDiscrete
        and its kin, or `prediction_type="flow_prediction"`) give sigma = t / T, alpha = 1 - sigma: the network's
        timestep is T sigma. Betas that are rescaled to a last signal-to-noise ratio of zero are read as such. Settings
        that only say which noise levels a sampler visits and how (`shift`, `use_karras_sigmas`, `timestep_spacing`,
        `solver_order`, ...) change nothing here.

        Raises:
            ValueError: the scheduler has neither form, a prediction type that is not known, tables that do not belong
                to its own timesteps, or settings under which a sampler's noise is not the network's.
        """
        config = scheduler.config
        prediction_type = getattr(config, "prediction_type", None)
        products = getattr(scheduler, "alphas_cumprod", None)
        flow_matching = prediction_type is None and products is None and hasattr(config, "shift")
        if getattr(config, "use_flow_sigmas", False) and prediction_type != "flow_prediction":
            raise ValueError(
                f"NoiseSchedule: {type(scheduler).__name__} has use_flow_sigmas=True and prediction_type "
                f"{prediction_type!r}: noise levels of a flow belong to prediction_type 'flow_prediction'"
            )
        if prediction_type == "flow_prediction" or flow_matching:
            if getattr(config, "invert_sigmas", False):
                raise ValueError("NoiseSchedule: a flow scheduler with invert_sigmas=True counts noise downwards")
            count = getattr(config, "num_train_timesteps", None)
            if count is None:
                raise ValueError(f"NoiseSchedule: {type(scheduler).__name__} has no num_train_timesteps")
            sigmas = torch.arange(count, dtype=torch.float64) / count
            return cls(1.0 - sigmas, sigmas, "flow_prediction")
        if prediction_type == "trigflow":
            raise ValueError(
                f"NoiseSchedule: {type(scheduler).__name__} counts time in angles (TrigFlow, as Sana-Sprint does), and "
                "no generator here is called by them: take scheduler and network of the flow that it was distilled from"
            )
        if products is None:
            raise ValueError(
                f"NoiseSchedule: {type(scheduler).__name__} has no alphas_cumprod and is not a flow-matching scheduler"
            )
        count = getattr(config, "num_train_timesteps", len(products))
        if count != len(products):
            raise ValueError(
                f"NoiseSchedule: {type(scheduler).__name__} has num_train_timesteps={count}, but {len(products)} "
                "alphas_cumprod: make trained_betas as long"
            )
        products = products.detach().to("cpu", torch.float64)
        return cls(products.sqrt(), (1.0 - products).sqrt(), "epsilon" if prediction_type is None else prediction_type)

    def __len__(self) -> int:
        return len(self.alphas)

    def __repr__(self) -> str:
        return f"NoiseSchedule(T={len(self)}, prediction_type={self.prediction_type!r})"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha [B] and sigma [B], float32 on the device of `t` (int64 [B], in [0, T))."""
        alpha, sigma, _ = self.lookup(t)
        return alpha, sigma

    def gap_scale(self, t: Tensor) -> Tensor:
        """k [B], float32: the x0 implied by output o1 minus that implied by o2 is -k (o1 - o2).

        sigma / alpha for "epsilon" (infinite where alpha is 0), sigma for "v_prediction" and "flow_prediction",
        -1 for "sample".
        """
        return self.lookup(t)[2]

    def lookup(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and k [B], those of `coefficients` and `gap_scale`, in one gather."""
        if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.dim() != 1:
            got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"NoiseSchedule: t must be an int64 tensor of shape [B], got {got}")
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        try:
            # It asserts the range: on a CPU here, on a GPU on the device, and reading it first would wait for that.
            found = self._tables[t.device].index_select(1, t)
        except RuntimeError:
            if type(t) is not Tensor or t.device.type != "cpu":
                raise
            raise ValueError(f"NoiseSchedule: t must be in [0, {len(self)}), got {t.tolist()}") from None
        alpha, sigma, scale = found.unbind(0)
        return alpha, sigma, scale

    def _refuse_no_noise_process(self) -> None:
        for name, table in (("alphas", self.alphas), ("sigmas", self.sigmas)):
            # A negated comparison is true of NaN, too.
            bad = (~((table >= 0.0) & table.isfinite())).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"NoiseSchedule: {name} must be finite and not negative, got {float(table[bad[0]])} at t = {bad[0]}"
                )
        empty = ((self.alphas == 0.0) & (self.sigmas == 0.0)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"NoiseSchedule: alpha and sigma are both 0 at t = {empty[0]}")
        # sigma / alpha of neighbours, multiplied out: alpha may be 0.
        rises = self.alphas[:-1] * self.sigmas[1:] - self.alphas[1:] * self.sigmas[:-1]
        falls = (rises < -ORDER_TOLERANCE * self.alphas[:-1] * self.sigmas[1:]).nonzero().flatten().tolist()
        if falls:
            raise ValueError(
                f"NoiseSchedule: sigma / alpha falls from t = {falls[0]} to {falls[0] + 1}: noise must grow with t. "
                "Tables that begin at the most noise are to be reversed"
            )

    def _refuse_inconsistent(self) -> None:
        """Raise ValueError for tables off which a prediction's x0 can't be read (docs/method.md)."""
        if self.prediction_type == "v_prediction":
            assumption, total = "alpha^2 + sigma^2 = 1", self.alphas.square() + self.sigmas.square()
        elif self.prediction_type == "flow_prediction":
            assumption, total = "alpha + sigma = 1", self.alphas + self.sigmas
        else:
            return
        worst = int((total - 1.0).abs().argmax())
        if abs(float(total[worst]) - 1.0) > CONSISTENCY_TOLERANCE:
            raise ValueError(
                f"NoiseSchedule: {self.prediction_type} takes {assumption}, which these tables break: it is "
                f"{float(total[worst]):.4g} at t = {worst}"
            )
