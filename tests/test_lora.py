"""LoRA: roles that share one copy of the reference's weights, each with its adapters, and only these are trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from diffpp_fast.methods import Batch
from diffpp_fast.networks import Denoiser
from diffpp_fast.networks.lora import Adapters, layers_of, merged_weight
from diffpp_fast.training import CheckpointError, Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import Run, build_run
from diffpp_fast.training.checkpoint import read_tensors
from diffpp_fast.training.distributed import World
from diffpp_fast.training.phases import Phases

CPU = torch.device("cpu")
BOTH = ("models.generator.lora.rank=3", "models.fake.lora={rank: 2, alpha: 4}")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"), "stable_diffusion")


@pytest.fixture
def config_of(base: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def load(*overrides: str, output: str = "run") -> Config:
        return load_config(base, [f"output={tmp_path / output}", *overrides])

    return load


def inputs(width: int = tiny.TEXT_WIDTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, *tiny.LATENT), torch.tensor([3, 900]), torch.randn(2, 5, width)


def adapters_on(network: torch.nn.Module, *names: str, **changes: Any) -> tuple[Adapters, dict[str, Any]]:
    adapters = Adapters(network)
    settings: dict[str, Any] = {"rank": 2, "alpha": 2.0, "targets": TARGETS, "seed": 7}
    parameters = {
        name: adapters.add(name, **{**settings, **changes}, stream=4 + number) for number, name in enumerate(names)
    }
    return adapters, parameters


def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    """As if trained: B is no longer zero."""
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))


def batch_of(run: Run) -> Batch:
    conditioning = run.sampler.encode(["a red apple", "a blue whale"])
    assert run.null is not None
    return Batch(torch.arange(2), conditioning, seed=1, shape=tiny.LATENT, null_conditioning=run.null.expand(2))


def test_an_adapter_starts_as_the_identity_from_its_address() -> None:
    x = inputs()
    network = tiny.unet().eval()
    plain = Denoiser(network)(*x)
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a second adapter on one network is no mistake
        adapters, parameters = adapters_on(network, "generator", "fake")
    assert torch.equal(torch.get_rng_state(), random), "initialisation drew from the global generator"
    assert torch.equal(Denoiser(network)(*x), plain)
    for name in ("generator", "fake"):
        with adapters.active(name):
            assert torch.equal(Denoiser(network)(*x), plain)

    torch.manual_seed(99)
    _, again = adapters_on(tiny.unet(), "generator")
    for name, parameter in again["generator"].items():
        assert torch.equal(parameter, parameters["generator"][name]) and parameter.requires_grad
        assert name in dict(network.named_parameters())
        if ".lora_A." in name:
            other = parameters["fake"][name.replace("generator", "fake")]
            assert not torch.equal(parameter, other)
    downs = torch.cat([weight.flatten() for name, weight in again["generator"].items() if ".lora_A." in name])
    assert downs.std().item() == pytest.approx(1 / 2, rel=0.1) and abs(downs.mean().item()) < 0.05


def test_each_role_computes_with_its_own_adapter() -> None:
    x = inputs()
    network = tiny.unet().eval()
    plain = Denoiser(network)(*x)
    adapters, parameters = adapters_on(network, "generator", "fake")
    for name in parameters:
        randomise(parameters[name])
    generator, fake, reference = (
        Denoiser(network, adapters=adapters, adapter=name) for name in ("generator", "fake", None)
    )
    outputs = generator(*x), fake(*x)
    assert torch.equal(reference(*x), plain) and not torch.equal(outputs[0], outputs[1])
    assert (outputs[0] - plain).abs().max() > 1e-3
    with adapters.active("generator"):
        assert torch.equal(fake(*x), outputs[1]) and torch.equal(Denoiser(network)(*x), outputs[0])
        with pytest.raises(RuntimeError, match="inside"), adapters.active("fake"):
            raise RuntimeError("inside")
        assert torch.equal(Denoiser(network)(*x), outputs[0])
    assert all(weight.requires_grad == (".lora_" in name) for name, weight in network.named_parameters())


@pytest.mark.parametrize("build", [tiny.unet, tiny.pixart])
def test_checkpointing_needs_the_role_in_the_backward_pass(build) -> None:  # type: ignore[no-untyped-def]
    """Recomputation belongs to the role of the forward pass, also if another has computed since."""
    x = inputs()
    gradients = {}
    for way in ("kept", "recomputed", "recomputed as another"):
        network = build().eval()
        adapters, parameters = adapters_on(network, "generator", "fake")
        torch.manual_seed(1)
        for name in parameters:
            randomise(parameters[name])
        if build is tiny.pixart:
            torch.nn.init.normal_(network.proj_out.weight, std=0.3)
        if way != "kept":
            network.enable_gradient_checkpointing()
        loss = Denoiser(network, adapters=adapters, adapter="generator")(*x).square().sum()
        with torch.no_grad():
            Denoiser(network, adapters=adapters, adapter="fake")(*x)
        with adapters.active("generator" if way != "recomputed as another" else None):
            if way == "recomputed as another":
                # torch finds that other tensors are recomputed than were kept.
                with pytest.raises(torch.utils.checkpoint.CheckpointError):
                    loss.backward()
                continue
            loss.backward()
        gradients[way] = {name: weight.grad for name, weight in parameters["generator"].items()}
        assert all(weight.grad is None for weight in parameters["fake"].values())
    for name, gradient in gradients["kept"].items():
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(gradients["recomputed"][name], gradient)


@pytest.mark.parametrize("build", [tiny.unet, tiny.sdxl_unet, tiny.pixart])
def test_merged_weights_compute_the_same(build) -> None:  # type: ignore[no-untyped-def]
    network = build().eval()
    if build is tiny.pixart:
        torch.nn.init.normal_(network.proj_out.weight, std=0.3)
    names = set(network.state_dict())
    adapters, parameters = adapters_on(network, "generator", "fake", targets=[*TARGETS, "conv1", "proj_in"], alpha=5.0)
    randomise(parameters["generator"])
    x_t, t, states = inputs()
    added = {"text_embeds": torch.randn(2, tiny.TEXT_WIDTH), "time_ids": torch.ones(2, 6)}
    conditioning = {
        "encoder_hidden_states": states,
        **({"added_cond_kwargs": added} if build is tiny.sdxl_unet else {}),
    }
    adapted = Denoiser(network, adapters=adapters, adapter="generator")(x_t, t, conditioning)
    merged = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    for name, (down, up) in layers_of(parameters["generator"], "generator").items():
        weights = parameters["generator"]
        merged[name] = merged_weight(merged[name], weights[down], weights[up], 5.0 / 2)
    assert set(merged) == names
    plain = build().eval()
    plain.load_state_dict(merged)
    torch.testing.assert_close(Denoiser(plain)(x_t, t, conditioning), adapted, rtol=1e-4, atol=1e-4)


def test_targets_that_match_nothing_are_refused(config_of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match=r"models\.fake\.lora: .*nowhere"):
        build_run(config_of("models.fake.lora.targets=[nowhere]"), World.alone("cpu"), Phases(torch.device("cpu")))


def test_roles_share_one_copy_and_gradient_goes_to_their_own_adapters(config_of) -> None:  # type: ignore[no-untyped-def]
    run = build_run(config_of(*BOTH), World.alone("cpu"), Phases(torch.device("cpu")))
    generator, fake = run.sampler.trained, run.fake
    assert generator.network is fake.network
    reference = list(run.method.reference.parameters())  # type: ignore[attr-defined]
    shared = {weight.data_ptr() for weight in generator.network.parameters()}
    assert {weight.data_ptr() for weight in reference} == shared
    trained = {name for name, weight in generator.network.named_parameters() if weight.requires_grad}
    assert trained == {*generator.parameters, *fake.parameters}
    assert not generator.parameters.keys() & fake.parameters.keys()
    assert all(".lora_" in name for name in trained)
    assert len(generator.parameters) == len(fake.parameters) > 8
    assert next(iter(generator.parameters.values())).shape[0] == 3
    assert next(iter(fake.parameters.values())).shape[0] == 2

    for role, loss_of in ((fake, run.method.fake_loss), (generator, run.method.generator_loss)):
        loss = loss_of(batch_of(run)).loss
        with role.active():
            loss.backward()
        for other in (generator, fake):
            ups = [weight.grad for name, weight in other.parameters.items() if ".lora_B." in name]
            assert all((gradient is not None) == (other is role) for gradient in ups)
            assert other is not role or all(gradient.abs().max() > 0 for gradient in ups)
        for weight in generator.network.parameters():
            assert weight.requires_grad or weight.grad is None
            weight.grad = None


def wrappers(outer: Any) -> list[str]:
    """The classes around one of diffusers' networks, the outermost first."""
    inner = getattr(outer, "network", None) or getattr(outer, "vae", None)
    return [] if type(outer).__module__.startswith("diffusers") else [type(outer).__name__, *wrappers(inner)]


