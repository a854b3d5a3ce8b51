"""Regularisers against reward hacking, by closed forms and in runs; the reward's schedule."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import test_decoder
import tiny
import torch
from method_cases import (
    SCHEDULES,
    SHAPE,
    Convolution,
    assert_near,
    batch_of,
    gradient_by_x0,
    quadratic_reward,
    train_gaussian,
    variance_preserving,
)
from PIL import Image
from test_lora_formats import updates_of

from diffpp_fast import Noise
from diffpp_fast.errors import CheckpointError
from diffpp_fast.methods import DIDR, DiffInstruct, DiffInstructPP
from diffpp_fast.methods.base import IMAGE_DIFFUSION, ImageData
from diffpp_fast.methods.regularizers import ImageDenoising, KLToStart
from diffpp_fast.networks import FrozenDecoder, ImageEncoder
from diffpp_fast.networks.lora_formats import LoraTarget, write_lora
from diffpp_fast.training import ConfigurationError, Trainer, load_config
from diffpp_fast.training.build.networks import Networks
from diffpp_fast.training.build.text import extra_prompts
from diffpp_fast.training.checkpoint import read_role
from diffpp_fast.training.config import PiecewiseSection, RampSection
from diffpp_fast.training.images import ImageBatches, ImageSource
from diffpp_fast.training.planning.plan import count_run, run_of
from diffpp_fast.training.planning.states import states_of
from diffpp_fast.training.reward_scale import factor_at

QUIET = (
    "training.grid_every=null",
    "training.baseline_steps=null",
    "training.checkpoint_every=1",
    "rewards.held_out=null",
    "logging.tensorboard=false",
)
EPSILON = SCHEDULES["epsilon"]


# -- the distance to the start -----------------------------------------------------------------------------------------


def test_the_distance_adds_its_exact_gradient_on_the_samples() -> None:
    start, batch = Convolution(5), batch_of()

    def build(generator: Any, *regularizers: Any) -> DiffInstruct:
        return DiffInstruct(generator, Convolution(1), Convolution(2), EPSILON, regularizers=regularizers)

    x0, without = gradient_by_x0(build, batch)
    _, gradient = gradient_by_x0(lambda generator: build(generator, KLToStart(start, 0.3)), batch)
    z = Noise(batch.seed, batch.samples, stream=0).normal(SHAPE)
    assert_near(gradient - without, 0.3 * (x0 - start(z, batch.conditioning).detach()) / len(batch))


def test_the_start_and_all_but_the_generator_get_no_gradient() -> None:
    start, generator, fake, reference = (Convolution(seed) for seed in (1, 1, 2, 3))
    images = ImageData(torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1, 1, 1))
    terms = [KLToStart(start, 1.0), ImageDenoising(1.0, alpha=0.6, sigma=0.8, input_scale=0.8)]
    method = DiffInstruct(generator, fake, reference, EPSILON, regularizers=terms)
    output = method.generator_loss(replace(batch_of(), images=images))
    output.loss.backward()
    assert generator.weight.grad is not None and generator.weight.grad.norm() > 0
    assert all(network.weight.grad is None for network in (start, fake, reference))
    # The generator has the start's weights.
    assert output.metrics["start_distance"] == 0 == output.metrics["start_gradient_norm"]


def test_a_gaussian_generator_stops_where_the_pull_to_the_start_balances_the_divergence() -> None:
    """E[sigma^2] (theta - m) + weight (theta - start) = 0 for the weighting x0 of exact scores."""
    schedule, mean, start, weight = variance_preserving(), torch.tensor([1.0, -0.5]), 0.4, 0.5
    pull = KLToStart(lambda z, c: start + z, weight)
    theta = train_gaussian(
        lambda generator, fake, reference: DiffInstruct(
            generator, fake, reference, schedule, t_range=(300, 700), regularizers=[pull]
        ),
        schedule,
        mean,
    )
    divergence = schedule.sigmas[300:700].double().square().mean().float()
    torch.testing.assert_close(theta, (divergence * mean + weight * start) / (divergence + weight), rtol=0, atol=0.02)


# -- images ------------------------------------------------------------------------------------------------------------


def test_the_images_loss_and_gradient_are_those_of_the_formula() -> None:
    generator, batch = Convolution(4).double(), batch_of()
    latents = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    shift = torch.full((4, 1, 1, 1), -0.25, dtype=torch.float64)
    term = ImageDenoising(0.7, alpha=0.6, sigma=0.8, input_scale=2.0)
    found = term(
        replace(batch, images=ImageData(latents, shift)), torch.zeros_like(latents), lambda _: latents, generator
    )
    assert found.loss is not None
    found.loss.backward()
    assert generator.weight.grad is not None
    given, generator.weight.grad = generator.weight.grad.clone(), None
    eps = Noise(batch.seed, batch.samples, stream=IMAGE_DIFFUSION).normal(SHAPE).double()
    denoised = generator((0.6 * latents + 0.8 * eps) / 2.0, shift)
    expected = 0.7 * 0.5 * (denoised - latents).square().sum() / 4
    expected.backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(given, generator.weight.grad, rtol=1e-5, atol=1e-6)


def test_what_regularisers_lack_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="KLToStart: weight must be above 0 and finite, got 0"):
        KLToStart(Convolution(1), 0.0)
    term = ImageDenoising(1.0, alpha=0.6, sigma=0.8, input_scale=1.0)
    method = DiffInstruct(Convolution(1), Convolution(2), Convolution(3), EPSILON, regularizers=[term])
    with pytest.raises(ValueError, match=r"needs Batch.images, \(4, 2, 3, 3\) latents of images, got None"):
        method.generator_loss(batch_of())


def write_pictures(folder: Path, count: int = 5) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (20 + number, 30), (50 * number, 10, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f" {tiny.PROMPTS[number]}\n")
    return folder


def write_archive(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):
            archive.add(file, f"inside/{file.name}")
    return path


def test_folders_and_archives_hold_the_same_images(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    archive = write_archive(tmp_path / "pictures.tar", folder)
    one, other = ImageSource(str(folder), 16, 12), ImageSource(str(archive), 16, 12)
    assert one.captions() == other.captions()[::-1] == list(tiny.PROMPTS[:5])
    for number in range(5):
        assert torch.equal(one.read(number), other.read(4 - number))
        assert one.read(number).shape == (3, 16, 12)
        colour = torch.tensor([50 * number, 10, 200]) / 127.5 - 1
        torch.testing.assert_close(one.read(number)[:, 3, 4], colour)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "2.txt").unlink(), "2.png has no caption: write it into"),
        (lambda folder: (folder / "2.txt").write_text(" \n"), "the caption .*2.txt is empty"),
        (lambda folder: (folder / "2.txt").write_bytes(b"\xff"), r"2.txt is not UTF-8"),
        (lambda folder: (folder / "2.png").write_bytes(b"text"), "2.png is no picture"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "holds no picture"),
    ],
)
def test_images_that_do_not_serve_are_named_before_a_run_begins(tmp_path: Path, spoil: Any, said: str) -> None:
    folder = write_pictures(tmp_path / "pictures")
    spoil(folder)
    with pytest.raises(ConfigurationError, match=f"method.regularizers.images: .*{said}"):
        ImageSource(str(folder), 16, 16)


def test_a_truncated_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 1)
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (folder / "0.png").write_bytes(buffer.getvalue()[:-900])
    source = ImageSource(str(folder), 16, 16)
    with pytest.raises(ConfigurationError, match=r"the picture .*0\.png can't be read"):
        source.read(0)


def test_every_image_comes_once_in_as_many_samples_whatever_the_batches(tmp_path: Path) -> None:
    class Spy(ImageSource):
        def read(self, index: int) -> torch.Tensor:
            return torch.full((3, 2, 2), float(index))

    def unread(captions: Any) -> Any:
        return captions

    source = Spy(str(write_pictures(tmp_path / "pictures")), 16, 16)

    def run(capacity: int, *sizes: int) -> torch.Tensor:
        batches = ImageBatches(source, 7, lambda image: image[:, :1], torch.device("cpu"), capacity)
        return torch.cat([batches(part, unread).latents[:, 0, 0, 0] for part in torch.arange(20).split(sizes)])

    whole = run(2**20, 20)
    assert torch.equal(whole, run(1, 3, 17)) and torch.equal(whole, run(2**20, *[5] * 4))
    assert all(sorted(part.tolist()) == [0, 1, 2, 3, 4] for part in whole.split(5))
    assert len({tuple(part.tolist()) for part in whole.split(5)}) > 1


def test_encoding_is_the_pipelines_and_the_decoders_inverse_scaling() -> None:
    vae: Any = tiny.vae(scaling_factor=0.25, shift_factor=0.5)
    encoder, images = ImageEncoder(FrozenDecoder(vae)), torch.rand(2, 3, 16, 16) * 2 - 1
    expected = (vae.encode(images).latent_dist.mode() - 0.5) * 0.25
    torch.testing.assert_close(encoder(images), expected)
    torch.testing.assert_close(FrozenDecoder(vae).unscale(encoder(images)), vae.encode(images).latent_dist.mode())
    assert all("encoder" in name or "quant" in name for name in encoder.state_dict())


@pytest.mark.parametrize("make", [tiny.deep_vae, test_decoder.flux2, test_decoder.qwen, test_decoder.tiny])
def test_every_autoencoder_encodes_what_its_decoder_unscales(make: Callable[[], Any]) -> None:
    vae: Any = make().float()
    decoder, images = FrozenDecoder(vae), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = ImageEncoder(decoder)(images)
        frames = images[:, :, None] if decoder.kind == "AutoencoderKLQwenImage" else images
        (own,) = vae.encode(frames, return_dict=False)
        own = (own if isinstance(own, torch.Tensor) else own.mode()).reshape(2, -1)
        torch.testing.assert_close(decoder.unscale(latents).reshape(2, -1), own, rtol=1e-4, atol=1e-5)
        assert latents.shape[1] == decoder.channels and decoder(latents).shape == images.shape


# -- the reward's schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, {1: 1.0, 9: 1.0}),
        (RampSection(name="linear", steps=4), {1: 0.25, 2: 0.5, 4: 1.0, 9: 1.0}),
        (RampSection(name="linear", steps=4, start=2.0, end=1.0), {1: 1.75, 4: 1.0}),
        (RampSection(name="cosine", steps=4, start=1.0, end=0.0), {1: 0.5 + 0.5**1.5, 2: 0.5, 4: 0.0, 8: 0.0}),
        (PiecewiseSection(name="piecewise", points=[(2, 0.0), (4, 1.0), (8, 0.5)]), {1: 0.0, 3: 0.5, 6: 0.75, 9: 0.5}),
    ],
)
def test_factors_of_a_schedule(schedule: Any, expected: dict[int, float]) -> None:
    assert {update: factor_at(schedule, update) for update in expected} == pytest.approx(expected)


@pytest.mark.parametrize("kind", [DiffInstructPP, DIDR])
def test_a_factor_multiplies_the_rewards_gradient_alone(kind: Any) -> None:
    batch = batch_of()

    def gradient(scale: float, factor: float | torch.Tensor) -> torch.Tensor:
        def build(generator: Any) -> Any:
            networks = generator, Convolution(1), Convolution(2)
            made = kind(*networks, EPSILON, reward=quadratic_reward, reward_scale=scale, t_range=(200, 800))
            made.reward_term.factor = factor
            return made

        return gradient_by_x0(build, batch)[1]

    torch.testing.assert_close(gradient(2.0, torch.tensor(0.25)), gradient(0.5, 1.0))
    torch.testing.assert_close(gradient(2.0, torch.tensor(0.0)), gradient(0.0, 1.0))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_what_a_run_can_not_do_is_refused(project: Path) -> None:
    def refusal(*overrides: str) -> str:
        with pytest.raises(ConfigurationError) as error:
            load_config(project, overrides)
        return str(error.value)

    assert "weight should be greater than 0" in refusal("method.regularizers={start: {weight: 0}}")
    images = "method.regularizers={images: {path: pictures, weight: 1}}"
    assert "training.capture records no images" in refusal(images, "training.capture=true")
    drawn = "models.generator={timestep: null, timesteps: [600, 300], gradient_step: random_exit}"
    assert "records one number of calls" in refusal(drawn, "training.capture=true")
    bare = ("models.decoder=null", "method.name=diff_instruct", "rewards={}", "training.grid_every=null")
    assert "models.decoder is missing: method.regularizers.images" in refusal(images, *bare)
    piecewise = "rewards.optimised.schedule={name: piecewise, points: [[5, 1], [5, 2]]}"
    assert "points must be of growing steps, got [5, 5]" in refusal(piecewise)


def test_a_plan_counts_the_start_where_it_is_a_copy(project: Path) -> None:
    pull = "method.regularizers={start: {weight: 1}, images: {path: nowhere, weight: 1}}"
    sizes = {}
    for name, overrides in {"no": (), "copy": (pull,), "shared": (pull, "models.generator.path=null")}.items():
        run = run_of(load_config(project, overrides))
        counted = count_run(run)
        sizes[name] = states_of(run, counted)["reference"].weights
    assert sizes["no"] == sizes["shared"] and sizes["copy"] == 2 * sizes["no"]


def write_small_lora(folder: Path) -> Path:
    """A LoRA for a tiny UNet, of rank 2 and alpha 4."""
    network = tiny.unet()
    layers = {
        layer: update._replace(alpha=4.0, down=update.down[:2], up=update.up[:, :2] / 4)
        for layer, update in updates_of(network).items()
        if layer.endswith(("attn1.to_q", "conv1"))
    }
    write_lora(folder, "comfyui", layers, LoraTarget.of(network), prediction_type="epsilon", name="small")
    return folder / "small.safetensors"


def test_the_start_of_a_kept_lora_is_the_network_with_the_file(project: Path, tmp_path: Path) -> None:
    """A second adapter, which stays as the trained one began; the reference and the TA know nothing of it."""
    kept = f"models.generator={{path: null, initial_lora: {{path: {write_small_lora(tmp_path)}, keep: true}}}}"
    config = load_config(project, [kept, "method.regularizers={start: {weight: 1}}"])
    networks = Networks(config, torch.device("cpu"))
    generator, reference, start = networks.trained("generator"), networks.reference(), networks.start()
    x, t, conditioning = torch.randn(2, *tiny.LATENT), torch.tensor([300, 900]), torch.randn(2, 5, tiny.TEXT_WIDTH)

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [denoise(x, t, conditioning) for denoise in (generator.denoise, start, reference)]

    before = outputs()
    assert torch.equal(before[0], before[1]) and (before[1] - before[2]).norm() > 0.01 * before[2].norm()
    with torch.no_grad():
        for weight in generator.parameters.values():
            weight.add_(0.1)
    after = outputs()
    assert not torch.equal(after[0], before[0]) and all(map(torch.equal, after[1:], before[1:]))
    trained = {name for name, weight in generator.network.named_parameters() if weight.requires_grad}
    assert trained == set(generator.parameters) and all(".generator." in name for name in trained)
    run = run_of(config)
    counted = count_run(run)
    pulled, free = (
        states_of(each, counted)["reference"].weights for each in (run, run_of(load_config(project, [kept])))
    )
    assert pulled - free == 4 * sum(weight.numel() for weight in generator.parameters.values())


@pytest.mark.slow
@pytest.mark.parametrize("begins", ["whole", "lora", "kept", "steps"])
def test_a_run_with_both_and_a_schedule_resumes_to_the_bit(project: Path, tmp_path: Path, begins: str) -> None:
    folder = write_pictures(tmp_path / "pictures")
    adapters = {
        "whole": "models.generator.input_scale=1.5",
        "lora": "models.generator={path: null, lora: {rank: 2}}",
        "kept": f"models.generator={{path: null, initial_lora: {{path: {write_small_lora(tmp_path)}, keep: true}}}}",
        "steps": "models.generator={timestep: null, timesteps: [900, 600], gradient_step: random_exit}",
    }
    common = (
        *QUIET,
        adapters[begins],
        f"method.regularizers={{start: {{weight: 0.5}}, images: {{path: {folder}, weight: 0.1}}}}",
        "rewards.optimised.schedule={name: linear, steps: 4}",
        "training.micro_batch=3",
    )

    def run(name: str, steps: int, resume: str | None = None, *more: str) -> Path:
        config = load_config(project, [*common, f"output={tmp_path}/{name}", f"training.steps={steps}", *more])
        Trainer(config, resume=resume).run()
        return tmp_path / name

    whole, parted = run("whole", 3), run("parted", 1)
    run("parted", 3, "latest")
    last = "checkpoints/step_000003"
    for role in ("generator", "fake"):
        one, other = (read_role(each / last, role) for each in (whole, parted))
        assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["generator/reward_scale"] for row in rows] == [0.5, 1.0, 1.5]
    assert (
        rows[0]["generator/start_distance"] == pytest.approx(0.0, abs=1e-6) and rows[2]["generator/start_distance"] > 0
    )
    assert all(row["generator/image_error"] > 0 for row in rows)
    (folder / "3.txt").write_text("another caption")
    with pytest.raises(CheckpointError, match=r"the content of method\.regularizers\.images has changed"):
        run("parted", 4, "latest")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(project: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    optimizer = "{lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.5}"
    common = [
        *QUIET,
        f"optimizers={{generator: {optimizer}, fake: {optimizer}}}",
        f"method.regularizers={{start: {{weight: 0.5}}, images: {{path: {folder}, weight: 0.1}}}}",
        "rewards.optimised.schedule={name: cosine, steps: 4}",
        "training.steps=2",
    ]
    Trainer(load_config(project, [*common, f"output={tmp_path}/alone"])).run()
    processes.run(["-m", "diffpp_fast", "train", str(project), f"output={tmp_path}/spread", *common], 2)
    start, one, two = (
        torch.cat([tensor.flatten() for _, tensor in sorted(read_role(folder, "generator").items())])
        for folder in (
            tmp_path / "alone/checkpoints/step_000001",
            tmp_path / "alone/checkpoints/step_000002",
            tmp_path / "spread/checkpoints/step_000002",
        )
    )
    assert (two - one).norm() <= 1e-4 * (one - start).norm()


@pytest.mark.slow
def test_captions_are_embedded_beside_the_prompts(project: Path, tmp_path: Path) -> None:
    from diffpp_fast.cli.main import main

    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "1.txt").write_text("a red whale")
    images = f"method.regularizers={{images: {{path: {folder}, weight: 0.1}}}}"
    embeddings = f"prompts.embeddings={tmp_path}/embeddings"
    assert extra_prompts(load_config(project, [images])) == [tiny.PROMPTS[0], "a red whale"]
    assert main(["embed", str(project), "--out", f"{tmp_path}/embeddings"]) == 0
    config = load_config(project, [*QUIET, images, embeddings, f"output={tmp_path}/run", "training.steps=1"])
    with pytest.raises(
        ConfigurationError, match=r"method\.regularizers\.images: .* holds no embedding of 'a red whale'"
    ):
        Trainer(config)
    assert main(["embed", str(project), images, "--out", f"{tmp_path}/embeddings"]) == 0
    assert Trainer(config).run().step == 1
