"""Targets as the operators take them that are not yet made of one file; all else is in `diffpp_fast.prediction`."""

from torch import Tensor

from diffpp_fast import prediction
from diffpp_fast.kernels.reference.philox import Address, flat
from diffpp_fast.prediction import PREDICTION_TYPES, gap_scale, score_scale, target_slope

__all__ = ["PREDICTION_TYPES", "gap_scale", "regression_target", "score_scale", "target_slope"]


def regression_target(
    prediction_type: str, x0: Tensor, noise: Tensor | Address, alpha: Tensor, sigma: Tensor
) -> Tensor:
    return prediction.regression_target(prediction_type, x0, *flat(noise), alpha, sigma)
