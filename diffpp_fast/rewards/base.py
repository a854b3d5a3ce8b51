"""The base of every reward: checked input, one pixel pass per preprocessing, scores in float32 at least."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast import ops
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.precision import widen
from diffpp_fast.rewards.text import HeldPrompts
from diffpp_fast.terminal import is_unicode

logger = logging.getLogger(__name__)

#: (images [B, 3, H, W] about [-1, 1], prompts) -> [B]
Scorer = Callable[[Tensor, tuple[str, ...]], Tensor]

#: Mean and standard deviation that OpenAI's CLIP, and all rewards built on CLIP or BLIP, normalise pixels by.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: What PyTorch keeps for the whole process, and whoever comes next computes by: how it is read and set.
_GLOBALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
}


@contextmanager
def undisturbed(name: str) -> Iterator[None]:
    """Put back what code inside changes of PyTorch's settings for the whole process, with a warning that names it.

    The global generator is left as it is: nothing of this package draws from it.
    """
    before = {setting: read() for setting, (read, _) in _GLOBALS.items()}
    try:
        yield
    finally:
        for setting, (read, write) in _GLOBALS.items():
            if read() != before[setting]:
                write(before[setting])
                logger.warning("%s changes PyTorch's %s, which has been put back", name, setting)


@dataclass(frozen=True)
class Preprocessing:
    """The arguments size, mean, std, filter, antialias, fit and clamp of `ops.reward_pixels`.

    Two rewards with equal ones share the result. The defaults of mean and std are CLIP's.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    filter: str = "bicubic"
    antialias: bool = True
    fit: str = "crop"
    clamp: str = "hard"

    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> [B, 3, size, size] in `dtype`."""
        return ops.reward_pixels(images, **vars(self), dtype=dtype)


def per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """Numbers for the channels of images, [1, C, 1, 1], made on their device: a captured step copies nothing there."""
    return torch.cat([images.new_full((1, 1, 1, 1), value) for value in values], 1)


class ImageBatch:
    """A batch of images, and what has been computed from it: rewards that need the same thing share it.

    Args:
        images: [B, 3, H, W], floating-point, in [-1, 1] as a VAE decoder gives them, not clamped.
    """

    def __init__(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor [B, 3, H, W], got {type(images).__name__}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point in [-1, 1], got {images.dtype}; uint8: x / 127.5 - 1")
        if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"images must have shape [B, 3, H, W] with pixels, got {list(images.shape)}")
        self.images = images
        self._known: dict[Hashable, tuple[Tensor, bool]] = {}
        #: Tensors that several rewards may look at, and how often each had been written to when it got here.
        self._shared: list[tuple[Tensor, int]] = []
        self._share(images)

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
        """The images as a network takes them, [B, 3, size, size]."""
        return self.once((preprocessing, dtype), lambda: preprocessing(self.images, dtype))

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` gives, computed at the first call with this `key`.

        A result without a graph is not handed to a caller who needs one.
        """
        known = self._known.get(key)
        if known is None or (torch.is_grad_enabled() and not known[1]):
            known = compute(), torch.is_grad_enabled()
            self._known[key] = known
            self._share(known[0])
        return known[0]

    def refuse_changed(self, name: str) -> None:
        """Raise ConfigurationError where something that rewards share has been written to; `name` is who was last."""
        if any(tensor._version != version for tensor, version in self._shared):
            raise ConfigurationError(
                f"{name} works in place on images or pixels that other rewards look at, too: let it begin with .clone()"
            )

    def _share(self, tensor: Tensor) -> None:
        # Tensors of inference mode don't count who writes to them.
        if not tensor.is_inference():
            self._shared.append((tensor, tensor._version))


