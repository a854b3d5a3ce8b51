"""Runs on the tiny pipeline of every family, whole or by LoRA, as one of several processes or alone.

python family_runs.py FOLDER JOBS: each job FAMILY:STAGE:KIND, one after the other; STAGE may be "plain".
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path

import tiny
import tiny_flux
import torch

from diffpp_fast.training import Config, Trainer, load_config
from diffpp_fast.training.distributed import World, leave

#: With the usual eps Adam's first updates are sign(g), which magnifies rounding. No weight decay: a weight that no loss
#: reaches has no gradient in the plain engine, and one of 0 in DeepSpeed's, which decays it.
OPTIMIZER = "{lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, weight_decay: 0.0, clip: 1.0}"
COMMON = [
    *("training.steps=2", "training.global_batch=4", "training.micro_batch=1", "training.checkpoint_every=1"),
    *("training.grid_every=null", "training.baseline_steps=null", "training.keep=9", "training.log_every=1"),
    *(f"optimizers.generator={OPTIMIZER}", f"optimizers.fake={OPTIMIZER}", "ema={decay: 0.5}"),
    *("models.generator.timestep=600", "logging.tensorboard=false"),
]
#: Tokens of a prompt where a chat's would be too many for tiny networks, by family.
LENGTHS = {
    "flux": ["models.text_encoder_2.max_length=24"],
    "flux_2": ["models.text_encoder.max_length=64"],
    "qwen_image": ["models.text_encoder.max_length=64"],
}
KINDS = {
    "whole": (),
    "lora": ("models.generator.lora={rank: 2}", "models.fake.lora={rank: 2}"),
    "bfloat16": ("precision=bfloat16", "training.activation_checkpointing=true"),
    "sid": ("method.name=sid", "rewards.optimised=null", "training.activation_checkpointing=true"),
    "unfused": ("training.fuse=false",),
    "steps": ("models.generator={timestep: null, timesteps: [900, 600], renoise: ddim}",),
}


def write_base(folder: Path, family: str) -> Path:
    """A run on a whole pipeline; returns the configuration's path."""
    return (tiny_flux if family in tiny_flux.LATENTS else tiny).write_base(folder, family)


def load(file: Path, family: str, *overrides: str) -> Config:
    """The configuration of a run of two steps that saves after each."""
    shape = list(tiny_flux.LATENTS.get(family, tiny.LATENT))
    return load_config(file, [f"models.latent_shape={shape}", *LENGTHS.get(family, ()), *COMMON, *overrides])


class Lasting(World):
    """Processes that stay together when a run ends."""

    def close(self) -> None:
        """Leaves the process group alone."""


def work(folder: Path, job: str, world: World) -> None:
    """Train, save, export; then go back to the first checkpoint and go on from there to the same bits."""
    from safetensors.torch import load_file

    family, stage, kind = job.split(":")
    spread = [] if stage == "plain" else [f"distributed={{generator: {{stage: {stage}}}, fake: {{stage: {stage}}}}}"]
    if stage == "3":
        spread.append("distributed.reference=shard")
    config = load(
        folder / family / "align.yaml", family, *KINDS[kind], *spread, f"output={folder / family}/{stage}-{kind}"
    )
    assert Trainer(config, world=world).run().step == 2
    last = Path(config.output) / "checkpoints" / "step_000002"
    kept = Path(config.output) / "whole"
    if world.is_main:
        shutil.move(last, kept)
    world.barrier()
    assert Trainer(config, world=world, resume="latest").run().step == 2
    if world.is_main:
        for file in kept.glob("*.safetensors"):
            one, other = load_file(file), load_file(last / file.name)
            assert all(torch.equal(one[name], other[name]) for name in one), f"{job}: {file.name} resumed to other bits"
    world.barrier()


def main() -> None:
    folder, jobs = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    world = Lasting.join("cpu")
    failed = {}
    for job in jobs:
        try:
            work(folder, job, world)
        except Exception as error:
            traceback.print_exc()
            failed[job] = f"{type(error).__name__}: {error}"
        if world.size > 1 and world.any(job in failed):
            failed.setdefault(job, "in another process")
        print(job, failed.get(job, "done"), flush=True)
    print(json.dumps(failed))
    leave(1 if failed else 0)


if __name__ == "__main__":
    main()
