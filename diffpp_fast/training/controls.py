"""The same run without its reward's gradient, without guidance and without both: what each of them does.

Seed, prompts, latents, times, noise and what is evaluated are the same in all of them, so that a difference between two
is the work of what was switched off. A reward of scale 0 is still evaluated and logged, without gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.training.callbacks import read_sessions
from diffpp_fast.training.checkpoint import Checkpoints
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.prompts import PromptSource
from diffpp_fast.training.state import refuse_other_run

#: In the order of the work and of the report; all but the first by what they leave out.
NAMES = ("full", "no-reward", "no-guidance", "neither")


class Control(NamedTuple):
    """One of the runs: its name, which is that of its folder too, and its configuration."""

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def at(self, folder: Path) -> Control:
        """The same run in another folder."""
        return self._replace(config=self.config.model_copy(update={"output": str(folder)}))


def controls_of(config: Config) -> list[Control]:
    """The runs that a configuration has something to switch off for, itself first.

    Their outputs are folders in the configuration's own.

    Raises ConfigurationError where there is neither a reward nor guidance.
    """
    optimised = config.rewards.optimised
    reward = optimised is not None and optimised.scale != 0.0
    guidance = config.method.guidance_scale != 1.0
    if not reward and not guidance:
        raise ConfigurationError(
            "there is nothing to switch off: rewards.optimised.scale is 0 or missing, and method.guidance_scale is 1. "
            "Controls are of a run that has a reward, guidance or both"
        )
    there = (True, reward, guidance, reward and guidance)
    return [Control(name, _without(config, name)) for name, wanted in zip(NAMES, there, strict=True) if wanted]


def steps_done(folder: Path) -> int | None:
    """The step at which a run's last session ended; None where it did not end, or no run is there."""
    sessions = read_sessions(folder / "environment.json")
    return sessions[-1].get("last_step") if sessions else None


def check_control(control: Control, prompts: PromptSource) -> bool | None:
    """Tell whether this run is complete; None where its folder holds nothing of it yet. Reads files only.

    Raises CheckpointError where the folder holds another run, or none that could be told from another.
    """
    checkpoints = Checkpoints(control.folder / "checkpoints", World.alone("cpu")).paths()
    ended = steps_done(control.folder) == control.config.training.steps
    complete = ended and (control.folder / "generator").is_dir()
    if not checkpoints:
        if complete:
            raise CheckpointError(
                f"{control.folder} is complete, but without its last checkpoint nothing tells of what: move it away, "
                "or choose another output=FOLDER"
            )
        return None
    # A damaged one is the trainer's to pass over.
    if (checkpoints[-1] / "state.json").is_file():
        refuse_other_run(checkpoints[-1], control.config, prompts)
    return complete


def _without(config: Config, name: str) -> Config:
    changes: dict[str, Any] = {"output": str(Path(config.output) / name)}
    if name in ("no-reward", "neither"):
        assert config.rewards.optimised is not None
        optimised = config.rewards.optimised.model_copy(update={"scale": 0.0})
        changes["rewards"] = config.rewards.model_copy(update={"optimised": optimised})
    if name in ("no-guidance", "neither"):
        changes["method"] = config.method.model_copy(update={"guidance_scale": 1.0})
    return config.model_copy(update=changes)
