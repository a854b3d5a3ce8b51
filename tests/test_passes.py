"""Passes of one network as one call: the same predictions, gradients and runs as by a call each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from method_cases import SCHEDULES, Convolution, batch_of, gradient_by_x0, quadratic_reward
from torch import nn

from benchmarks.__main__ import main
from benchmarks.passes import ways_of
from diffpp_fast.methods import (
    DIDR,
    DMD2,
    SIM,
    Batch,
    DecoupledDMD,
    DiffInstruct,
    DiffInstructPP,
    DiffInstructStar,
    SiD,
)
from diffpp_fast.methods.passes import MOST_ON_CPU, MOST_ON_GPU
from diffpp_fast.networks import Conditioning, Denoiser, freeze, fuse
from diffpp_fast.networks.conditioning import Unjoinable, join
from diffpp_fast.networks.lora import Adapters, Part
from diffpp_fast.training import Trainer, load_config
from diffpp_fast.training.build.run import batches_passes

REWARD: dict[str, Any] = {"reward": quadratic_reward, "reward_scale": 1.0}
#: By name: class, options, and its calls of the fake score and the reference in the generator's loss, batched or not.
METHODS: dict[str, tuple[Any, dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "diff_instruct": (DiffInstruct, {}, (1, 1), (1, 2)),
    "rescaled": (DiffInstruct, {"guidance_rescale": 0.7}, (1, 1), (1, 2)),
    "diff_instruct_pp": (DiffInstructPP, REWARD, (1, 1), (1, 2)),
    "dmd2": (DMD2, {}, (1, 1), (1, 2)),
    "decoupled_dmd": (DecoupledDMD, {}, (1, 2), (1, 3)),
    "sid": (SiD, {"fake_guidance_scale": 2.0}, (1, 1), (2, 2)),
    "sim": (SIM, {}, (1, 1), (1, 2)),
    "diff_instruct_star": (DiffInstructStar, REWARD, (1, 1), (1, 2)),
    "outside": (DiffInstructStar, {**REWARD, "guidance": "outside"}, (1, 2), (1, 2)),
    "didr": (DIDR, {**REWARD, "denoising_steps": 2}, (1, 2), (1, 4)),
}


class Counted(Convolution):
    """Notes how many samples each call had."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        self.calls.append(len(x))
        return super().forward(x, *rest)


def made(name: str, *networks: Any, batched: bool | None) -> Any:
    of, options, *_ = METHODS[name]
    return of(*networks, SCHEDULES["epsilon"], guidance_scale=3.0, batched_passes=batched, **options)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_same_gradient_with_fewer_calls(name: str) -> None:
    *_, together, apart = METHODS[name]
    found = []
    for batched, calls in ((True, together), (False, apart)):
        fake, reference = Counted(1), Counted(2)
        _, gradient = gradient_by_x0(
            lambda generator, pair=(fake, reference), batched=batched: made(name, generator, *pair, batched=batched),  # type: ignore[misc]
            batch_of(),
        )
        assert (len(fake.calls), len(reference.calls)) == calls
        assert sum(fake.calls) + sum(reference.calls) == 4 * sum(apart)
        found.append(gradient)
        loss = made(name, Convolution(0), fake, reference, batched=batched).fake_loss(batch_of()).loss
        (weights,) = torch.autograd.grad(loss, fake.weight)
        found.append(weights)
    assert error(found[0], found[2]) < 1e-6 and error(found[1], found[3]) < 1e-6


def test_small_calls_are_one_by_themselves() -> None:
    def calls(count: int, side: int, device: str) -> int:
        asked = []

        def network(x: torch.Tensor, *_: Any) -> torch.Tensor:
            asked.append(len(x))
            return x

        given = torch.zeros(count, 1, 1, 1, device=device)
        samples = torch.zeros(count, dtype=torch.int64, device=device)
        batch = Batch(samples, given, shape=(1, side, side), null_conditioning=given)
        method = DiffInstruct(
            lambda z, _: z.requires_grad_(), network, network, SCHEDULES["epsilon"], guidance_scale=2.0
        )
        at = method._noised(batch, torch.zeros(count, 1, side, side, device=device))
        method._ask_reference(batch, at)
        return len(asked)

    assert MOST_ON_CPU == 2 * 64 * 64 and MOST_ON_GPU == 8 * 64 * 64
    assert (calls(1, 64, "cpu"), calls(2, 64, "cpu")) == (1, 2)
    # As a plan counts a GPU.
    assert (calls(4, 64, "meta"), calls(5, 64, "meta")) == (1, 2)
    with pytest.raises(ValueError, match="batched_passes must be True, False or None, got 'yes'"):
        DiffInstruct(nn.Identity(), nn.Identity(), nn.Identity(), SCHEDULES["epsilon"], batched_passes="yes")  # type: ignore[arg-type]