class Reward(nn.Module, ABC):
    """A frozen scorer: images [B, 3, H, W] in [-1, 1] and B prompts -> [B], differentiable in the images.

    Scores are float32, or float64 where the reward computes in it.

    A subclass defines `score`, calls `freeze` at the end of its construction, and takes everything that depends on
    the images alone from the batch, so that rewards share it. Surrounding autocast is ignored: a reward computes in
    the dtype that its weights have. An image with NaN gives a NaN score, without waiting for the device;
    `rewards.score` checks.
    """

    #: What messages call it.
    name = "reward"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores [B].

        Raises:
            TypeError: images that are no floating-point tensor, prompts that are no strings.
            ValueError: images of another shape, or another number of prompts.
        """
        batch = ImageBatch(images)
        prompts = check_prompts(prompts, len(batch))
        with torch.autocast(images.device.type, enabled=False):
            return self.score(batch, prompts)

    @abstractmethod
    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        """Return the scores [B] of a checked batch, float32, or float64 of a reward that computes in it."""

    def stages(self, batch: ImageBatch, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        """The scores [B] by what has been done to them, from "raw" to what `score` gives."""
        return {"raw": self.score(batch, prompts)}

    def freeze(self) -> None:
        """No weight wants a gradient, and autograd keeps nothing for one."""
        self.eval().requires_grad_(False)


class CallableReward(Reward):
    """Any (images, prompts) -> [B] as a `Reward`; a module among them is frozen.

    It gets a copy of the images, in which it may work in place, and may keep the tensor that it returns.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        if not callable(scorer):
            raise TypeError(f"a reward must be callable with (images, prompts), got {type(scorer).__name__}")
        self.scorer = scorer
        self.name = getattr(scorer, "__name__", type(scorer).__name__)
        self.freeze()

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        with undisturbed(self.name):
            values: Any = self.scorer(batch.images.clone(), prompts)
        if not isinstance(values, Tensor) or values.shape != (len(batch),):
            got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{self.name} must give one number per image, shape [{len(batch)}], got {got}")
        if values.is_complex():
            raise TypeError(f"{self.name} must give real numbers, got {values.dtype}")
        return widen(values.to(batch.images.device, copy=True))


def as_reward(scorer: Scorer) -> Reward:
    """`scorer` itself, or wrapped if it is no `Reward`."""
    return scorer if isinstance(scorer, Reward) else CallableReward(scorer)


def check_prompts(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """The prompts as a tuple, or as they are held while a step is captured; raises unless they are `count` strings."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of strings, got a single string")
    if not isinstance(prompts, HeldPrompts):
        prompts = tuple(prompts)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"prompts must be strings, got {type(prompt).__name__}")
            if not prompt.isascii() and not is_unicode(prompt):
                raise ValueError(f"prompts must be text, got half of a surrogate pair in {prompt[:60]!r}")
    if len(prompts) != count:
        raise ValueError(f"{count} images need {count} prompts, got {len(prompts)}")
    checked: Any = prompts
    return checked


@torch.no_grad()
def score(scorer: Scorer, images: Tensor, prompts: Sequence[str], *, batch_size: int | None = None) -> Tensor:
    """Scores images for reading: without gradient, in batches, and checked.

    Args:
        scorer: a reward or any (images, prompts) -> [B].
        images: [B, 3, H, W] in [-1, 1]; moved to the reward's device batch by batch.
        prompts: B strings.
        batch_size: images at a time; None: all of them.

    Returns:
        [B] float32 (float64 of a float64 reward), on the device of `images`.

    Raises:
        ValueError: an image or a score is not finite (this waits for the device), or what `Reward.forward` refuses.
    """
    reward = as_reward(scorer)
    prompts = check_prompts(prompts, len(ImageBatch(images)))
    bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} of {len(images)} images are not finite, the first is number {bad[0]}")
    size = batch_size or len(images)
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    weight = next(reward.parameters(), None)
    device = images.device if weight is None else weight.device
    parts = [
        reward(images[start : start + size].to(device), prompts[start : start + size])
        for start in range(0, len(images), size)
    ]
    scores = widen(torch.cat(parts)).to(images.device)
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{reward.name} is not finite for {len(bad)} of {len(images)} images, e.g. {prompts[bad[0]]!r}"
        )
    return scores
