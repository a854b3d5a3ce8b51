"""Which scalars are drawn together, and what is to be known to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffpp_fast.report.runs import RunRecord, Warned
from diffpp_fast.training.watch import standard_rules

#: Of a mixture's parts, in the log.
PART = "generator/reward/"


class Panel(NamedTuple):
    """One diagram.

    Attributes:
        title, unit: of the diagram and its vertical axis.
        scalars: what is drawn, and what each is called where there are several.
        note: how to read it.
        reference: a constant of each run to compare with.
    """

    title: str
    unit: str
    scalars: Mapping[str, str]
    note: str
    reference: str | None = None


REWARD = (
    Panel("Optimised reward, sample grid", "reward", {"grid/reward": ""}, "Averaged weights, always the same latents."),
    Panel(
        "Held-out reward, sample grid",
        "reward",
        {"grid/held_out": ""},
        "Never optimised. It should rise with the optimised one.",
    ),
    Panel("Optimised reward, training samples", "reward", {"generator/reward": ""}, "Mean over an update's samples."),
    Panel(
        "Spread of the reward",
        "standard deviation",
        {"generator/reward_std": ""},
        "Over an update's samples. Towards 0: all alike, or a saturated reward.",
    ),
)
DIVERGENCE = (
    Panel(
        "Score gap",
        "root mean square",
        {"generator/score_gap": ""},
        "Guided reference against the teaching assistant. It should settle.",
    ),
    Panel(
        "Loss of the teaching assistant",
        "weighted mean square",
        {"fake/loss": ""},
        "On the generator's samples. Falling to 0: they have collapsed.",
    ),
    Panel(
        "Loss of the generator",
        "half squared norm",
        {"generator/loss": ""},
        "Of the gradient on the sample: a size, not an objective.",
    ),
    Panel(
        "Gradient on the sample",
        "norm per sample",
        {"generator/score_gradient_norm": "score", "generator/reward_gradient_norm": "reward"},
        "Before any clipping, the reward's with its scale.",
    ),
    Panel(
        "Score against reward",
        "cosine",
        {"generator/gradient_cosine": ""},
        "Of the two parts of that gradient. Negative: they oppose each other.",
    ),
    Panel("Shortened rewards", "share of samples", {"generator/reward_clipped": ""}, "By rewards.optimised.clip."),
    Panel("Gradient of the generator", "norm", {"generator/gradient_norm": ""}, "Of all its weights, before clipping."),
    Panel(
        "Gradient of the teaching assistant",
        "norm",
        {"fake/gradient_norm": ""},
        "Of all its weights, before clipping.",
    ),
    Panel(
        "Latent mean",
        "latent",
        {"generator/x0_mean": ""},
        "Of the generator's samples; dashed: the reference's own.",
        "reference/x0_mean",
    ),
    Panel(
        "Latent spread",
        "standard deviation",
        {"generator/x0_std": ""},
        "Of the generator's samples; dashed: the reference's own.",
        "reference/x0_std",
    ),
    Panel(
        "Skipped updates",
        "share of updates",
        {"generator/updates_skipped": "generator", "fake/updates_skipped": "teaching assistant"},
        "Their gradient was not finite, and they changed nothing.",
    ),
)


def reward_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Those of the rewards of which there is anything to draw; each part of a mixture has its own."""
    parts = sorted({name for run in runs for name in run.scalars if name.startswith(PART)})
    own = [
        Panel(f"Part {name.removeprefix(PART)}", "reward", {name: ""}, "Of the mixture that is optimised.")
        for name in parts
    ]
    return _present([*REWARD, *own], runs)


def divergence_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Those of divergence from the reference of which there is anything to draw."""
    panels = _present(DIVERGENCE, runs)
    skipped = any(any(run.scalars[name].values) for run in runs for name in run.scalars if "updates_skipped" in name)
    return [panel for panel in panels if skipped or panel.title != "Skipped updates"]


def concerns(panel: Panel, warned: Warned) -> bool:
    """Whether a warning was raised for what is drawn; one that is unknown concerns every panel."""
    read = {scalar for rule in standard_rules() if rule.name == warned.name for scalar in rule.reads}
    return not read or bool(read & panel.scalars.keys())


def _present(panels: Sequence[Panel], runs: Sequence[RunRecord]) -> list[Panel]:
    return [panel for panel in panels if any(panel.scalars.keys() & run.scalars.keys() for run in runs)]