# Conditionings


class Pair(NamedTuple):
    a: Any
    b: Any


def test_conditionings_are_put_one_after_another() -> None:
    one, two = torch.randn(3, 5, 4), torch.randn(1, 5, 4).expand(3, 5, 4)
    both = torch.cat([one, two])
    assert torch.equal(join([one, two], 3), both)
    nested = join(
        [Conditioning(("p",) * 3, {"x": Pair(c, None), "more": {"y": (c, [c, c])}, "n": 2}) for c in (one, two)], 3
    )
    assert nested.prompts == ("p",) * 6 and nested.tensors["n"] == 2 and nested.tensors["x"].b is None
    assert torch.equal(nested.tensors["x"].a, both) and torch.equal(nested.tensors["more"]["y"][1][1], both)
    assert join([["a", "b", "c"], ["", "", ""]], 3) == ["a", "b", "c", "", "", ""]
    assert join([None, None], 3) is None


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((torch.zeros(3, 5, 4), torch.zeros(3, 2, 4)), r"torch.float32 \[3, 5, 4\] and torch.float32 \[3, 2, 4\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 2).double()), "float64"),
        ((torch.zeros(1, 2), torch.zeros(1, 2)), "for 3 samples each"),
        (({"a": 1}, {"b": 1}), "only one of them has a, b"),
        ((torch.zeros(3), ["a", "b", "c"]), "Tensor and list"),
        (({"n": 1}, {"n": 2}), "n is 1 and 2"),
        (([torch.zeros(3, 2)] * 3, [torch.zeros(3, 2)] * 3), "as many tensors as there are samples"),
        (((torch.zeros(3),), (torch.zeros(3),) * 2), "1 and 2 entries"),
        ((object(), object()), "the conditioning is object"),
    ],
)
def test_what_can_not_be_one_batch_is_two_calls(pair: tuple[Any, Any], said: str) -> None:
    with pytest.raises(Unjoinable, match=said):
        join(pair, 3)
    asked = []

    def reference(x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        asked.append(conditioning)
        return x

    batch = Batch(torch.arange(3), pair[0], shape=(2, 3, 3), null_conditioning=pair[1])
    for batched in (None, True):
        method = DiffInstruct(
            nn.Identity(), nn.Identity(), reference, SCHEDULES["epsilon"], guidance_scale=2.0, batched_passes=batched
        )
        at = method._noised(batch, torch.zeros(3, 2, 3, 3))
        if batched:
            with pytest.raises(ValueError, match=f"batched_passes: .* of the reference .*{said}.*leave it None"):
                method._ask_reference(batch, at)
        else:
            method._ask_reference(batch, at)
            assert asked[0] is pair[0] and asked[1] is pair[1]


@pytest.mark.parametrize("build", [tiny.unet, tiny.pixart])
def test_text_of_other_lengths_is_padded_behind_its_mask(build: Callable[[], nn.Module]) -> None:
    network = build().eval().requires_grad_(False)
    if build is tiny.pixart:
        nn.init.normal_(network.proj_out.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    torch.manual_seed(0)
    mask = torch.ones(2, 7)
    mask[0, 4:] = 0
    prompt = {"encoder_hidden_states": torch.randn(2, 7, tiny.TEXT_WIDTH), "encoder_attention_mask": mask}
    empty = {"encoder_hidden_states": torch.randn(2, 3, tiny.TEXT_WIDTH), "encoder_attention_mask": torch.ones(2, 3)}
    x, t, denoise = torch.randn(2, *tiny.LATENT), torch.tensor([3, 900]), Denoiser(network)
    apart = torch.cat([denoise(x, t, prompt), denoise(x, t, empty)])
    assert error(denoise(torch.cat([x, x]), torch.cat([t, t]), join([prompt, empty], 2)), apart) < 1e-6
    # A sample without a token attends to all of them, and to padding.
    with pytest.raises(Unjoinable):
        join([prompt, {**empty, "encoder_attention_mask": torch.zeros(2, 3)}], 2)


# Networks


def conditionings(build: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)

    def one() -> dict[str, Any]:
        tensors: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, tiny.TEXT_WIDTH)}
        if build is tiny.sdxl_unet:
            tensors["added_cond_kwargs"] = {
                "text_embeds": torch.randn(2, tiny.TEXT_WIDTH),
                "time_ids": torch.ones(2, 6),
            }
        return tensors

    return one(), one()


