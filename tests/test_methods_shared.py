"""Rules for all methods alike: who gets gradient, whose parameters stay as they were, what a batch may change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import SCHEDULES, Convolution, batch_of, gradient_by_x0, quadratic_reward
from torch import nn

from diffpp_fast import Noise
from diffpp_fast.methods import DIDR, DMD2, SIM, DecoupledDMD, DiffInstruct, DiffInstructPP, DiffInstructStar, SiD

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "diff_instruct": (DiffInstruct, {}),
    "diff_instruct_pp": (DiffInstructPP, {"reward": quadratic_reward, "reward_scale": 1.0}),
    "dmd2": (DMD2, {}),
    "decoupled_dmd": (DecoupledDMD, {}),
    "sid": (SiD, {"fake_guidance_scale": 2.0}),
    "sim": (SIM, {}),
    "diff_instruct_star": (DiffInstructStar, {"reward": quadratic_reward, "reward_scale": 1.0, "guidance": "outside"}),
    "didr": (DIDR, {"reward": quadratic_reward, "denoising_steps": 2}),
}


def made(name: str, *networks: Any, **changes: Any) -> Any:
    of, options = METHODS[name]
    return of(*networks, SCHEDULES["epsilon"], **{"guidance_scale": 3.0, **options, **changes})


@pytest.mark.parametrize("name", METHODS)
def test_each_loss_reaches_one_network_only(name: str) -> None:
    generator, fake, reference = (Convolution(seed) for seed in range(3))
    method = made(name, generator, fake, reference)
    fired: list[Any] = []
    for weight in (fake.weight, reference.weight):
        weight.register_post_accumulate_grad_hook(fired.append)

    method.generator_loss(batch_of()).loss.backward()
    assert generator.weight.grad is not None and generator.weight.grad.norm() > 0
    # Neither a gradient nor a hook, which an engine would take for one.
    assert fake.weight.grad is None and reference.weight.grad is None and not fired
    assert fake.weight.requires_grad and reference.weight.requires_grad

    generator.weight.grad = None
    method.fake_loss(batch_of()).loss.backward()
    assert fake.weight.grad is not None and fake.weight.grad.norm() > 0
    assert generator.weight.grad is None and reference.weight.grad is None


@pytest.mark.parametrize("name", METHODS)
def test_the_generators_graph_holds_no_other_network(name: str) -> None:
    """Networks are differentiated and their graphs freed before the generator's backward pass begins."""
    networks = [Convolution(seed) for seed in range(3)]
    loss = made(name, *networks).generator_loss(batch_of()).loss
    leaves, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert leaves == {networks[0].weight}


@pytest.mark.parametrize("name", ["sid", "sim", "diff_instruct_star"])
def test_parameters_are_left_out_of_the_pass_and_put_back(name: str) -> None:
    """Also where it fails, and where one of them was frozen before; a network without parameters may be given, too."""
    states = []

    class Watched(Convolution):
        def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
            states.append((torch.is_grad_enabled(), self.weight.requires_grad))
            return super().forward(x, *rest)

    generator, fake, reference = Convolution(0), Watched(1), Convolution(2).requires_grad_(False)
    made(name, generator, fake, reference).generator_loss(batch_of())
    assert states and set(states) == {(True, False)}
    assert fake.weight.requires_grad and not reference.weight.requires_grad

    def broken(*inputs: Any) -> torch.Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        made(name, generator, fake, broken).generator_loss(batch_of())
    assert fake.weight.requires_grad
    gradients = [
        gradient_by_x0(lambda generator, given=given: made(name, generator, given, reference), batch_of())[1]  # type: ignore[misc]
        for given in (fake, lambda *inputs: fake(*inputs))
    ]
    assert torch.equal(*gradients) and fake.weight.grad is None


@pytest.mark.parametrize("name", ["sid", "sim"])
def test_a_generator_may_live_in_the_fakes_module(name: str) -> None:
    """As adapters of both roles do on one backbone: its own gradient is there, whatever was frozen meanwhile."""
    expected, shared, reference = Convolution(0), Convolution(0), Convolution(2)

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.fake = shared, Convolution(1)

        def forward(self, *inputs: Any) -> torch.Tensor:
            return self.fake(*inputs)

    made(name, expected, Convolution(1), reference).generator_loss(batch_of()).loss.backward()
    made(name, shared, Backbone(), reference).generator_loss(batch_of()).loss.backward()
    assert expected.weight.grad is not None and shared.weight.grad is not None
    assert torch.equal(shared.weight.grad, expected.weight.grad)


