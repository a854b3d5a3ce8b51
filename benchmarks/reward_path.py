"""The reward path, phase by phase: latents -> images -> pixels -> rewards, and the gradient back to the latents.

The networks have their true architecture, or a scaled-down one, and random weights: neither time nor memory depends on
their values. Times are those of the phases one after another, each with its own graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import baselines, cuda, providers
from benchmarks.cases import check_known
from benchmarks.memory import kept_bytes, peak_temporary_bytes
from benchmarks.operators import PIXEL_MEAN, PIXEL_STD
from benchmarks.timing import Clock, Timing, wall_clock
from diffpp_fast import ops
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.kernels import dispatch
from diffpp_fast.networks import FrozenDecoder

PHASES = ("decode", "pixels", "reward", "reward backward", "pixels adjoint", "decode backward")
WHOLE = "whole"
#: On ||error|| / ||oracle||; or twice the error of eager code, where that is more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WARM_UPS = 1


class Model(NamedTuple):
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
    "tiny": Model((32, 32), 1, 8, 0.18215, 1),
    "small": Model((32, 64, 128, 128), 2, 32, 0.18215, 1),
    "sd15": Model((128, 256, 512, 512), 2, 64, 0.18215, 4),
    "sdxl": Model((128, 256, 512, 512), 2, 128, 0.13025, 2),
}
#: By the type of the device. ViT-H/14 is that of HPSv2 and PickScore.
TOWERS = {
    "cuda": Tower("ViT-H/14", 1280, 5120, 32, 16, 14, 224),
    "cpu": Tower("ViT-S/32, 4 layers", 384, 1536, 4, 6, 32, 224),
}


class Path(NamedTuple):
    """The three parts of a reward path, each differentiable in its tensor."""

    decode: Callable[[Tensor], Tensor]  # latents -> images
    pixels: Callable[[Tensor], Tensor]  # images -> the tower's input
    reward: Callable[[Tensor], Tensor]  # -> [B]


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    model: str
    batch: int
    latent: int
    dtype: torch.dtype
    device: torch.device
    names: Sequence[str]  # of PROVIDERS
    rounds: int


@dataclass(frozen=True)
class Record:
    """One provider. `kept` is by forward phase, in bytes; `kept_whole` at the model's own size, for one image."""

    provider: str
    wrong: str | None = None
    left_out: str | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    kept_whole: int | None = None
    peak: int | None = None


class Networks:
    """The autoencoder and the tower at random weights, and the latents. The tower is that of the device, or another."""

    def __init__(self, plan: Plan, tower: Tower | None = None) -> None:
        model, self.tower = MODELS[plan.model], tower or TOWERS[plan.device.type]
        with torch.random.fork_rng(), torch.device(plan.device), default_dtype(plan.dtype):
            torch.manual_seed(0)
            self.vae = _autoencoder(model)
            self.vision = _vision(self.tower)
            self.latents = torch.randn(plan.batch, 4, plan.latent, plan.latent)
        self.networks = [self.vae, self.vision]

    def cast(self, dtype: torch.dtype) -> Networks:
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


