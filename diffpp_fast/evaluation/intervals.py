"""Means with 95 % confidence intervals, of one model and of the difference of two on the same prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
#: How many standard errors an interval reaches to each side: 1.96.
REACH = NormalDist().inv_cdf((1 + LEVEL) / 2)
METHOD = (
    f"mean ± {REACH:.2f} s / sqrt(n), the normal approximation over n prompts: s is the standard deviation (n - 1) of "
    "what each prompt's pictures have on average"
)
PAIRED = "the same of each prompt's difference between the two models, which saw the same prompts and latents"


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        mean: the mean of n independent values; NaN for none.
        std: their standard deviation, with n - 1; NaN for one value or none.
        count: n.
    """

    mean: float
    std: float
    count: int

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval; NaN for one value."""
        return REACH * self.std / math.sqrt(max(self.count, 1))


def estimate(values: np.ndarray) -> Estimate:
    """Return the mean of the finite ones of values [n], one for each prompt, in float64.

    Prompts count as drawn independently from a population, which is what the interval generalises to; the several
    pictures of one prompt don't count as independent, so they are averaged first.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    return Estimate(
        mean=float(values.mean()) if len(values) else math.nan,
        std=float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        count=len(values),
    )


def difference(model: np.ndarray, baseline: np.ndarray) -> Estimate:
    """Return the mean of model - baseline, both [n], for the same n prompts in the same order.

    A prompt's difficulty adds to both and falls out, so that the interval is narrower than those of two separate means
    where the models agree on which prompts are easy.
    """
    return estimate(np.asarray(model, dtype=np.float64) - np.asarray(baseline, dtype=np.float64))


def preferred(model: np.ndarray, baseline: np.ndarray) -> float:
    """Return the share of prompts for which model [n] is above baseline [n]; a tie counts half.

    Prompts count for which both are finite; NaN where there are none.
    """
    both = np.isfinite(model) & np.isfinite(baseline)
    higher = (model[both] > baseline[both]) + 0.5 * (model[both] == baseline[both])
    return float(higher.mean()) if both.any() else math.nan
