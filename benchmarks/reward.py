"""`python -m benchmarks reward`: the reward path, phase by phase: latents -> images -> pixels -> rewards,
and the gradient back to the latents.

The networks have their true architecture, or a scaled-down one, and random weights: neither time nor memory depends on
their values. Times are those of the phases one after another, each with its own graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import backends, baselines, tables
from benchmarks.cases import check_known
from benchmarks.gate import TOLERANCE, compiler, first_line
from benchmarks.memory import kept_bytes, peak_temporary_bytes
from benchmarks.tables import Outcome, Place, Table, dtype_name, figure, milliseconds, ratio, shown, threads_name
from benchmarks.timing import Clock, Provenance, Timing, clock_of, setting, turns, wall_clock
from diffpp_fast import ops
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import FrozenDecoder
from diffpp_fast.selftest import PIXEL_MEAN, PIXEL_STD

PHASES = ("decode", "pixels", "reward", "reward backward", "pixels adjoint", "decode backward")
WHOLE = "whole"
WARM_UPS = 1
#: Of a slice of `fused-rows`.
ROWS = 32


class Decoder(NamedTuple):
    """An autoencoder's decoder and the sizes that go with it."""

    channels: tuple[int, ...]
    layers: int
    latent: int  # side of the latents
    scaling_factor: float
    batch: int


class Tower(NamedTuple):
    """A CLIP vision tower."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    patch: int
    size: int  # of its images


MODELS = {
    "tiny": Decoder((32, 32), 1, 8, 0.18215, 1),
    "small": Decoder((32, 64, 128, 128), 2, 32, 0.18215, 1),
    "emoji": Decoder((32, 64, 64), 1, 16, 1.0, 16),
    "sd15": Decoder((128, 256, 512, 512), 2, 64, 0.18215, 4),
    "sdxl": Decoder((128, 256, 512, 512), 2, 128, 0.13025, 2),
}
#: By the type of the device. ViT-H/14 is that of HPSv2 and PickScore.
TOWERS = {
    "cuda": Tower("ViT-H/14", 1280, 5120, 32, 16, 14, 224),
    "cpu": Tower("ViT-S/32, 4 layers", 384, 1536, 4, 6, 32, 224),
}


class RewardPath(NamedTuple):
    """The three parts of a reward path, each differentiable in its tensor."""

    decode: Callable[[Tensor], Tensor]  # latents -> images
    pixels: Callable[[Tensor], Tensor]  # images -> the tower's input
    reward: Callable[[Tensor], Tensor]  # -> [B]


@dataclass(frozen=True)
class NetworkPlan:
    """The path or step to measure. `batch` None fills the memory."""

    model: str
    batch: int | None
    latent: int
    dtype: torch.dtype
    device: torch.device
    names: Sequence[str]  # of the providers
    rounds: int
    lora: int | None = None  # the rank of a step's adapters; None: all weights are trained


@dataclass(frozen=True)
class PathOutcome(Outcome):
    """One provider. `kept` is by forward phase, in bytes; `kept_whole` at the model's own size, for one image."""

    timings: dict[str, Timing] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    kept_whole: int | None = None
    peak: int | None = None


class PathNetworks:
    """The autoencoder and the tower at random weights, and the latents. The tower is that of the device, or another."""

    def __init__(self, plan: NetworkPlan, tower: Tower | None = None) -> None:
        model, self.tower = MODELS[plan.model], tower or TOWERS[plan.device.type]
        with torch.random.fork_rng(), torch.device(plan.device), default_dtype(plan.dtype):
            torch.manual_seed(0)
            self.vae = _autoencoder(model)
            self.vision = _vision(self.tower)
            self.latents = torch.randn(plan.batch or 1, 4, plan.latent, plan.latent)
        self.networks = [self.vae, self.vision]

    def cast(self, dtype: torch.dtype) -> PathNetworks:
        """A copy whose numbers are the same."""
        other = copy.deepcopy(self)
        for network in other.networks:
            nn.Module.to(network, dtype)  # diffusers' own warns of what it does not do here
        other.latents = self.latents.to(dtype)
        return other

    def reward(self, pixels: Tensor) -> Tensor:
        """The mean square of the tower's embedding, [B] float32. Nothing cancels in it, so that its error tells."""
        embedding: Tensor = self.vision(pixel_values=pixels).image_embeds
        return embedding.float().square().mean(1)