def eager(networks: Networks) -> Path:
    vae, size = networks.vae, networks.tower.size
    mean, std = (networks.latents.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    scale = float(vae.config.scaling_factor)
    return Path(
        lambda latents: vae.decode(latents / scale, return_dict=False)[0],
        lambda images: baselines.reward_pixels(images, mean, std, size=size),
        networks.reward,
    )


def eager_checkpoint(networks: Networks) -> Path:
    """diffusers' own gradient checkpointing: it recomputes the middle block and every up block."""
    path, vae = eager(networks), networks.vae

    def decode(latents: Tensor) -> Tensor:
        vae.enable_gradient_checkpointing()
        try:
            return path.decode(latents)
        finally:
            vae.disable_gradient_checkpointing()

    return path._replace(decode=decode)


def fused(networks: Networks, **options: Any) -> Path:
    size = networks.tower.size
    return Path(
        FrozenDecoder(networks.vae, **options),
        lambda images: ops.reward_pixels(images, size, mean=PIXEL_MEAN, std=PIXEL_STD),
        networks.reward,
    )


def compiled(path: Path) -> Path:
    return Path(*(torch.compile(part, dynamic=False, fullgraph=True) for part in path))


PROVIDERS: dict[str, Callable[[Networks], Path]] = {
    "eager": eager,
    "eager-checkpoint": eager_checkpoint,
    "compile": lambda networks: compiled(eager(networks)),
    "fused": fused,
    "fused-nchw": lambda networks: fused(networks, memory_format=torch.contiguous_format),
    "fused-checkpoint": lambda networks: fused(networks, checkpoint=True),
    "fused-compile": lambda networks: compiled(fused(networks)),
}
COMPILED = ("compile", "fused-compile")


def plan(
    model: str | None,
    *,
    device: torch.device,
    batch: int | None,
    latent: int | None,
    dtype: torch.dtype | None,
    names: Sequence[str] | None,
    compile: bool,
    rounds: int,
) -> Plan:
    """Fills in what was not chosen. Raises ConfigurationError for an unknown model or provider."""
    on_gpu = device.type == "cuda"
    model = model or ("sd15" if on_gpu else "small")
    check_known("--model", [model], tuple(MODELS))
    check_known("--providers", names or (), tuple(PROVIDERS))
    chosen = [name for name in names or PROVIDERS if compile or name not in COMPILED]
    if "eager" not in chosen:
        raise ConfigurationError("--providers: eager is what the others are measured against, name it too")
    facts = MODELS[model]
    return Plan(
        model,
        batch or facts.batch,
        latent or facts.latent,
        dtype or (torch.bfloat16 if on_gpu else torch.float32),
        device,
        chosen,
        rounds,
    )


def measure(plan: Plan) -> list[Record]:
    """Every provider through the gate; those that pass on the clock, by turns."""
    providers.forget_compiled()
    with providers.compiler(plan.device, torch.get_num_threads()):
        networks = Networks(plan)
        records, paths = _judge(plan, networks)
        clock: Clock = cuda.event_clock if plan.device.type == "cuda" else wall_clock
        timings = _time(paths, networks.latents, plan.rounds, clock)
        whole = {name: _kept_at_full_size(plan, name) for name in paths if name not in COMPILED}
        return [
            record
            if record.provider not in paths
            else _complete(replace(record, timings=timings[record.provider]), paths[record.provider], networks, whole)
            for record in records
        ]


def _judge(plan: Plan, networks: Networks) -> tuple[list[Record], dict[str, Path]]:
    oracle = _oracle(plan, networks)
    records, paths, allowed = [], {}, None
    for name in plan.names:
        try:
            path = PROVIDERS[name](networks)
            results = _results(path, networks.latents)
        except Exception as error:  # of any kind: it is reported, and the other providers go on
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            absent = name in COMPILED or isinstance(error, torch.OutOfMemoryError)
            records.append(Record(name, left_out=reason) if absent else Record(name, wrong=reason))
            continue
        errors = {
            what: float((result.double() - expected.double()).norm() / expected.double().norm())
            for (what, result), expected in zip(results.items(), oracle, strict=True)
        }
        if allowed is None:
            allowed = {what: max(TOLERANCE[plan.dtype], 2.0 * error) for what, error in errors.items()}
        wrong = [
            f"the {what} has a relative error of {error:.1e}, allowed {allowed[what]:.0e}"
            for what, error in errors.items()
            if not error <= allowed[what]
        ]
        records.append(Record(name, wrong="; ".join(wrong) or None))
        if not wrong:
            paths[name] = path
    return records, paths


def _oracle(plan: Plan, networks: Networks) -> tuple[Tensor, ...]:
    """Eager code's results in float64, or in plain float32 where float64 would take too long."""
    exact = networks.cast(torch.float64 if plan.model == "small" else torch.float32)
    with full_precision():
        return tuple(_results(eager(exact), exact.latents).values())


def _results(path: Path, latents: Tensor) -> dict[str, Tensor]:
    latents = latents.detach().requires_grad_()
    images = path.decode(latents)
    rewards = path.reward(path.pixels(images))
    (gradient,) = torch.autograd.grad(rewards.sum(), latents)
    return {"image": images.detach(), "reward": rewards.detach(), "gradient": gradient}


def run_phases(path: Path, latents: Tensor, clock: Clock = wall_clock) -> tuple[dict[str, float], Tensor]:
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


def _time(paths: dict[str, Path], latents: Tensor, rounds: int, clock: Clock) -> dict[str, dict[str, Timing]]:
    """Interleaved: every round times every provider, the next one first."""
    names = list(paths)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for first in range(-WARM_UPS, rounds):
        for place in range(len(names)):
            name = names[(first + place) % len(names)]
            seconds, _ = run_phases(paths[name], latents, clock)
            if first >= 0:
                samples[name].append({**seconds, WHOLE: sum(seconds.values())})
    return {
        name: {phase: Timing(tuple(sample[phase] for sample in taken), 1) for phase in (*PHASES, WHOLE)}
        for name, taken in samples.items()
    }


def _complete(record: Record, path: Path, networks: Networks, whole: dict[str, int]) -> Record:
    """With what each phase keeps, and the peak of all."""
    latents = networks.latents
    with torch.no_grad():
        images = path.decode(latents)
        pixels = path.pixels(images)
    kept = {
        phase: kept_bytes(part, given, *networks.networks)
        for phase, part, given in zip(PHASES, path, (latents, images, pixels), strict=False)
    }
    peak = peak_temporary_bytes(lambda: tuple(_results(path, latents).values()), latents.device)
    return replace(record, kept=kept, kept_whole=whole.get(record.provider), peak=peak)


def _kept_at_full_size(plan: Plan, name: str) -> int:
    """Bytes that the decode of one image keeps at the model's own size: on fake tensors, which take no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = MODELS[plan.model]
    # Kernels for GPUs may have been asked for, and take no tensors of the CPU.
    with dispatch.use_backend("auto"), FakeTensorMode():
        networks = Networks(replace(plan, batch=1, latent=model.latent, device=torch.device("cpu")))
        return kept_bytes(PROVIDERS[name](networks).decode, networks.latents, networks.vae)


def _autoencoder(model: Model) -> Any:
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


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, new tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 within the block."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