def adapted(build: Any, dtype: torch.dtype) -> tuple[Denoiser, Denoiser]:
    """A network as the reference and as a fake score, beside which a generator has adapters, too."""
    network: Any = build().eval()
    if build is tiny.pixart:
        nn.init.normal_(network.proj_out.weight, std=0.3)
    network = nn.Module.to(network, dtype)
    fuse(network)
    adapters = Adapters(network)
    for stream, name in enumerate(("generator", "fake")):
        targets = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "proj_in"]
        weights = adapters.add(name, rank=2, alpha=4.0, targets=targets, seed=7, stream=stream)
        with torch.no_grad():
            for weight in weights.values():
                weight.copy_(0.3 * torch.randn_like(weight))
    low = None if dtype == torch.float32 else dtype
    fake, reference = (Denoiser(network, dtype=low, adapters=adapters, adapter=name) for name in ("fake", None))
    return fake, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny.unet, tiny.sdxl_unet, tiny.pixart])
def test_an_adapter_acts_on_a_part_of_the_batch(build: Any, dtype: torch.dtype) -> None:
    given, null = conditionings(build)
    fake, reference = adapted(build, dtype)
    calls: list[int] = []
    reference.network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    batch = Batch(torch.arange(2), given, seed=1, shape=tiny.LATENT, null_conditioning=null)
    x0 = torch.randn(2, *tiny.LATENT)
    outputs = {}
    for batched in (True, False):
        method = DMD2(nn.Identity(), fake, reference, SCHEDULES["epsilon"], guidance_scale=3.0, batched_passes=batched)
        with torch.no_grad():
            ours, guided = method._ask(batch, method._noised(batch, x0))
        assert guided.uncond is not None
        outputs[batched] = ours, guided.cond, guided.uncond
    assert calls == [6, 2, 2, 2]
    allowed = 1e-6 if dtype == torch.float32 else 2e-2
    for one, other in zip(outputs[True], outputs[False], strict=True):
        assert error(one, other) < allowed
    # The adapter is in it, and not in the reference.
    assert error(outputs[True][0], outputs[True][1]) > 10 * allowed


@pytest.mark.parametrize("name", ["sid", "sim"])
def test_what_is_differentiated_keeps_the_fake_score_apart(name: str) -> None:
    fake, reference = adapted(tiny.unet, torch.float32)
    calls: list[int] = []
    reference.network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    gradients = []
    given, null = conditionings(tiny.unet)
    for batched in (True, False):
        x0 = nn.Parameter(torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(0)))
        made(name, lambda z, _, x0=x0: x0 + 0 * z, fake, reference, batched=batched).generator_loss(
            Batch(torch.arange(2), given, seed=1, shape=tiny.LATENT, null_conditioning=null)
        ).loss.backward()
        gradients.append(x0.grad)
    assert calls == ([4, 4, 2, 2, 2, 2] if name == "sid" else [2, 4, 2, 2, 2])
    assert error(*gradients) < 1e-5  # type: ignore[arg-type]


def test_a_frozen_and_fused_network_gives_the_same_gradient() -> None:
    network = tiny.unet().eval()
    freeze(network)
    given, null = conditionings(tiny.unet)
    gradients = []
    for batched in (True, False):
        x0 = nn.Parameter(torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(0)))
        method = SIM(
            lambda z, _, x0=x0: x0 + 0 * z,
            Denoiser(tiny.unet(seed=1).eval()),
            Denoiser(network),
            SCHEDULES["epsilon"],
            guidance_scale=3.0,
            batched_passes=batched,
        )
        batch = Batch(torch.arange(2), given, seed=1, shape=tiny.LATENT, null_conditioning=null)
        method.generator_loss(batch).loss.backward()
        gradients.append(x0.grad)
    assert error(*gradients) < 1e-5  # type: ignore[arg-type]


