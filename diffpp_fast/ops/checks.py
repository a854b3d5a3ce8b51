"""Checks of operator arguments. They read metadata, and [B] tensors on the CPU; they never wait for a device."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffpp_fast import transforms
from diffpp_fast.arguments import number, shown
from diffpp_fast.noise import Noise
from diffpp_fast.prediction import PREDICTION_TYPES

Argument = TypeVar("Argument", Tensor, Tensor | None)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DENSE = torch.strided


def floating(op: str, tensors: Mapping[str, Tensor | None], optional: Sequence[str] = ()) -> None:
    """Every argument is a dense tensor of a supported dtype, or None if it is optional, and all are on one device."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not (isinstance(tensor, Tensor) and tensor.dtype in DTYPES and tensor.layout is DENSE) or tensor.is_nested:
            raise _not_floating(op, name, tensor)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the tensors before it on {device}")


def _not_floating(op: str, name: str, value: object) -> TypeError:
    if not isinstance(value, Tensor):
        return TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        return TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    return TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def same_shape(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Every argument has the shape of the first, [B, ...]."""
    (first, reference), *rest = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    if reference.dim() == 0:
        raise ValueError(f"{op}: {first} must have shape [B, ...], got a scalar")
    for name, tensor in rest:
        if tensor.shape != reference.shape:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, {first} has {list(reference.shape)}")


def per_sample(op: str, batch: int, tensors: Mapping[str, Tensor | None]) -> None:
    """Every argument has shape [B], and on the CPU its values are finite."""
    shape = (batch,)
    # A tracer's and a transform's tensors have no values, and elsewhere reading one would wait for the device.
    readable = not (torch.compiler.is_compiling() or transforms.functional())
    total = 0.0
    for tensor in tensors.values():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise _not_per_sample(op, shape, tensors)
        if readable and tensor.is_cpu and type(tensor) is Tensor:
            total += sum(tensor.tolist())
    # True of NaN and infinity alone.
    if total - total != 0.0:
        _refuse_not_finite(op, tensors)


def _not_per_sample(op: str, shape: tuple[int], tensors: Mapping[str, Tensor | None]) -> ValueError:
    wrong = ((name, tensor.shape) for name, tensor in tensors.items() if tensor is not None and tensor.shape != shape)
    name, got = next(wrong)
    return ValueError(f"{op}: {name} must have shape [B] = [{shape[0]}], got {list(got)}")


def _refuse_not_finite(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError for the first number that is not finite; there may be none where only the sum is too large."""
    for name, tensor in tensors.items():
        if tensor is None or not tensor.is_cpu:
            continue
        for b, value in enumerate(tensor.tolist()):
            if not math.isfinite(value):
                raise ValueError(f"{op}: {name} must be finite, got {value} for sample {b}")


def elements(op: str, name: str, tensor: Tensor) -> None:
    """A sample has elements, so that its mean is a number."""
    if tensor.numel() == 0 and tensor.shape[1:].numel() == 0:
        raise ValueError(f"{op}: a sample of {name} has no elements, shape {list(tensor.shape)}")


def one_of(op: str, name: str, value: str | None, known: Sequence[str | None]) -> None:
    if not (value is None or isinstance(value, str)):  # the comparison of an array has no truth value
        raise TypeError(f"{op}: {name} must be one of {', '.join(map(str, known))}, got {shown(value)}")
    if value not in known:
        raise ValueError(f"{op}: unknown {name} {value!r}; known: {', '.join(map(str, known))}")


def one_of_numbers(op: str, name: str, value: int, known: Sequence[int]) -> None:
    if type(value) is not int or value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, known))}, got {shown(value)}")


def true_or_false(op: str, name: str, value: bool) -> None:
    """A string such as "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")


def prediction_type(op: str, value: str) -> int:
    """Return the number of a prediction type, by which registered operators know it."""
    one_of(op, "prediction type", value, PREDICTION_TYPES)
    return PREDICTION_TYPES.index(value)


def eps(op: str, value: float) -> float:
    """Return a number that may be added to a variance; 0 is allowed, and makes NaN of equal values."""
    value = number(op, "eps", value)
    if value < 0.0:
        raise ValueError(f"{op}: eps must not be negative, got {value}")
    return value


def address(op: str, noise: Noise | Tensor, like: Tensor) -> tuple[Tensor, int, int]:
    """Return noise as registered operators take it: an address with the batch of `like`, or a tensor of its shape.

    The three values are those of `diffpp_fast.philox`.
    """
    if isinstance(noise, Noise):
        samples = noise.samples
        if samples.device != like.device:
            raise ValueError(f"{op}: noise.samples is on {samples.device}, the data on {like.device}")
        if samples.shape[0] != like.shape[0]:
            raise ValueError(f"{op}: noise has {len(samples)} samples, the batch has {like.shape[0]}")
        return samples, noise.seed_bits, noise.stream
    if not isinstance(noise, Tensor):
        raise TypeError(f"{op}: noise must be a Noise or a tensor, got {type(noise).__name__}")
    if noise.dtype not in DTYPES or noise.layout is not DENSE or noise.is_nested:
        raise _not_floating(op, "noise", noise)
    if noise.device != like.device:
        raise ValueError(f"{op}: noise is on {noise.device}, the tensors before it on {like.device}")
    if noise.shape != like.shape:
        raise ValueError(f"{op}: noise has shape {list(noise.shape)}, x0 has {list(like.shape)}")
    return noise, 0, 0


def promoted(*tensors: Any) -> tuple[Any, ...]:
    """Return the tensors in the dtype in which none loses precision; sample numbers and None as they are."""
    first = None
    for tensor in tensors:
        if tensor is None or tensor.dtype is torch.int64:
            continue
        if first is None:
            first = tensor.dtype
        elif tensor.dtype is not first:
            dtype = common_dtype(*tensors)
            return tuple(cast(each, dtype) for each in tensors)
    return tensors


def common_dtype(*values: Tensor | None) -> torch.dtype:
    """The dtype in which no tensor among `values` loses precision: kernels see one dtype."""
    common = None
    for value in values:
        if isinstance(value, Tensor) and value.dtype is not common:
            common = value.dtype if common is None else torch.promote_types(common, value.dtype)
    assert common is not None
    return common


def target_x0(prediction_type: str, x0: Tensor, like: Tensor) -> Tensor:
    """x0, or `like` where the target holds no x0: then neither its dtype nor a cast nor keeping it costs anything.

    An x0 that autograd may ask about stays, and gets zeros.
    """
    return like.detach() if prediction_type == "epsilon" and not x0.requires_grad else x0


def cast(value: Argument, dtype: torch.dtype) -> Argument:
    """A tensor in `dtype`; sample numbers and None as they are.

    `Tensor.to` alone would do, but costs ten times as much as the comparison, which counts on small latents.
    """
    if not isinstance(value, Tensor) or value.dtype in (dtype, torch.int64):
        return value
    return value.to(dtype)


def guidance(op: str, uncond: Tensor | None, guidance_scale: float) -> float:
    """A guidance scale that has something to guide away from."""
    guidance_scale = number(op, "guidance_scale", guidance_scale)
    if uncond is None and guidance_scale != 1.0:
        raise ValueError(f"{op}: guidance_scale {guidance_scale} needs uncond; without it the scale must be 1")
    return guidance_scale
