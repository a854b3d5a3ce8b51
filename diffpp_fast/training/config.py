"""The configuration of a run: the schema, in which every key has its type, its default and its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffpp_fast.methods.diff_instruct import FakeWeighting, Weighting

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "math", "flash", "cudnn", "efficient", "flash_attn", "xformers"]


class Section(BaseModel):
    """What all sections share: unknown keys, other types, NaN and infinity are refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Folder(Section):
    """Where something in diffusers' or transformers' format lies."""

    #: A folder, relative to the configuration file; `package:NAME/sub/folder` inside an installed package; or a hub id
    #: `owner/name`, also with a folder in it, `owner/name/sub/folder`.
    path: str


class TextEncoder(Folder):
    #: Where the tokenizer is; null: with the model.
    tokenizer: str | None = None
    #: Tokens per prompt; longer prompts are cut. null: 120 for PixArt's networks, else 77.
    max_length: Positive | None = None
    #: Networks do not attend to padding. null: false for CLIP, behind which all of Stable Diffusion was trained without
    #: a mask, else true.
    mask_padding: bool | None = None
    #: Of the weights; "auto" is float32.
    dtype: Dtype = "auto"


class Frozen(Folder):
    #: Of the weights and of what is computed with them; "auto" is the run's precision.
    dtype: Dtype = "auto"


class Lora(Section):
    """Low-rank adapters on frozen weights, instead of training all of them."""

    rank: Positive = 64
    #: Updates are alpha / rank B A; null: the rank.
    alpha: Annotated[float, Field(gt=0)] | None = None
    #: The ends of the names of the layers that get one.
    targets: Annotated[list[str], Field(min_length=1)] = ["to_q", "to_k", "to_v", "to_out.0"]


class Generator(Section):
    """The one-step generator's initial weights, and how a single call of them makes a sample."""

    #: A folder as elsewhere, or a `.safetensors` file with all weights of a network like the reference; null: the
    #: reference's weights.
    path: str | None = None
    timestep: NotNegative = 625
    #: The network is fed this times z; "sigma" is the schedule's sigma at `timestep`.
    input_scale: Literal["sigma"] | float = "sigma"
    #: null: all weights are trained.
    lora: Lora | None = None


class Fake(Section):
    """The teaching assistant."""

    #: Its initial weights, as the generator's; null: those of the reference.
    path: str | None = None
    #: null: all weights are trained.
    lora: Lora | None = None


class Decoder(Frozen):
    #: Recompute the decode in the backward pass and keep nothing of it.
    checkpoint: bool = False


class SizeConditions(Section):
    """What Stable Diffusion XL and PixArt at 1024 are told about the picture, in pixels: heights and widths."""

    #: null: the size of the decoded picture.
    original: tuple[Positive, Positive] | None = None
    #: Top and left of the crop.
    crop: tuple[NotNegative, NotNegative] = (0, 0)
    #: null: the size of the decoded picture.
    target: tuple[Positive, Positive] | None = None


class Models(Section):
    #: A whole pipeline in diffusers' format: a folder or hub id with `model_index.json`. What the sections below leave
    #: open is taken from its subfolders, and stands in them once a configuration is loaded.
    base: str | None = None
    text_encoder: TextEncoder
    #: Stable Diffusion XL's second, with the pooled projection.
    text_encoder_2: TextEncoder | None = None
    scheduler: Folder
    #: The frozen diffusion model that is distilled.
    reference: Frozen
    generator: Generator = Generator()
    fake: Fake = Fake()
    #: Latents to images; needed by rewards and by sample grids.
    decoder: Decoder | None = None
    #: What guidance leads away from: the encoded empty prompt, or zeros. "auto" is "zeros" for Stable Diffusion XL,
    #: unless the base says otherwise, and "encoded" for all others.
    empty_prompt: Literal["auto", "encoded", "zeros"] = "auto"
    size_conditions: SizeConditions = SizeConditions()
    #: Channels, height and width of one latent; where it is left open, the reference's.
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
    #: Compute the blocks of generator and fake score again in the backward pass instead of keeping what they compute.
    activation_checkpointing: bool = False
    #: torch.compile for generator, fake score and reference.
    compile: bool = False
    #: Fused blocks in these three.
    fuse: bool = True
    #: The kernel that attends in them; null: PyTorch's choice.
    attention: Attention | None = None


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
