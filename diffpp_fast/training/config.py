"""The configuration of a run: the schema, in which every key has its type, its default and its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffpp_fast.methods.diff_instruct import FakeWeighting, Weighting

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """What all sections share: unknown keys, other types, NaN and infinity are refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Folder(Section):
    """Where something in diffusers' or transformers' format lies."""

    #: A folder, relative to the configuration file; `package:NAME/sub/folder` inside an installed package; or a hub id.
    path: str


class TextEncoder(Folder):
    #: Tokens per prompt; longer prompts are cut.
    max_length: Positive = 77
    #: Networks do not attend to padding. False for those trained without a mask, such as Stable Diffusion 1.5.
    mask_padding: bool = True


class Generator(Folder):
    """The one-step generator's initial weights, and how a single call of them makes a sample."""

    timestep: NotNegative = 625
    #: The network is fed this times z; "sigma" is the schedule's sigma at `timestep`.
    input_scale: Literal["sigma"] | float = "sigma"


class Decoder(Folder):
    #: Recompute the decode in the backward pass and keep nothing of it.
    checkpoint: bool = False


class Models(Section):
    text_encoder: TextEncoder
    scheduler: Folder
    #: The frozen diffusion model that is distilled.
    reference: Folder
    generator: Generator
    #: The teaching assistant's initial weights; null: those of the reference.
    fake: Folder | None = None
    #: Latents to images; needed by rewards and by sample grids.
    decoder: Decoder | None = None
    #: Channels, height and width of one latent.
    latent_shape: tuple[Positive, Positive, Positive]


class Method(Section):
    """Arguments of `diffpp_fast.methods`, where they are explained."""

    name: Literal["diff_instruct", "diff_instruct_pp"]
    guidance_scale: float = 1.0
    weighting: Weighting = "x0"
    t_range: tuple[NotNegative, Positive] | None = None
    fake_rounds: Positive = 1
    fake_weighting: FakeWeighting = "prediction"


class Reward(Section):
    #: `file.py:name` (relative to the configuration file) or `module:name`: called with `arguments`, it gives a scorer
    #: (images [B, 3, H, W] about [-1, 1], prompts: tuple of B strings) -> [B].
    factory: Annotated[str, Field(pattern=r"^.+:[A-Za-z_]\w*$")]
    #: Text that begins with ./ or ../ is a path relative to the configuration file.
    arguments: dict[str, Any] = {}


class OptimisedReward(Reward):
    #: alpha_rew. With 0 the reward is evaluated and logged, without gradient.
    scale: float
    #: The most that a sample's reward gradient may be, in norms of its score gradient; null: it is not clipped.
    clip: Annotated[float, Field(gt=0)] | None = None


class Rewards(Section):
    #: Part of the generator's loss.
    optimised: OptimisedReward | None = None
    #: Evaluated on the grid's samples and logged, never differentiated.
    held_out: Reward | None = None


class Optimizer(Section):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)]
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    #: The largest norm of the whole gradient; null: it is not clipped.
    clip: Annotated[float, Field(gt=0)] | None = None
    #: Updates over which the learning rate rises linearly to `lr`.
    warmup_steps: NotNegative = 0


class Optimizers(Section):
    generator: Optimizer
    fake: Optimizer


class Ema(Section):
    decay: Decay = 0.999
    #: Decay min(decay, (1 + n) / (10 + n)) after n updates, so that the initial weights are forgotten soon.
    warmup: bool = False


class Training(Section):
    #: Updates of the generator.
    steps: Positive
    #: Samples of every update, of the generator and of the fake score.
    global_batch: Positive
    #: Samples that are computed at a time; null: all of them. Changes memory, not results.
    micro_batch: Positive | None = None
    #: Rounds of the fake score before the generator's first step.
    fake_warmup: NotNegative = 0
    log_every: Positive = 10
    #: Steps between sample grids; null: none are drawn.
    grid_every: Positive | None = None
    checkpoint_every: Positive = 500
    #: How many checkpoints stay; the oldest go.
    keep: Positive = 3
    #: The grid's prompts, or how many lines of the prompt file it takes from the top.
    grid_prompts: Positive | Annotated[list[str], Field(min_length=1)] = 16
    #: Threads of the CPU; null: what PyTorch takes by itself.
    threads: Positive | None = None


class Config(Section):
    """A run. `load_config` reads one from YAML; paths in it are absolute by then."""

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    #: Where checkpoints, logs and grids go, relative to the working directory.
    output: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: "bfloat16" computes the networks under autocast; trained weights and their updates stay float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    #: A text file with one prompt per line, relative to the configuration file.
    prompts: str
    models: Models
    method: Method
    rewards: Rewards = Rewards()
    optimizers: Optimizers
    #: Moving average of the generator's weights; null: off.
    ema: Ema | None = Ema()
    training: Training

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        rewards, optimised = self.rewards, self.rewards.optimised
        if self.method.name == "diff_instruct" and optimised is not None:
            raise ValueError("diff_instruct optimises no reward: remove rewards.optimised or use diff_instruct_pp")
        if self.method.name == "diff_instruct_pp" and optimised is None:
            raise ValueError("diff_instruct_pp needs rewards.optimised")
        if self.models.decoder is None and (optimised or rewards.held_out or self.training.grid_every):
            raise ValueError("models.decoder is missing: rewards and sample grids see decoded images")
        if rewards.held_out is not None and self.training.grid_every is None:
            raise ValueError("rewards.held_out is evaluated on the sample grids: set training.grid_every")
        return self
