"""The configuration of a run: the schema, in which every key has its type, its default and its meaning."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from diffpp_fast.methods import METHODS
from diffpp_fast.methods.dmd import Normalizer
from diffpp_fast.methods.integral_kl import Weighting
from diffpp_fast.methods.method import FakeWeighting
from diffpp_fast.methods.sim import Guidance, ScoreWeighting
from diffpp_fast.networks.few_step import GradientStep, Renoise, refuse_no_steps

#: Sample numbers, and whatever counts, are 64-bit integers.
LIMIT = 2**63
Positive = Annotated[int, Field(gt=0, lt=LIMIT)]
NotNegative = Annotated[int, Field(ge=0, lt=LIMIT)]
#: Far above, OpenMP ends the process without a word.
Threads = Annotated[int, Field(gt=0, le=4096)]
GuidanceEmbedding = Annotated[float, Field(ge=0)] | None
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Variant = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
TimeRange = tuple[NotNegative, Positive]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "math", "flash", "cudnn", "efficient", "flash_attn", "xformers"]


T = TypeVar("T")
#: In a field's metadata: another value makes no other run, so that a checkpoint goes on with it.
MAY_CHANGE = "may change on resume"
MayChange = Annotated[T, MAY_CHANGE]


class Section(BaseModel):
    """The base of all sections: unknown keys, other types, NaN and infinity are refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Prompts(Section):
    """Where a run's prompts come from. In YAML a path alone will do."""

    #: A file, several (`{00..12}`, `*`) or a folder of them, or a Hugging Face dataset on disk; relative to the
    #: configuration file.
    path: str
    #: "auto" goes by the suffix.
    format: Literal["auto", "text", "jsonl", "csv", "parquet", "dataset", "webdataset"] = "auto"
    #: Where in a table, or in a JSON object, the prompt stands; null: "prompt", and in WebDataset the .txt members
    #: where there are any.
    column: Text | None = None
    #: A folder that `diffpp-fast embed` has written; the text encoder isn't loaded then.
    embeddings: str | None = None


class Folder(Section):
    """Where something in diffusers' or transformers' format lies."""

    #: A folder, relative to the configuration file; `package:NAME/sub/folder` inside an installed package; or a hub id
    #: `owner/name`, also with a folder in it, `owner/name/sub/folder`.
    path: Text


class WeightsSection(Folder):
    """A folder that holds weights."""

    #: Which of them: "fp16" are those in `....fp16.safetensors`; null: those without a name. `models.variant` is the
    #: default of the sections that `models.base` fills in.
    variant: Variant | None = None


class TextEncoderSection(WeightsSection):
    #: Where the tokenizer is; null: with the model.
    tokenizer: str | None = None
    #: Tokens per prompt; longer prompts are cut. null: as the family's pipeline has it, 77 where there is none.
    max_length: Positive | None = None
    #: Networks do not attend to padding. null: false for CLIP, behind which all of Stable Diffusion was trained without
    #: a mask, else true. Families that are called in a way of their own have no choice.
    mask_padding: bool | None = None
    #: Of the weights; "auto" is float32.
    dtype: Dtype = "auto"
    #: The weights of its blocks in 8 or 4 bits; null: as `dtype` says.
    quantization: Literal["int8", "nf4", "float8"] | None = None


class Frozen(WeightsSection):
    #: Of the weights and of what is computed with them; "auto" is the run's precision.
    dtype: Dtype = "auto"


class Reference(Frozen):
    #: Its weights in 8 or 4 bits, also for roles that train adapters on them: `diffpp_fast.networks.quantize`. null: as
    #: `dtype` says.
    quantization: Literal["int8", "nf4", "float8"] | None = None
    #: The guidance scale that a network with an embedding of it is told (FLUX.1-dev); null: as the pipeline has it.
    guidance_embedding: GuidanceEmbedding = None