def eager(networks: PathNetworks) -> RewardPath:
    vae, size = networks.vae, networks.tower.size
    mean, std = (networks.latents.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    scale = float(vae.config.scaling_factor)
    return RewardPath(
        lambda latents: vae.decode(latents / scale, return_dict=False)[0],
        lambda images: baselines.reward_pixels(images, mean, std, size=size),
        networks.reward,
    )


def eager_checkpoint(networks: PathNetworks) -> RewardPath:
    """diffusers' own gradient checkpointing: it recomputes the middle block and every up block."""
    path, vae = eager(networks), networks.vae

    def decode(latents: Tensor) -> Tensor:
        vae.enable_gradient_checkpointing()
        try:
            return path.decode(latents)
        finally:
            vae.disable_gradient_checkpointing()

    return path._replace(decode=decode)


def fused(networks: PathNetworks, **options: Any) -> RewardPath:
    size = networks.tower.size
    return RewardPath(
        FrozenDecoder(networks.vae, **options),
        lambda images: ops.reward_pixels(images, size, mean=PIXEL_MEAN, std=PIXEL_STD),
        networks.reward,
    )


def compiled(path: RewardPath) -> RewardPath:
    return RewardPath(*(torch.compile(part, dynamic=False, fullgraph=True) for part in path))


PROVIDERS: dict[str, Callable[[PathNetworks], RewardPath]] = {
    "eager": eager,
    "eager-checkpoint": eager_checkpoint,
    "compile": lambda networks: compiled(eager(networks)),
    "fused": fused,
    "fused-nchw": lambda networks: fused(networks, memory_format=torch.contiguous_format),
    "fused-checkpoint": lambda networks: fused(networks, checkpoint=True),
    "fused-rows": lambda networks: fused(networks, rows=ROWS),
    "fused-rows-checkpoint": lambda networks: fused(networks, rows=ROWS, checkpoint=True),
    "fused-compile": lambda networks: compiled(fused(networks)),
}
COMPILED = ("compile", "fused-compile")


def plan(
    *,
    device: torch.device,
    model: str | None,
    batch: int | str | None,
    latent: int | None = None,
    dtype: torch.dtype | None,
    names: Sequence[str] | None,
    compile: bool,
    rounds: int,
    models: Mapping[str, Any] = MODELS,
    providers: Mapping[str, bool] | None = None,
) -> NetworkPlan:
    """Fill in what was not chosen; batch "fill" is what fits.

    Args:
        models: by name, each with a batch of its own; the decoders of `MODELS` have the same names.
        providers: whether each compiles, by name; None: those of a path.

    Raises:
        ConfigurationError: an unknown model or provider, or eager code is missing.
    """
    on_gpu = device.type == "cuda"
    model = model or ("sd15" if on_gpu else "small")
    compiles = providers or {name: name in COMPILED for name in PROVIDERS}
    check_known("--model", [model], tuple(models))
    check_known("--providers", names or (), tuple(compiles))
    chosen = [name for name in names or compiles if compile or not compiles[name]]
    if "eager" not in chosen:
        raise ConfigurationError("--providers: eager is what the others are measured against, name it too")
    size = models[model].batch if batch is None else batch
    return NetworkPlan(
        model,
        None if isinstance(size, str) else size,
        latent or MODELS[model].latent,
        dtype or (torch.bfloat16 if on_gpu else torch.float32),
        device,
        chosen,
        rounds,
    )


def measure(plan: NetworkPlan) -> list[PathOutcome]:
    """Take every provider through the gate, and those that pass to the clock, by turns."""
    torch._dynamo.reset()
    with compiler(plan.device, torch.get_num_threads()):
        networks = PathNetworks(plan)
        outcomes, paths = _judge(plan, networks)
        timings = _time(paths, networks.latents, plan.rounds, clock_of(plan.device))
        return [
            _complete(replace(each, timings=timings[each.provider]), paths[each.provider], networks, plan)
            if each.provider in paths
            else each
            for each in outcomes
        ]


def _judge(plan: NetworkPlan, networks: PathNetworks) -> tuple[list[PathOutcome], dict[str, RewardPath]]:
    oracle = _oracle(plan, networks)
    records: list[PathOutcome] = []
    paths: dict[str, RewardPath] = {}
    allowed: dict[str, float] = {}
    for name in plan.names:
        try:
            path = PROVIDERS[name](networks)
            results = _results(path, networks.latents)
        except Exception as error:  # of any kind: it is reported, and the other providers go on
            reason = first_line(error)
            absent = name in COMPILED or isinstance(error, torch.OutOfMemoryError)
            records.append(PathOutcome(name, left_out=reason) if absent else PathOutcome(name, wrong=reason))
            continue
        errors = {
            what: float((result.double() - expected.double()).norm() / expected.double().norm())
            for (what, result), expected in zip(results.items(), oracle, strict=True)
        }
        allowed = allowed or allowance(errors, plan.dtype)
        wrong = "; ".join(complaints(errors, allowed))
        records.append(PathOutcome(name, wrong=wrong or None))
        if not wrong:
            paths[name] = path
    return records, paths


def allowance(errors: Mapping[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Return relative errors that are allowed where unfused code makes these: twice as much, or `TOLERANCE`."""
    return {what: max(TOLERANCE[dtype], 2.0 * error) for what, error in errors.items()}


def complaints(errors: Mapping[str, float], allowed: Mapping[str, float]) -> list[str]:
    """Say in words which errors are not allowed."""
    return [
        f"the {what} has a relative error of {error:.1e}, allowed {allowed[what]:.0e}"
        for what, error in errors.items()
        if not error <= allowed[what]
    ]


def _oracle(plan: NetworkPlan, networks: PathNetworks) -> tuple[Tensor, ...]:
    """Eager code's results in float64, or in plain float32 where float64 would take too long."""
    exact = networks.cast(torch.float64 if plan.model == "small" else torch.float32)
    with full_precision():
        return tuple(_results(eager(exact), exact.latents).values())


def _results(path: RewardPath, latents: Tensor) -> dict[str, Tensor]:
    latents = latents.detach().requires_grad_()
    images = path.decode(latents)
    rewards = path.reward(path.pixels(images))
    (gradient,) = torch.autograd.grad(rewards.sum(), latents)
    return {"image": images.detach(), "reward": rewards.detach(), "gradient": gradient}


def run_phases(path: RewardPath, latents: Tensor, clock: Clock = wall_clock) -> tuple[dict[str, float], Tensor]:
    """Seconds of every phase, and the gradient to the latents."""
    seconds: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], Any]) -> Tensor:
        result: list[Any] = []
        seconds[phase] = clock(lambda: result.append(work()))
        tensor: Tensor = result[0][0] if isinstance(result[0], tuple) else result[0]
        return tensor

    latents = latents.detach().requires_grad_()
    images = timed("decode", lambda: path.decode(latents))
    images_in = images.detach().requires_grad_()
    pixels = timed("pixels", lambda: path.pixels(images_in))
    pixels_in = pixels.detach().requires_grad_()
    rewards = timed("reward", lambda: path.reward(pixels_in))
    gradient = timed("reward backward", lambda: torch.autograd.grad(rewards.sum(), pixels_in))
    gradient = timed("pixels adjoint", lambda: torch.autograd.grad(pixels, images_in, gradient))
    return seconds, timed("decode backward", lambda: torch.autograd.grad(images, latents, gradient))