def test_wrappers_around_a_network_are_at_most_two_deep(config_of) -> None:  # type: ignore[no-untyped-def]
    for settings in ((), (*BOTH, "precision=bfloat16")):
        run = build_run(config_of(*settings), World.alone("cpu"), Phases(torch.device("cpu")))
        method: Any = run.method
        assert wrappers(method.generator) == ["OneStepGenerator", "Denoiser"]
        assert wrappers(method.fake) == wrappers(method.reference) == ["Denoiser"]
        assert wrappers(run.sampler.decoder) == ["FrozenDecoder"]


def test_adapters_on_other_weights_have_a_copy_of_their_own(config_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tiny.unet(seed=3).save_pretrained(tmp_path / "released")
    run = build_run(
        config_of(*BOTH, f"models.generator.path={tmp_path / 'released'}"),
        World.alone("cpu"),
        Phases(torch.device("cpu")),
    )
    assert run.sampler.trained.network is not run.fake.network
    own = run.sampler.trained.network.get_parameter("conv_in.weight")
    assert torch.equal(own, tiny.unet(seed=3).conv_in.weight) and not own.requires_grad
    assert not any("generator" in name for name, _ in run.fake.network.named_parameters())


def test_a_generator_that_is_trained_wholly_beside_a_fake_with_adapters(config_of) -> None:  # type: ignore[no-untyped-def]
    run = build_run(config_of("models.fake.lora.rank=2"), World.alone("cpu"), Phases(torch.device("cpu")))
    assert run.sampler.trained.network is not run.fake.network
    assert all(weight.requires_grad for weight in run.sampler.trained.network.parameters())
    assert run.sampler.trained.parameters.keys() == dict(run.sampler.trained.network.named_parameters()).keys()


def test_a_run_trains_adapters_alone_and_resumes_to_the_same_bits(config_of) -> None:  # type: ignore[no-untyped-def]
    overrides = (*BOTH, "training.activation_checkpointing=true")
    trainer = Trainer(config_of(*overrides, "training.steps=2", output="straight"))
    network = trainer.generator.network
    frozen = {name: w.detach().clone() for name, w in network.named_parameters() if not w.requires_grad}
    start = {name: w.detach().clone() for name, w in network.named_parameters() if w.requires_grad}
    trainer.run()
    after = dict(network.named_parameters())
    assert frozen and all(torch.equal(after[name], weight) for name, weight in frozen.items())
    assert all(not torch.equal(after[name], weight) for name, weight in start.items() if ".lora_B." in name)

    checkpoint = Path(trainer.config.output) / "checkpoints" / "step_000002"
    for role in ("generator", "fake"):
        saved = read_tensors(checkpoint / f"{role}.safetensors")
        assert saved.keys() == {name for name in start if f".{role}." in name}
        assert all(torch.equal(tensor, after[name]) for name, tensor in saved.items())
    assert read_tensors(checkpoint / "generator_ema.safetensors").keys() == trainer.generator.parameters.keys()

    Trainer(config_of(*overrides, output="cut")).run()
    resumed = Trainer(config_of(*overrides, "training.steps=2", output="cut"), resume="latest")
    resumed.run()
    for name, weight in resumed.generator.network.named_parameters():
        assert torch.equal(weight, after[name]), name


def test_a_reference_that_is_differentiated_is_computed_again_without_adapters(config_of) -> None:  # type: ignore[no-untyped-def]
    """DIDR lets the fake score have adapters, too: nothing is differentiated through it."""
    ended = []
    for kept in ("true", "false"):
        overrides = (*BOTH, "method.name=didr", f"training.activation_checkpointing={kept}", "training.steps=2")
        trainer = Trainer(config_of(*overrides, output=kept))
        trainer.run()
        ended.append(dict(trainer.generator.network.named_parameters()))
    again, whole = ended
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def test_a_checkpoint_of_adapters_is_refused_by_another_kind_of_run(config_of) -> None:  # type: ignore[no-untyped-def]
    from diffpp_fast.training.checkpoint import load_role

    run = build_run(config_of(*BOTH), World.alone("cpu"), Phases(torch.device("cpu")))
    tensors = {name: weight.detach() for name, weight in run.sampler.trained.parameters.items()}
    with pytest.raises(CheckpointError, match=r"names differ.*models\.fake\.lora"):
        load_role(run.fake, tensors, Path("step_000001"))