@pytest.mark.parametrize("name", METHODS)
def test_a_samples_gradient_does_not_depend_on_the_others(name: str) -> None:
    networks, batch = (Convolution(1), Convolution(2)), batch_of()
    x0, whole = gradient_by_x0(lambda generator: made(name, generator, *networks), batch)
    for part in (slice(0, 1), slice(1, 4)):
        of_part = replace(
            batch,
            samples=batch.samples[part],
            conditioning=batch.conditioning[part],
            null_conditioning=batch.null_conditioning[part],
        )
        samples = nn.Parameter(x0[part])
        made(name, lambda z, c, samples=samples: samples, *networks).generator_loss(of_part).loss.backward()
        assert samples.grad is not None
        torch.testing.assert_close(samples.grad * len(of_part), whole[part] * len(batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_addresses_give_the_same_step(name: str) -> None:
    method = made(name, *(Convolution(seed) for seed in range(3)))
    for loss in (method.generator_loss, method.fake_loss):
        assert torch.equal(loss(batch_of()).loss, loss(batch_of()).loss)
        assert not torch.equal(loss(batch_of()).loss, loss(batch_of(first=104)).loss)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", METHODS)
def test_noise_that_is_kept_gives_the_same_bits(
    name: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    draw = Noise.normal

    def count(self: Noise, *arguments: Any) -> torch.Tensor:
        drawn.append(arguments)
        return draw(self, *arguments)

    monkeypatch.setattr(Noise, "normal", count)

    def losses() -> list[torch.Tensor]:
        def generator(z: torch.Tensor, conditioning: Any) -> torch.Tensor:
            return networks[0](z, conditioning).contiguous(memory_format=memory_format)

        networks = [Convolution(seed) for seed in range(3)]
        method = made(name, generator, *networks[1:])
        outputs = method.fake_loss(batch_of()), method.generator_loss(batch_of())
        for output in outputs:
            output.loss.backward()
        gradients = [network.weight.grad for network in networks[:2]]
        return [*(output.loss for output in outputs), *gradients]

    addressed, draws = losses(), len(drawn)
    monkeypatch.setattr("diffpp_fast.methods.method.LEAST_KEPT_NOISE", 1)
    kept = losses()
    assert len(drawn) - draws > draws
    assert all(torch.equal(one, other) for one, other in zip(addressed, kept, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_logged_is_finite_and_detached(name: str) -> None:
    method = made(name, *(Convolution(seed) for seed in range(3)))
    metrics = method.generator_loss(batch_of()).metrics
    assert {"loss", "score_gap", "score_gradient_norm", "x0_mean", "x0_std"} <= metrics.keys()
    for value in metrics.values():
        assert value.shape == () and value.isfinite() and not value.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_guidance_of_one_is_none_and_asks_for_nothing(name: str) -> None:
    changes = {"guidance_scale": 1.0, **({"fake_guidance_scale": 1.0} if name == "sid" else {})}
    unguided = replace(batch_of(), null_conditioning=None)
    made(name, *(Convolution(seed) for seed in range(3)), **changes).generator_loss(unguided)
    with pytest.raises(ValueError, match=r"guidance_scale 3\.0 needs Batch\.null_conditioning"):
        made(name, *(Convolution(seed) for seed in range(3)), **{**changes, "guidance_scale": 3.0}).generator_loss(
            unguided
        )


@pytest.mark.parametrize("name", METHODS)
def test_shared_arguments_are_checked_by_name(name: str) -> None:
    networks = Convolution(0), Convolution(1), Convolution(2)
    for changes, message in (
        ({"t_range": (500, 500)}, r"t_range must lie within \[0, 1000\)"),
        ({"fake_rounds": 0}, "fake_rounds must be at least 1"),
        ({"fake_weighting": "snr"}, "fake_weighting must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            made(name, *networks, **changes)
