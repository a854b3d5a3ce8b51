"""Checks of what generators, networks and rewards have given: messages name the role and the remedy."""

from __future__ import annotations

import torch

from diffpp_fast.precision import widen


def check_output(who: str, output: object, like: torch.Tensor) -> torch.Tensor:
    """Return what a network has given, if it is one tensor like another in shape and device, and of real numbers.

    It comes back in float32 at least: what is computed with it, guidance and gap, is not rounded again.

    Raises TypeError for what is no such tensor and ValueError for another shape or device.
    """
    what = f"{who} must give one tensor of shape {tuple(like.shape)}"
    tensor = _floating(what, output)
    if tensor.shape != like.shape:
        raise ValueError(f"{what}, got shape {tuple(tensor.shape)}{_hint(tensor, like)}")
    _same_device(who, tensor, like)
    return widen(tensor)


def check_per_sample(who: str, output: object, like: torch.Tensor) -> torch.Tensor:
    """Return what a reward or a discriminator has given, if it is a tensor [B] of real numbers on the device of `like`.

    Raises as `check_output`.
    """
    what = f"{who} must give one number per sample, a tensor of shape ({len(like)},)"
    tensor = _floating(what, output)
    if tensor.shape != (len(like),):
        flat = tensor.dim() > 1 and tensor.numel() == len(like)
        remedy = ": flatten it" if flat else ": keep the samples apart" if tensor.dim() == 0 else ""
        raise ValueError(f"{what}, got shape {tuple(tensor.shape)}{remedy}")
    _same_device(who, tensor, like)
    return tensor


def check_differentiable(who: str, output: torch.Tensor, by: str) -> None:
    """Raise ValueError where a gradient is going to be asked of an output that has none."""
    if torch.is_grad_enabled() and not output.requires_grad:
        raise ValueError(f"{who} has no gradient by {by}: is it detached, or computed under no_grad?")


def _floating(what: str, output: object) -> torch.Tensor:
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"{what}, got {_describe(output)}")
    if not output.dtype.is_floating_point:
        raise TypeError(f"{what} and of a floating-point dtype, got {output.dtype}")
    return output


def _describe(output: object) -> str:
    kind = type(output).__name__
    if hasattr(output, "sample"):  # diffusers' outputs, which are mappings, too
        return f"{kind}: return its .sample"
    if isinstance(output, tuple | list):
        return f"{kind} of {len(output)}" + (": return its first element" if len(output) else "")
    if kind == "ndarray":
        return "a NumPy array, through which nothing can be differentiated: compute in torch"
    return f"{kind}: did it return nothing?" if output is None else kind


def _hint(tensor: torch.Tensor, like: torch.Tensor) -> str:
    if tensor.dim() == like.dim() > 1 and tensor.shape[1] == 2 * like.shape[1] and tensor.shape[2:] == like.shape[2:]:
        return ": it predicts a variance, too, which is to be cut off"
    return ""


def _same_device(who: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{who} gave a tensor on {tensor.device}, its inputs are on {like.device}")