def _time(paths: dict[str, RewardPath], latents: Tensor, rounds: int, clock: Clock) -> dict[str, dict[str, Timing]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for turn, name in turns(list(paths), rounds, WARM_UPS):
        seconds, _ = run_phases(paths[name], latents, clock)
        if turn >= 0:
            samples[name].append({**seconds, WHOLE: sum(seconds.values())})
    return {name: by_phase(taken) for name, taken in samples.items()}


def by_phase(samples: Sequence[Mapping[str, float]]) -> dict[str, Timing]:
    """Return the timing of each phase, of rounds that told the seconds of all."""
    return {phase: Timing(tuple(sample[phase] for sample in samples)) for phase in samples[0]}


def _complete(outcome: PathOutcome, path: RewardPath, networks: PathNetworks, plan: NetworkPlan) -> PathOutcome:
    """Return the outcome with what each phase keeps, and the peak of all."""
    latents = networks.latents
    with torch.no_grad():
        images = path.decode(latents)
        pixels = path.pixels(images)
    kept = {
        phase: kept_bytes(part, given, *networks.networks)
        for phase, part, given in zip(PHASES, path, (latents, images, pixels), strict=False)
    }
    peak = peak_temporary_bytes(lambda: tuple(_results(path, latents).values()), latents.device)
    whole = None if outcome.provider in COMPILED else _kept_at_full_size(plan, outcome.provider)
    return replace(outcome, kept=kept, kept_whole=whole, peak=peak)


def _kept_at_full_size(plan: NetworkPlan, name: str) -> int:
    """Bytes that the decode of one image keeps at the model's own size: on fake tensors, which take no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = MODELS[plan.model]
    # Kernels for GPUs may have been asked for, and take no tensors of the CPU.
    with backends.use("auto"), FakeTensorMode():
        networks = PathNetworks(replace(plan, batch=1, latent=model.latent, device=torch.device("cpu")))
        return kept_bytes(PROVIDERS[name](networks).decode, networks.latents, networks.vae)


def _autoencoder(model: Decoder) -> Any:
    from diffusers import AutoencoderKL

    blocks = len(model.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=model.channels,
        layers_per_block=model.layers,
        scaling_factor=model.scaling_factor,
        sample_size=8 * model.latent,
    )
    vae.encoder = vae.quant_conv = None
    return vae.eval().requires_grad_(False)


def _vision(tower: Tower) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    facts = CLIPVisionConfig(
        hidden_size=tower.hidden,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        patch_size=tower.patch,
        image_size=tower.size,
        projection_dim=1024,
        hidden_act="gelu",
    )
    return CLIPVisionModelWithProjection(facts).eval().requires_grad_(False)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Within the block, new tensors have this dtype."""
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 within the block."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# Results

COLUMNS = (
    *("model", "tower", "batch", "latent", "dtype", "device", "threads", "provider", "status", "phase", "median_ms"),
    *("quartile1_ms", "quartile3_ms", "rounds", "x_eager", "kept_bytes", "kept_bytes_full_size", "peak_bytes"),
)
LEGEND = """\
Medians of interleaved rounds, in ms. `kept` is what the decode keeps for its backward pass, `of eager` its part of
what eager code keeps, `kept, full` the same for one image of {pixels} x {pixels}, counted on fake tensors. `peak` is
the most memory at once of the whole path, beyond parameters, latents and results.
"""


def kind_of(plan: NetworkPlan) -> str:
    """Return the name of these tables' place in the documentation, and of their files."""
    own = plan.latent == MODELS[plan.model].latent
    return f"{plan.device.type}-{plan.model}" + ("" if own else f"-latent{plan.latent}")


def write(where: Place, plan: NetworkPlan, outcomes: Sequence[PathOutcome], origin: Provenance) -> list[Any]:
    """Write CSV and Markdown. Return the paths."""
    facts = (
        f"{plan.model}: {plan.batch} latent{'s' * (plan.batch != 1)} of {plan.latent} x {plan.latent}, "
        f"{dtype_name(plan.dtype)}, {threads_name(torch.get_num_threads())}, "
        f"{TOWERS[plan.device.type].name} as the reward.\n"
    )
    legend = LEGEND.format(pixels=8 * MODELS[plan.model].latent)
    parts: list[str | Table] = [facts, legend, table(outcomes), tables.bullets(sentences(outcomes))]
    eager = _eager(outcomes)
    rows = [
        _row(each, eager, phase, plan)
        for each in outcomes
        for phase in ((*PHASES, WHOLE) if each.timings else (WHOLE,))
    ]
    return where.write(rows, COLUMNS, parts, origin)


def sentences(outcomes: Sequence[Outcome]) -> list[str]:
    """Say who was wrong, and who did not take part."""
    wrong = [f"{each.provider} is wrong: {each.wrong}" for each in outcomes if each.wrong]
    return wrong + [f"without {each.provider}: {each.left_out}" for each in outcomes if each.left_out]


def table(outcomes: Sequence[PathOutcome]) -> Table:
    """Return one row per provider."""
    eager = _eager(outcomes)
    rows = [["provider", *PHASES, WHOLE, "x eager", "kept MiB", "of eager", "kept, full MiB", "peak MiB"]]
    for each in outcomes:
        if each.timings:
            kept = each.kept["decode"]
            part = kept / eager.kept["decode"] if eager is not None and eager.kept else None
            rows.append(
                [
                    each.provider,
                    *(milliseconds(each.timings[phase]) for phase in (*PHASES, WHOLE)),
                    shown(_ratio(eager, each, WHOLE), ".2f"),
                    f"{kept / 2**20:.1f}",
                    shown(part, ".1%"),
                    *(shown(size, ".0f", 2.0**-20) for size in (each.kept_whole, each.peak)),
                ]
            )
    return Table(rows)


def _row(each: PathOutcome, eager: PathOutcome | None, phase: str, plan: NetworkPlan) -> dict[str, Any]:
    row = {
        **{name: getattr(plan, name) for name in ("model", "batch", "latent")},
        **{"tower": TOWERS[plan.device.type].name, "dtype": dtype_name(plan.dtype), "device": plan.device.type},
        **{"threads": torch.get_num_threads(), "provider": each.provider, "status": each.status, "phase": phase},
    }
    if not each.timings:
        return row
    row |= {**tables.times(each.timings[phase]), "x_eager": figure(_ratio(eager, each, phase))}
    if phase == WHOLE:
        return {**row, "kept_bytes": sum(each.kept.values()), "peak_bytes": each.peak}
    full = each.kept_whole if phase == "decode" else None
    return {**row, "kept_bytes": each.kept.get(phase), "kept_bytes_full_size": full}


def _eager(outcomes: Sequence[PathOutcome]) -> PathOutcome | None:
    return next((each for each in outcomes if each.provider == "eager"), None)


def _ratio(eager: PathOutcome | None, each: PathOutcome, phase: str) -> float | None:
    return None if eager is None else ratio(eager.timings.get(phase), each.timings.get(phase))