class Lora(Section):
    """Low-rank adapters on frozen weights, instead of training all of them."""

    rank: Positive = 64
    #: Updates are alpha / rank B A; null: the rank.
    alpha: Annotated[float, Field(gt=0)] | None = None
    #: The ends of the names of the layers that get one.
    targets: Annotated[list[str], Field(min_length=1)] = ["to_q", "to_k", "to_v", "to_out.0"]


class InitialLora(Section):
    """A LoRA file that a role begins with, in the names of diffusers, peft, kohya's sd-scripts or ComfyUI."""

    #: A file, or a folder or hub id with one, as elsewhere.
    path: Text
    #: Of its updates, beside their own alpha / rank.
    scale: Annotated[float, Field(gt=0)] = 1.0
    #: Of a file that says none.
    alpha: Annotated[float, Field(gt=0)] | None = None
    #: true: it is the role's adapter, which is trained on; `lora` is then the file's. false: it is merged into the
    #: weights that the role begins as, all of which, or an adapter of their own, are trained.
    keep: bool = False


class Fake(Section):
    """The teaching assistant's initial weights."""

    #: A folder as elsewhere, or a file with all weights of a network like the reference: `.safetensors`, or `.bin` and
    #: the like with tensors alone; null: the reference's weights.
    path: Text | None = None
    #: Which weights of a folder, as elsewhere.
    variant: Variant | None = None
    #: Which state dict of a file that holds several, e.g. "generator_ema"; null: the only one.
    state_dict: Text | None = None
    #: null: all weights are trained.
    lora: Lora | None = None
    #: null: it begins as the weights alone.
    initial_lora: InitialLora | None = None
    #: The guidance scale that a network with an embedding of it is told, as `reference.guidance_embedding`.
    guidance_embedding: GuidanceEmbedding = None


