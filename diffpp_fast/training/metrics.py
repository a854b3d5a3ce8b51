"""Scalars of the steps between two logs, kept on the device until they are asked for, and brought together from all
processes then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from diffpp_fast.methods.base import finite_statistics
from diffpp_fast.training.distributed import World


class Means:
    """Running weighted means by name. Reading them is the one moment that waits for the device, and with several
    processes the one collective.

    A value that is not finite is left out, with its weight: an update that was skipped must not cost a log all of its
    means. A name without a finite value is NaN.

    NAME_std that comes with NAME_mean is the spread about it, over the same elements: of all that were taken in
    together, however they were cut into parts.
    """

    def __init__(self) -> None:
        # By the names that come together: their values in one tensor, and their weight, for each time that they came.
        self._added: dict[tuple[str, ...], list[tuple[torch.Tensor, float]]] = {}
        # By name: one tensor [samples] per update.
        self._samples: dict[str, list[torch.Tensor]] = {}
        self._with_spread: set[str] = set()

    def add(self, scalars: Mapping[str, torch.Tensor], *, prefix: str, weight: float = 1.0) -> None:
        """Takes in float32 scalars, all on one device."""
        # One launch; everything else waits for the log.
        names = tuple(f"{prefix}/{name}" for name in scalars)
        self._added.setdefault(names, []).append((torch.stack(list(scalars.values())), weight))

    def add_samples(self, name: str, values: torch.Tensor, *, spread: bool = True) -> None:
        """Takes in what an update's samples were each given: `name` is their mean, `name_std` their spread if wanted.

        Args:
            values: [samples of this process], float32, on the scalars' device. The spread is that over all samples of
                the update, whatever process they were on; both are then averaged over the updates. Samples that were
                given nothing finite are left out.
        """
        self._samples.setdefault(name, []).append(values)
        if spread:
            self._with_spread.add(name)

    def take(
        self,
        world: World,
        of_process: Mapping[str, float] | None = None,
        tell: Callable[[str, torch.Tensor], None] | None = None,
    ) -> dict[str, float]:
        """The means since the last taking, over steps and processes (collective).

        Args:
            world: the processes; all must have taken in the same names in the same order.
            of_process: figures of this process, such as its times and its memory. Where there are several processes,
                `name` becomes their mean and `name_max` the largest.
            tell: called with every name of `add_samples` and what all samples were given, [updates, samples] on the
                CPU, in the samples' order.
        """
        means = {names: _weighted_sums(names, added) for names, added in self._added.items()}
        samples, own = self._samples, dict(of_process or {})
        self._added, self._samples = {}, {}
        # Figures that need more than a sum have a row per process, which fills its own alone: the sum gathers them.
        local = [torch.stack(values).flatten() for values in samples.values()]
        local.append(torch.tensor(list(own.values()), dtype=torch.float32, device=world.device))
        rows = torch.zeros(world.size, sum(map(len, local)), device=world.device)
        rows[world.rank] = torch.cat(local)
        summed = [sums.flatten() for sums in means.values()]
        everything = torch.cat([*summed, rows.flatten()])
        if not len(everything):
            return {}
        everything = world.sum(everything)

        taken: dict[str, torch.Tensor] = {}
        *summed_parts, gathered = everything.split([*map(len, summed), rows.numel()])
        for names, part in zip(means, summed_parts, strict=True):
            sums, weights = part.view(2, -1)
            found = dict(zip(names, (sums / weights).unbind(), strict=True))
            taken.update({name: _spread(found, name) for name in found})
        *sample_parts, figures = gathered.view(world.size, -1).split(list(map(len, local)), dim=1)
        for (name, values), part in zip(samples.items(), sample_parts, strict=True):
            updates = part.view(world.size, len(values), -1).transpose(0, 1).flatten(1)
            if tell is not None:
                tell(name, updates.cpu())
            mean, spread = finite_statistics(updates)
            taken[name] = mean.nanmean()
            if name in self._with_spread:
                taken[f"{name}_std"] = spread.nanmean()
        for name, column in zip(own, figures.unbind(1), strict=True):
            taken[name] = column.mean()
            if world.size > 1:
                taken[f"{name}_max"] = column.max()
        return dict(zip(taken, torch.stack(list(taken.values())).tolist(), strict=True))


def _weighted_sums(names: Sequence[str], added: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """[2, names]: of each name the weighted sum of what is finite, and the sum of its weights."""
    values = torch.stack([values for values, _ in added])
    scalars = dict(zip(names, values.unbind(1), strict=True))
    moments = torch.stack([_moment(scalars, name) for name in names], dim=1)
    weights = values.new_tensor([[weight] for _, weight in added])
    finite = moments.isfinite()
    return torch.stack(((weights * moments).where(finite, 0.0).sum(0), (weights * finite).sum(0)))


def _moment(scalars: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The scalar, or of a spread about a mean the second moment, which unlike it can be averaged."""
    mean = scalars.get(_name_of_mean(name))
    return scalars[name] if mean is None else scalars[name].square() + mean.square()


def _spread(moments: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Undoes `_moment` on averages."""
    mean = moments.get(_name_of_mean(name))
    return moments[name] if mean is None else (moments[name] - mean.square()).clamp(min=0.0).sqrt()


def _name_of_mean(name: str) -> str:
    """The name of the mean that a spread is about; none for what is no spread."""
    return f"{name.removesuffix('_std')}_mean" if name.endswith("_std") else ""