def test_rows_that_samples_can_not_share_are_refused() -> None:
    fake, reference = adapted(tiny.unet, torch.float32)
    x, t, (given, _) = torch.randn(2, *tiny.LATENT), torch.tensor([3, 900]), conditionings(tiny.unet)
    assert reference.joins(fake) and not fake.joins(reference) and not reference.joins(Denoiser(tiny.unet()))
    layer: Any = next(part for part in reference.network.modules() if hasattr(part, "lora_A"))
    assert reference.adapters is not None
    with reference.adapters.active("fake", Part(1, 2)), pytest.raises(RuntimeError, match="1 of 2 samples got 3 rows"):
        layer(torch.randn(3, layer.in_features))
    assert layer.part is None
    with torch.no_grad():
        assert torch.equal(reference(x, t, given), reference(x, t, given, first=(fake, 0)))


@pytest.mark.slow
def test_a_compiled_network_serves_both_roles_in_one_call() -> None:
    """As far as tracing goes: `eager` is dynamo without a compiler behind it."""
    fake, reference = adapted(tiny.unet, torch.float32)
    given, null = conditionings(tiny.unet)
    batch = Batch(torch.arange(2), given, seed=1, shape=tiny.LATENT, null_conditioning=null)
    method = DMD2(nn.Identity(), fake, reference, SCHEDULES["epsilon"], guidance_scale=3.0, batched_passes=True)
    at = method._noised(batch, torch.randn(2, *tiny.LATENT))
    torch._dynamo.reset()
    with torch.no_grad():
        expected, plain = method._ask(batch, at), fake(at.x_t, at.t, given)
        reference.network.compile(backend="eager")
        for _ in range(2):  # the roles in turn
            assert error(fake(at.x_t, at.t, given), plain) < 1e-6
            ours, guided = method._ask(batch, at)
            assert error(ours, expected[0]) < 1e-6 and error(guided.cond, expected[1].cond) < 1e-6


@pytest.mark.parametrize("model", ["tiny", "pixart"])
def test_the_benchmark_asks_for_the_same_in_all_ways(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    if model == "tiny":
        assert main(["passes", "--model", "tiny", "--latent", "8", "--batch", "2", "--rounds", "1"]) == 0
        assert "| tiny | 8 | 2 |" in capsys.readouterr().out
    with torch.no_grad():
        two, *others = (way() for way in ways_of(model, 8, 2, torch.device("cpu")).values())
    assert all(error(other, two) < 1e-5 for other in others)


# Runs


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_logs_the_same(tmp_path: Path, lora: bool) -> None:
    base = tiny.write_base(tmp_path / "base", "stable_diffusion")
    adapters = ["models.generator.lora.rank=3", "models.fake.lora={rank: 2, alpha: 4}"] if lora else []
    logs = []
    for batched in ("true", "false"):
        output = tmp_path / batched
        keys = [f"output={output}", f"training.batched_passes={batched}", "training.steps=3", "training.log_every=1"]
        stable = [f"optimizers.{role}={{lr: 1e-3, eps: 1e-2}}" for role in ("generator", "fake")]
        Trainer(load_config(base, [*keys, *stable, *adapters, "method.guidance_scale=3.0"])).run()
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        logs.append([row for row in lines if "generator/loss" in row])
    assert len(logs[0]) == len(logs[1]) == 3
    names = [name for name in logs[0][0] if name.startswith(("generator/", "fake/"))]
    assert len(names) > 8
    for one, other in zip(*logs, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_the_trainer_chooses_by_what_a_call_costs(project: Path) -> None:
    assert batches_passes(load_config(project, [])) is None
    assert batches_passes(load_config(project, ["distributed.reference=shard"])) is True
    assert batches_passes(load_config(project, ["training.compile=true"])) is False
    both = ["training.compile=true", "training.batched_passes=true"]
    assert batches_passes(load_config(project, both)) is True
