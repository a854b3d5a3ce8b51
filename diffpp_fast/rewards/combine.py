"""Rewards made of rewards: weighted sums, normalisation, margins."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast.rewards.base import ImageBatch, Reward, Scorer, as_reward, check_prompts


class Transformed(Reward):
    """A reward with something done to its score.

    Args:
        reward: any reward, also one of these, or any (images, prompts) -> [B].
    """

    #: What `stages` calls the result.
    stage = "transformed"

    def __init__(self, reward: Scorer) -> None:
        super().__init__()
        self.reward = as_reward(reward)
        self.name = self.reward.name
        self.freeze()

    @abstractmethod
    def transform(self, scores: Tensor) -> Tensor:
        """Return what becomes of the scores: [B] -> [B]."""

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        return self.transform(self.reward.score(batch, prompts))

    def stages(self, batch: ImageBatch, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        before = self.reward.stages(batch, prompts)
        name = self.stage
        while name in before:
            name += "'"
        return {**before, name: self.transform(list(before.values())[-1])}


class Normalized(Transformed):
    """(r - mean) / std of a `reward` r: puts rewards of different scales side by side.

    Take both numbers from `rewards.score` of the initial generator's samples. They nest, also around callables.

    Raises ValueError unless both are finite and std is positive.
    """

    stage = "normalized"

    def __init__(self, reward: Scorer, mean: float, std: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"mean must be finite and std positive, got {mean} and {std}")
        super().__init__(reward)
        self.mean, self.std = float(mean), float(std)

    def transform(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


class Margin(Transformed):
    """-relu(margin - r) of a `reward` r: a penalty below the `margin`, no gradient above, where more is not wanted.

    There gains tend to be the scorer's errors, at the expense of the other rewards.
    """

    stage = "margin"

    def __init__(self, reward: Scorer, margin: float) -> None:
        if not math.isfinite(margin):
            raise ValueError(f"margin must be finite, got {margin}")
        super().__init__(reward)
        self.margin = float(margin)

    def transform(self, scores: Tensor) -> Tensor:
        return -F.relu(self.margin - scores)


class Mixture(Reward):
    """sum of weight times reward on one decode; equal preprocessings share a pixel pass, a shared CLIP its image tower.

    Args:
        rewards: name -> (reward, weight). Any (images, prompts) -> [B] is a reward. One of weight 0 is evaluated for
            the log, without gradient.

    Raises ValueError where there is no reward, a weight is not finite, or a name is "total" or holds a dot or a slash.
    """

    name = "mixture"

    def __init__(self, rewards: Mapping[str, tuple[Scorer, float]]) -> None:
        super().__init__()
        if not rewards:
            raise ValueError("a mixture needs at least one reward")
        for name, (_, weight) in rewards.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name} must be finite, got {weight}")
            if not name or "." in name or "/" in name or name == "total":
                raise ValueError(f"the name of a reward can't be total, empty or hold a dot or a slash, got {name!r}")
        # A prefix, for a ModuleDict refuses names such as "type" that are attributes of its own.
        self._rewards = nn.ModuleDict({f"reward_{name}": as_reward(reward) for name, (reward, _) in rewards.items()})
        self.weights = {name: float(weight) for name, (_, weight) in rewards.items()}
        self.freeze()

    def __getitem__(self, name: str) -> Reward:
        reward = self._rewards[f"reward_{name}"]
        assert isinstance(reward, Reward)
        return reward

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        return self._components(batch, prompts)["total"]

    def components(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every part of the score, [B] float32 each, differentiable in the images where it counts.

        "total" is the weighted sum; NAME the reward as its scorer reports it; where it is transformed,
        "NAME/normalized" and "NAME/margin" what became of it, the last of which is weighted.
        """
        batch = ImageBatch(images)
        prompts = check_prompts(prompts, len(batch))
        with torch.autocast(images.device.type, enabled=False):
            return self._components(batch, prompts)

    def _components(self, batch: ImageBatch, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        total = torch.zeros(len(batch), device=batch.images.device)
        # Those with gradient first: what the others share with them is there then.
        for name in sorted(self.weights, key=lambda name: self.weights[name] == 0.0):
            weight = self.weights[name]
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0.0):
                stages = self[name].stages(batch, prompts)
            batch.refuse_changed(name)
            for stage, value in stages.items():
                values[name if stage == "raw" else f"{name}/{stage}"] = value
            if weight != 0.0:
                total = total + weight * list(stages.values())[-1]
        values["total"] = total
        return values