class Generator(Fake):
    """The generator's initial weights, and how one call of them, or a few, make a sample."""

    #: Of the one call; null beside `timesteps`.
    timestep: NotNegative | None = 625
    #: Of up to 8 calls, falling; null: one call, at `timestep`.
    timesteps: list[NotNegative] | None = None
    #: The network is first fed this times z; "sigma" is the schedule's sigma at the first call's time.
    input_scale: Literal["sigma"] | float = "sigma"
    #: What an x0 is noised with for the next call: new noise, or the noise that the prediction implies.
    renoise: Renoise = "fresh"
    #: Which call the losses see the x0 of, and the gradient goes through: one drawn for each sample, or the last.
    gradient_step: GradientStep = "random"

    @model_validator(mode="before")
    @classmethod
    def _timesteps_replace_timestep(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("timesteps") is None:
            return data
        if data.get("timestep") is not None:
            raise ValueError(
                "timestep is the time of one call and timesteps are those of several: leave one of them null"
            )
        return {**data, "timestep": None}

    @model_validator(mode="after")
    def _calls_have_times(self) -> Generator:
        if self.timesteps is not None:
            refuse_no_steps(self.timesteps)
        elif self.timestep is None:
            raise ValueError("timestep is null, and there are no timesteps: give one of them")
        return self

    @property
    def times(self) -> tuple[int, ...]:
        """The times of its calls."""
        return tuple(self.timesteps or ([] if self.timestep is None else [self.timestep]))

    def call(self) -> dict[str, Any]:
        """Return how a sample is made, as arguments of `OneStepGenerator`, or of `FewStepGenerator` for several calls.

        They are keys of this section, too.
        """
        if len(self.times) == 1:
            return {"timestep": self.times[0], "input_scale": self.input_scale}
        return {"timesteps": list(self.times), "input_scale": self.input_scale, "renoise": self.renoise}


class Decoder(Frozen):
    #: Recompute the decode in the backward pass and keep nothing of it.
    checkpoint: MayChange[bool] = False
    #: Decode so many rows of each tensor at a time and keep the blocks' inputs alone; null: whole tensors. For an
    #: `AutoencoderKL`.
    rows: MayChange[Positive | None] = None


class SizeConditions(Section):
    """The sizes that Stable Diffusion XL and PixArt at 1024 are told of, in pixels: heights and widths."""

    #: null: the size of the decoded picture.
    original: tuple[Positive, Positive] | None = None
    #: Top and left of the crop.
    crop: tuple[NotNegative, NotNegative] = (0, 0)
    #: null: the size of the decoded picture.
    target: tuple[Positive, Positive] | None = None


class Models(Section):
    #: A whole pipeline in diffusers' format: a folder or hub id with `model_index.json`. What the sections below leave
    #: open is taken from its subfolders, and stands in them once a configuration is loaded.
    base: MayChange[Text | None] = None
    #: Which weights of the base, e.g. "fp16": the default of the sections that it fills in.
    variant: Variant | None = None
    text_encoder: TextEncoderSection
    #: The second of Stable Diffusion XL and 3, with the pooled projection.
    text_encoder_2: TextEncoderSection | None = None
    #: Stable Diffusion 3's third, T5; null: zeros in its place.
    text_encoder_3: TextEncoderSection | None = None
    scheduler: Folder
    #: The frozen diffusion model that is distilled.
    reference: Reference
    generator: Generator = Generator()
    fake: Fake = Fake()
    #: Latents to images; needed by rewards and by sample grids.
    decoder: Decoder | None = None
    #: What guidance leads away from: the encoded empty prompt, or zeros. "auto" is "zeros" for Stable Diffusion XL,
    #: unless the base says otherwise, and "encoded" for all others.
    empty_prompt: Literal["auto", "encoded", "zeros"] = "auto"
    #: What guidance leads away from in place of the empty prompt, whatever `empty_prompt` says; null: the empty prompt.
    negative_prompt: Text | None = None
    size_conditions: SizeConditions = SizeConditions()
    #: Channels, height and width of one latent; where it is left open, the reference's.
    latent_shape: tuple[Positive, Positive, Positive]

    @model_validator(mode="after")
    def _variant_has_a_base(self) -> Models:
        if self.variant is not None and self.base is None:
            raise ValueError("variant says which weights of base, which is null: give one beside each path")
        return self


class UniformTimes(Section):
    name: Literal["uniform"]


class NormalTimes(Section):
    name: Literal["log_normal", "logit_normal"]
    mean: float
    std: Annotated[float, Field(gt=0)]


class ShiftedTimes(Section):
    name: Literal["shifted"]
    shift: Annotated[float, Field(gt=0)]


#: How often each diffusion time is drawn; `diffpp_fast.methods.times` has the formulas.
TimesSection = Annotated[UniformTimes | NormalTimes | ShiftedTimes, Field(discriminator="name")]


class StartSection(Section):
    """A distance of the generator's samples to those of its initial weights."""

    #: 1 / b^2: weight / 2 |x0 - x0_start|^2 is the KL of both, blurred by noise of standard deviation b.
    weight: Annotated[float, Field(gt=0)]


class ImageSection(Section):
    """A denoising loss of the generator on images with captions."""

    #: A folder with pictures and, beside each, its caption in a .txt file of its name; or .tar archives of such files.
    path: Text
    #: Of the loss, which is in units of x0 and a sum over elements.
    weight: Annotated[float, Field(gt=0)]


class RegularizerSections(Section):
    """Terms of the generator's loss against reward hacking; `diffpp_fast.methods.regularizers` has the formulas."""

    start: StartSection | None = None
    images: ImageSection | None = None


class MethodSection(Section):
    """Arguments that all of `diffpp_fast.methods` take, where they are explained."""

    name: str
    guidance_scale: float = 1.0
    #: How much of the guided output's spread is brought back to that of the output with the prompt.
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    t_range: TimeRange | None = None
    #: null: uniform.
    time_distribution: TimesSection | None = None
    #: Of the fake score's loss; null: those of the generator's.
    fake_t_range: TimeRange | None = None
    fake_time_distribution: TimesSection | None = None
    fake_rounds: Positive = 1
    #: The last of the rounds learns on the samples of the generator's update, after it.
    share_samples: bool = False
    fake_weighting: FakeWeighting = "prediction"
    #: The share of the samples in the fake score's loss that are made and seen without their prompt.
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    regularizers: RegularizerSections | None = None

    @property
    def images(self) -> ImageSection | None:
        """The images that the generator learns on, too."""
        return None if self.regularizers is None else self.regularizers.images

    @property
    def pulled_to_start(self) -> bool:
        """Whether the generator is compared with its initial weights."""
        return self.regularizers is not None and self.regularizers.start is not None

    @property
    def guided(self) -> bool:
        """Whether a network is called without prompt, too."""
        return (self.guidance_scale, self.prompt_dropout) != (1.0, 0.0)


class DiffInstructSection(MethodSection):
    name: Literal["diff_instruct", "diff_instruct_pp"]
    weighting: Weighting = "x0"


class DMD2Section(MethodSection):
    name: Literal["dmd2"]
    fake_rounds: Positive = 5
    normalizer: Normalizer = "sample"


class DecoupledDMDSection(MethodSection):
    name: Literal["decoupled_dmd"]
    fake_rounds: Positive = 5
    #: null: `t_range`.
    guidance_t_range: TimeRange | None = None


class SiDSection(MethodSection):
    name: Literal["sid"]
    sid_alpha: float = 1.0
    fake_guidance_scale: float = 1.0

    @property
    def guided(self) -> bool:
        return super().guided or self.fake_guidance_scale != 1.0


class ScoreSection(MethodSection):
    """Arguments of the methods that compare scores by a pseudo-Huber distance."""

    weighting: ScoreWeighting = "x0"
    huber_c: Annotated[float, Field(gt=0)] = 1.0


class SIMSection(ScoreSection):
    name: Literal["sim"]


class DiffInstructStarSection(ScoreSection):
    name: Literal["diff_instruct_star"]
    guidance: Guidance = "inside"


class DIDRSection(MethodSection):
    name: Literal["didr"]
    weighting: Weighting = "x0"
    #: The weight of the KL against the reward; the smaller, the stronger the reward.
    beta: Annotated[float, Field(gt=0)] = 1.0
    #: Calls of the reference that make the sample which the reward judges.
    denoising_steps: Positive = 1


AnyMethod = (
    DiffInstructSection
    | DMD2Section
    | DecoupledDMDSection
    | SiDSection
    | SIMSection
    | DiffInstructStarSection
    | DIDRSection
)


class RewardSection(Section):
    #: `file.py:name` (relative to the configuration file) or `module:name`: called with `arguments`, it gives a scorer
    #: (images [B, 3, H, W] about [-1, 1], prompts: tuple of B strings) -> [B].
    factory: Annotated[str, Field(pattern=r"^.+:[A-Za-z_]\w*$")]
    #: Text that begins with ./ or ../ is a path relative to the configuration file.
    arguments: dict[str, Any] = {}


class RampSection(Section):
    """From one factor to another, evenly or along half a cosine."""

    name: Literal["linear", "cosine"]
    #: Updates of the generator until `end`, which stays.
    steps: Positive
    start: Annotated[float, Field(ge=0)] = 0.0
    end: Annotated[float, Field(ge=0)] = 1.0


class PiecewiseSection(Section):
    name: Literal["piecewise"]
    #: Updates of the generator, growing, and the factor at each; linear in between, constant outside.
    points: Annotated[list[tuple[NotNegative, Annotated[float, Field(ge=0)]]], Field(min_length=1)]

    @model_validator(mode="after")
    def _points_grow(self) -> PiecewiseSection:
        steps = [step for step, _ in self.points]
        if any(later <= step for step, later in itertools.pairwise(steps)):
            raise ValueError(f"points must be of growing steps, got {steps}")
        return self


#: What the reward's scale is multiplied by in each update of the generator.
ScheduleSection = Annotated[RampSection | PiecewiseSection, Field(discriminator="name")]


class OptimisedReward(RewardSection):
    #: alpha_rew. With 0 the reward is evaluated and logged, without gradient.
    scale: float
    #: null: the scale is constant.
    schedule: ScheduleSection | None = None
    #: The most that a sample's reward gradient may be, in norms of its score gradient; null: it is not clipped.
    clip: Annotated[float, Field(gt=0)] | None = None


class Rewards(Section):
    #: Part of the generator's loss.
    optimised: OptimisedReward | None = None
    #: Evaluated on the grid's samples and logged, never differentiated.
    held_out: MayChange[RewardSection | None] = None


OptimizerName = Literal["adamw", "adamw_fused", "adamw8bit", "paged_adamw8bit", "lion8bit"]


class Optimizer(Section):
    """How one network's weights follow its gradient."""

    #: AdamW in one kernel, under two names; those with 8 bits are bitsandbytes' and keep a quarter of the state.
    name: OptimizerName = "adamw"
    lr: Annotated[float, Field(gt=0)]
    #: Of AdamW: decay of the mean and of the mean square, 0.9 and 0.999. Of Lion: the weight of the kept mean in the
    #: update, and the decay of that mean, 0.9 and 0.99. null: these.
    betas: tuple[Decay, Decay] | None = None
    #: Of AdamW; null: 1e-8.
    eps: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    #: The largest norm of the whole gradient; null: it is not clipped. The generator's is that of a sum over elements.
    clip: Annotated[float, Field(gt=0)] | None = None
    #: Divide the whole gradient by its norm in every update; norms below 2^-20 count as that.
    normalize: bool = False
    #: Updates over which the learning rate rises linearly to `lr`.
    warmup_steps: NotNegative = 0
    #: What the learning rate does from there to the run's last update.
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    #: Where it ends, as a share of `lr`.
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def is_8bit(self) -> bool:
        return self.name.endswith("8bit")

    @model_validator(mode="after")
    def _keys_fit(self) -> Optimizer:
        if self.schedule == "constant" and self.final_lr != 0.0:
            raise ValueError("final_lr belongs to the schedules linear and cosine: remove it or choose one of them")
        if self.normalize and self.clip is not None:
            raise ValueError(
                "normalize makes the norm of every gradient 1, which leaves clip nothing to do: remove one"
            )
        if self.name == "lion8bit" and self.eps is not None:
            raise ValueError("lion8bit divides by nothing and takes no eps: remove it")
        if self.name == "lion8bit" and self.betas is not None and self.betas[0] == 0.0:
            raise ValueError(
                "betas[0] is 0: Lion would follow the gradient's sign alone and never use the mean that it keeps. "
                "Its betas don't mean what AdamW's do: leave them out for 0.9 and 0.99"
            )
        return self


class Optimizers(Section):
    generator: Optimizer
    fake: Optimizer


class Zero(Section):
    """How one trained network is spread over the processes: ZeRO (arXiv 1910.02054)."""

    #: 0: every process keeps everything; 1: the optimizer's state is spread; 2: gradients, too; 3: weights, too.
    stage: Literal[0, 1, 2, 3] = 2
    #: Where this process's part of the float32 weights and the optimizer's state lies, and where it is updated.
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    #: Where this process's part of the weights lies between uses.
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    #: Gradients that are reduced at a time, in elements.
    reduce_bucket_size: Positive = 50_000_000
    #: Weights that are gathered at a time after an update, in elements; stages 1 and 2.
    allgather_bucket_size: Positive = 200_000_000
    #: Weights that are gathered ahead of their use, in elements; stage 3.
    prefetch_bucket_size: Positive = 50_000_000
    #: Communicate while computing.
    overlap: bool = True

    @property
    def offloads(self) -> bool:
        return (self.offload_optimizer, self.offload_parameters) != ("none", "none")

    @model_validator(mode="after")
    def _stage_serves(self) -> Zero:
        if self.stage == 0 and self.offloads:
            raise ValueError("stage 0 keeps everything on the device: offloading needs stage 1, 2 or 3")
        if self.stage < 3 and self.offload_parameters != "none":
            raise ValueError(f"offload_parameters needs stage 3: stage {self.stage} computes with whole weights")
        if self.stage < 3 and self.offload_optimizer == "nvme":
            raise ValueError("offload_optimizer: nvme needs stage 3: use cpu, or stage 3")
        return self


class Distributed(Section):
    """Which engine updates the networks, and how they are spread over several processes."""

    #: plain is one process; deepspeed is any number; auto is the first that does what this section asks for.
    engine: Literal["auto", "plain", "deepspeed"] = "auto"
    generator: Zero = Zero()
    fake: Zero = Zero()
    #: The frozen model: a copy in every process, a part in each, or a part in each process's host memory.
    reference: Literal["replica", "shard", "offload"] = "replica"
    #: A folder on a fast local disk, for what is offloaded to nvme.
    nvme_path: str | None = None
    #: Seconds without a sign of life after which a process counts as gone, and the others end with exit code 75; null:
    #: they wait for it for an hour.
    peer_timeout: Annotated[float, Field(ge=1, le=1e6)] | None = 120.0

    @property
    def needs_deepspeed(self) -> bool:
        """Whether something is asked for that the plain engine does not do."""
        return self.reference != "replica" or self.generator.offloads or self.fake.offloads

    @model_validator(mode="after")
    def _engine_serves(self) -> Distributed:
        if self.engine == "plain" and self.needs_deepspeed:
            raise ValueError("the plain engine offloads nothing and spreads no reference: use distributed.engine=auto")
        wants_nvme = any(
            "nvme" in (zero.offload_optimizer, zero.offload_parameters) for zero in (self.generator, self.fake)
        )
        if wants_nvme and self.nvme_path is None:
            raise ValueError("nvme_path is missing: say where to put what is offloaded to nvme")
        return self


class EmaSection(Section):
    decay: Decay = 0.999
    #: Decay min(decay, (1 + n) / (10 + n)) after n updates, so that the initial weights are forgotten soon.
    warmup: bool = False


class KeepBest(Section):
    """Which checkpoints stay besides the newest ones: the best by a scalar of the log."""

    #: Its last value at or before a checkpoint's step is the checkpoint's score.
    metric: Text
    mode: Literal["max", "min"] = "max"
    #: How many.
    count: Positive = 1


class Training(Section):
    #: Updates of the generator.
    steps: MayChange[Positive]
    #: Samples of every update, of the generator and of the fake score.
    global_batch: Positive
    #: Samples that are computed at a time; null: all of them. Changes memory, not results.
    micro_batch: MayChange[Positive | None] = None
    #: Rounds of the fake score before the generator's first step.
    fake_warmup: NotNegative = 0
    log_every: MayChange[Positive] = 10
    #: Steps between sample grids; null: none are drawn.
    grid_every: MayChange[Positive | None] = None
    checkpoint_every: MayChange[Positive] = 500
    #: How many checkpoints stay; the oldest go.
    keep: MayChange[Positive] = 3
    #: Checkpoints that stay although they are old; null: none.
    keep_best: MayChange[KeepBest | None] = None
    #: The grid's prompts, or how many lines of the prompt file it takes from the top.
    grid_prompts: MayChange[Positive | Annotated[list[str], Field(min_length=1)]] = 16
    #: Updates in a row that may be skipped because the gradient is not finite; more of them end the run.
    skip_limit: MayChange[NotNegative] = 10
    #: Threads of the CPU; null: what PyTorch takes by itself.
    threads: MayChange[Threads | None] = None
    #: Compute the blocks of generator and fake score again in the backward pass instead of keeping what they compute.
    activation_checkpointing: MayChange[bool] = False
    #: torch.compile for generator, fake score and reference: of the whole networks, or ("regional", and true) of the
    #: blocks that they have many of.
    compile: MayChange[bool | Literal["regional", "whole"]] = False
    #: CUDA graphs of the losses and gradients of both updates, recorded before the first step.
    capture: MayChange[bool] = False
    #: The reference's passes with the prompt and without are one call, with the fake score's where both have the same
    #: weights; null: where the call is small.
    batched_passes: MayChange[bool | None] = None
    #: Fused blocks in these three.
    fuse: MayChange[bool] = True
    #: The kernel that attends in them; null: PyTorch's choice.
    attention: MayChange[Attention | None] = None
    #: Steps in which the reference draws the grid's samples once, whose mean and spread are what to expect of latents;
    #: null: it does not, and the run is compared with its own start.
    baseline_steps: MayChange[Positive | None] = 20


class WandBSection(Section):
    """Weights & Biases."""

    project: Text
    #: Of the run; null: W&B invents one.
    name: str | None = None
    #: Runs that belong together.
    group: str | None = None
    #: "offline" writes to disk only; `wandb sync` uploads it later.
    mode: Literal["online", "offline"] = "online"


class Logging(Section):
    """Where scalars, grids and warnings go, besides metrics.jsonl and the terminal."""

    tensorboard: bool = True
    wandb: WandBSection | None = None


class Config(Section):
    """A run. `load_config` reads one from YAML; paths in it are absolute by then."""

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    #: Where checkpoints, logs and grids go, relative to the working directory.
    output: MayChange[str]
    device: MayChange[Literal["auto", "cpu", "cuda"]] = "auto"
    #: "bfloat16" computes the networks under autocast; what is updated stays float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    #: Their text may not change on resume, wherever it is read from.
    prompts: MayChange[Prompts]
    models: Models
    method: Annotated[AnyMethod, Field(discriminator="name")]
    rewards: Rewards = Rewards()
    optimizers: Optimizers
    distributed: MayChange[Distributed] = Distributed()
    #: Moving average of the generator's weights; null: off.
    ema: EmaSection | None = EmaSection()
    training: Training
    logging: MayChange[Logging] = Logging()

    @field_validator("precision", mode="before")
    @classmethod
    def _range_serves(cls, value: Any) -> Any:
        if value == "float16":
            raise ValueError(
                "precision float16 is not offered: its numbers end at 65504, where T5 and SDXL's decoder overflow, and "
                "its gradients need a loss scale, which skips an update whenever it proves too high. Use bfloat16, "
                "which has the range of float32, or float32"
            )
        return value

    @model_validator(mode="after")
    def _samples_have_numbers(self) -> Config:
        training = self.training
        updates = training.fake_warmup + training.steps * (self.method.fake_rounds + 1)
        if updates * training.global_batch >= LIMIT:
            raise ValueError(
                f"training.steps, training.fake_warmup and training.global_batch ask for {updates} updates of "
                f"{training.global_batch} samples: a run has numbers for 2^63 samples"
            )
        return self

    @model_validator(mode="after")
    def _optimizers_fit(self) -> Config:
        for role in ("generator", "fake"):
            optimizer, zero = getattr(self.optimizers, role), getattr(self.distributed, role)
            if optimizer.is_8bit and zero.offload_optimizer != "none":
                raise ValueError(
                    f"optimizers.{role}.name is {optimizer.name}, which updates on the GPU: use adamw with "
                    f"distributed.{role}.offload_optimizer, or keep the 8-bit state on the GPU"
                )
        return self

    @model_validator(mode="after")
    def _quantization_serves(self) -> Config:
        reference = self.models.reference
        key = f"models.reference.quantization is {reference.quantization}"
        if reference.quantization is None:
            return self
        if self.distributed.reference != "replica":
            raise ValueError(
                f"{key}, but distributed.reference={self.distributed.reference} cuts weights that it could not put "
                "together again: use distributed.reference=replica, or quantization=null"
            )
        if reference.quantization == "float8" and reference.dtype == "float16":
            raise ValueError(
                f"{key}, whose sums overflow in float16: use models.reference.dtype=bfloat16 or float32, or int8"
            )
        return self

    @model_validator(mode="after")
    def _networks_differentiate(self) -> Config:
        """Refuse what the methods that differentiate through fake score or reference can't do."""
        name, distributed = self.method.name, self.distributed
        differentiates = METHODS[name].differentiates
        if not differentiates:
            return self
        roles = {"fake": "the fake score", "reference": "the reference"}
        through = f"{name} differentiates through {' and '.join(roles[role] for role in differentiates)}"
        if "fake" in differentiates and distributed.engine != "plain" and distributed.fake.stage == 3:
            raise ValueError(
                f"{through}, whose weights stage 3 gathers for the engine's own backward pass only: use "
                "distributed.fake.stage=2"
            )
        if distributed.reference != "replica":
            raise ValueError(
                f"{through}, which {distributed.reference} spreads for calls without gradient: use "
                "distributed.reference=replica"
            )
        # The reference is the network with adapters off, as it is outside of a role.
        if "fake" in differentiates and self.training.activation_checkpointing and self.models.fake.lora is not None:
            raise ValueError(
                f"{through}: with training.activation_checkpointing blocks would be computed again with the adapter "
                "of another role. Turn it off, or train all of the fake score with models.fake.lora=null"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        rewards, optimised = self.rewards, self.rewards.optimised
        name, takes_reward = self.method.name, METHODS[self.method.name].takes_reward
        if not takes_reward and optimised is not None:
            rewarded = " or ".join(name for name, method in METHODS.items() if method.takes_reward)
            raise ValueError(f"{name} optimises no reward: remove rewards.optimised or use {rewarded}")
        if takes_reward and optimised is None:
            raise ValueError(f"{name} needs rewards.optimised")
        if self.models.decoder is None and (optimised or rewards.held_out or self.training.grid_every):
            raise ValueError("models.decoder is missing: rewards and sample grids see decoded images")
        if self.method.images is not None and self.models.decoder is None:
            raise ValueError("models.decoder is missing: method.regularizers.images are encoded by its autoencoder")
        if self.method.images is not None and self.training.capture:
            raise ValueError(
                "training.capture records no images: use training.capture=false, or method.regularizers.images=null"
            )
        if self.method.images is not None and len(self.models.generator.times) > 1:
            raise ValueError(
                "method.regularizers.images are denoised by a single call at the generator's time: use one of "
                "models.generator.timesteps, or method.regularizers.images=null"
            )
        initial = self.models.generator.initial_lora
        if self.method.pulled_to_start and initial is not None and initial.keep:
            raise ValueError(
                "method.regularizers.start needs the initial generator beside the trained one, whose adapter "
                "initial_lora keeps and changes: merge it by models.generator.initial_lora.keep=false"
            )
        if rewards.held_out is not None and self.training.grid_every is None:
            raise ValueError("rewards.held_out is evaluated on the sample grids: set training.grid_every")
        metric = "" if self.training.keep_best is None else self.training.keep_best.metric
        if metric.startswith("grid/") and self.training.grid_every is None:
            raise ValueError(f"training.keep_best: {metric} is measured on the sample grids: set training.grid_every")
        if metric == "grid/held_out" and rewards.held_out is None:
            raise ValueError("training.keep_best: grid/held_out needs rewards.held_out")
        if metric == "grid/reward" and optimised is None:
            raise ValueError("training.keep_best: grid/reward needs rewards.optimised")
        return self
