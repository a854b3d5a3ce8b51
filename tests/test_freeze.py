"""Networks that are differentiated by their inputs alone: the same values and gradients, less kept, undone at will."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo.testing
from test_fuse import NETWORKS, assert_same, build, cast
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benchmarks import frozen
from benchmarks.__main__ import main
from benchmarks.memory import alive_bytes, kept_bytes
from diffpp_fast import networks
from diffpp_fast.networks.freezing import RECOMPUTE

NAMES = ["sd15", "sdxl", "scale_shift", "resampling", "pixart", "sd3", "flux"]
every_network = pytest.mark.parametrize("name", NAMES)
every_recomputation = pytest.mark.parametrize("recompute", RECOMPUTE)


def network_of(name: str) -> Any:
    return build(name).eval()


def by_inputs(network: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output and its gradients by the samples and by the conditioning."""
    inputs = cast(inputs, next(network.parameters()).dtype)
    leaves = [next(iter(inputs)), "encoder_hidden_states"]
    for name in leaves:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    output = network(**inputs, return_dict=False)[0]
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(output, [inputs[name] for name in leaves], probe.to(output.dtype), allow_unused=True)
    found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {"output": output.detach(), **found}


def state(network: nn.Module) -> list[Any]:
    """All that freezing may change."""
    parts = [(type(part), sorted(vars(part))) for part in network.modules()]
    return [*parts, *((name, weight.requires_grad) for name, weight in network.named_parameters())]


@every_network
@every_recomputation
def test_outputs_and_gradients_are_those_of_the_network_as_it_was(name: str, recompute: str) -> None:
    network, inputs = network_of(name), NETWORKS[name][1]()
    single = copy.deepcopy(network).float()
    oracle, unfrozen = by_inputs(network, inputs), by_inputs(single, inputs)
    keys = list(network.state_dict())
    assert networks.freeze(network, recompute=recompute) == networks.freeze(single, recompute=recompute) > 0
    assert networks.freeze(network, recompute=recompute) == 0
    assert list(network.state_dict()) == keys and not any(weight.requires_grad for weight in network.parameters())
    assert_same(by_inputs(network, inputs), oracle, 1e-6 if name == "flux" else 1e-11)
    assert_same(by_inputs(single, inputs), unfrozen, 1e-5)
    assert all(weight.grad is None for weight in network.parameters())


@every_network
@every_recomputation
@pytest.mark.parametrize("fused", [False, True])
def test_unfreezing_restores_everything(name: str, recompute: str, fused: bool) -> None:
    network, inputs = network_of(name), NETWORKS[name][1]()
    next(network.parameters()).requires_grad_(False)
    if fused:
        networks.fuse(network)
    before_freezing = copy.deepcopy(network)
    before, results = state(network), by_inputs(network, inputs)
    networks.freeze(network, recompute=recompute)
    frozen = copy.deepcopy(network)
    count = networks.freeze(copy.deepcopy(before_freezing), recompute=recompute)
    assert networks.unfreeze(network) == count > 0
    assert networks.unfreeze(network) == 0
    assert state(network) == before
    assert all(torch.equal(value, results[key]) for key, value in by_inputs(network, inputs).items())
    networks.unfreeze(frozen)
    assert state(frozen) == before


#: At most these shares of eager's bytes. PixArt keeps nothing for frozen weights as it is, and no product twice.
SHARES = {
    "sd15": {"none": 0.60, "feed_forward": 0.40, "projections": 0.29, "blocks": 0.15},
    "sdxl": {"none": 0.73, "feed_forward": 0.43, "projections": 0.27, "blocks": 0.15},
    "pixart": {"none": 1.00, "feed_forward": 0.70, "projections": 0.45, "blocks": 0.15},
}


def true_layers(name: str) -> tuple[Any, dict[str, Any]]:
    """One level of each network's true widths, at a quarter of its true picture's pixels."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    if name == "pixart":
        network: Any = PixArtTransformer2DModel(num_layers=2, sample_size=64, cross_attention_dim=1152)
        network.caption_projection = None
        text = torch.randn(1, 30, 1152)
        return network.eval(), {"timestep": torch.tensor([400]), "encoder_hidden_states": text}
    levels: dict[str, Any] = {
        "block_out_channels": (320, 640),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_type": None,
    }
    if name == "sdxl":
        levels |= {
            "block_out_channels": (320, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 4),
            "attention_head_dim": (5, 20),
            "use_linear_projection": True,
        }
    network = UNet2DConditionModel(layers_per_block=1, cross_attention_dim=768, **levels)
    return network.eval(), {"timestep": torch.tensor([400]), "encoder_hidden_states": torch.randn(1, 19, 768)}


def forward_of(network: nn.Module, inputs: dict[str, Any]) -> Any:
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    if hasattr(network, "conv_in"):
        extra = {}
    return lambda x: network(x, **inputs, **extra, return_dict=False)[0]


@pytest.mark.parametrize("name", SHARES)
def test_less_is_kept_for_the_gradient_of_the_input(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, inputs = true_layers(name)
        forward, x = forward_of(network.requires_grad_(False), inputs), torch.empty(1, 4, 32, 32)
        eager = alive_bytes(forward, x, network)
        for recompute, share in SHARES[name].items():
            networks.freeze(network, recompute=recompute)
            assert alive_bytes(forward, x, network) <= share * eager, recompute
            networks.unfreeze(network)


@every_recomputation
def test_without_gradients_nothing_is_kept(recompute: str) -> None:
    network, inputs = network_of("sd15"), NETWORKS["sd15"][1]()
    sample = inputs.pop("sample")
    networks.freeze(network, recompute=recompute)
    with torch.no_grad():
        assert kept_bytes(lambda x: network(x, **inputs, return_dict=False)[0], sample, network) == 0


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("pixart", "none"), ("pixart", "projections"), pytest.param("sd15", "none", marks=pytest.mark.slow)],
)
def test_torch_compile_makes_one_graph(name: str, recompute: str) -> None:
    network, inputs = network_of(name).float(), NETWORKS[name][1]()
    expected = by_inputs(network, inputs)
    networks.freeze(network, recompute=recompute)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    actual = by_inputs(torch.compile(network, fullgraph=True, backend=counter), inputs)
    assert_same(actual, expected, 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("recompute", ["none", "projections"])
def test_activation_checkpointing(recompute: str) -> None:
    network, inputs = network_of("sdxl"), NETWORKS["sdxl"][1]()
    expected = by_inputs(network, inputs)
    networks.freeze(network, recompute=recompute)
    network.enable_gradient_checkpointing()
    assert_same(by_inputs(network.train(), inputs), expected, 1e-11)


def test_transforms_and_channels_last() -> None:
    network, inputs = network_of("sd15"), NETWORKS["sd15"][1]()
    networks.set_attention(network, "math")  # torch's others have no tangents
    sample = inputs.pop("sample")

    def forward(x: Tensor) -> Tensor:
        return network(x, **inputs, return_dict=False)[0]

    tangents = torch.func.jvp(forward, (sample,), (torch.ones_like(sample),))
    expected = by_inputs(network, {"sample": sample, **inputs})
    networks.freeze(network, recompute="projections")
    torch.testing.assert_close(torch.func.jvp(forward, (sample,), (torch.ones_like(sample),)), tangents)
    last = {"sample": sample.contiguous(memory_format=torch.channels_last), **inputs}
    assert_same(by_inputs(network.to(memory_format=torch.channels_last), last), expected, 1e-11)


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"stride": (3, 2), "dilation": 2, "groups": 2}])
@pytest.mark.parametrize("size", [(9, 8), (12, 11)])
def test_convolutions_with_strides(options: dict[str, Any], size: tuple[int, int]) -> None:
    layer = nn.Conv2d(4, 6, 3, **options).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    networks.freeze(layer)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x), expected)
    torch.autograd.gradgradcheck(layer, x)


def test_what_is_left_and_why(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding_mode="reflect"), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3))
    hooked = nn.Conv2d(4, 4, 3)
    hooked.forward = hooked.forward  # type: ignore[method-assign]
    module.append(hooked)
    with caplog.at_level(logging.INFO, "diffpp_fast"):
        networks.freeze(module)
    reasons = [row.reason for row in networks.freezing_report(module)]
    assert reasons == [
        "its padding is 'reflect', (0, 0)",
        "it is a Conv1d, not a Conv2d",
        None,
        "it has a forward of its own (a hook): freeze before that is put on",
    ]
    assert "freeze Sequential: frozen: 1 Conv2d" in caplog.text and "1 Conv1d left: it is a Conv1d" in caplog.text


def test_what_is_trained_is_refused() -> None:
    network: Any = tiny.unet()
    before = state(network)
    with pytest.raises(ValueError, match="freeze: recompute is 'all'; known: none, feed_forward, projections, blocks"):
        networks.freeze(network, recompute="all")
    network.conv_in.bias.grad = torch.zeros_like(network.conv_in.bias)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is trained: conv_in.bias holds a gradient"):
        networks.freeze(network)
    network.zero_grad()
    assert state(network) == before
    networks.freeze(network)
    with pytest.raises(ValueError, match="is frozen with recompute='none': call unfreeze before 'blocks'"):
        networks.freeze(network, recompute="blocks")
    with pytest.raises(RuntimeError, match=r"is frozen: call networks.unfreeze first"):
        networks.unfuse(network)
    network.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"would get none: call networks.unfreeze before the network is trained"):
        by_inputs(network.double(), NETWORKS["sd15"][1]())
    network.conv_in.forward = network.conv_in.forward
    with pytest.raises(RuntimeError, match="unfreeze: conv_in was wrapped after it was frozen"):
        networks.unfreeze(network)
    assert type(network.conv_in) is not nn.Conv2d


def test_adapters_are_refused() -> None:
    network: Any = tiny.unet()
    networks_before = state(network)
    from diffpp_fast.networks.lora import Adapters

    adapted = copy.deepcopy(network)
    Adapters(adapted).add("a", rank=2, alpha=2, targets=["to_q"], seed=0, stream=1)
    with pytest.raises(ValueError, match=r"has adapters, as in .*to_q, which are trained: freeze it before they come"):
        networks.freeze(adapted)
    assert state(network) == networks_before


@pytest.mark.slow
def test_the_command_that_measures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def build_tiny(name: str) -> tuple[Any, dict[str, Any]]:
        text = torch.randn(1, 5, tiny.TEXT_WIDTH)
        network = tiny.unet().eval().requires_grad_(False)
        return network, {"timestep": torch.tensor([400]), "encoder_hidden_states": text, "return_dict": False}

    monkeypatch.setattr(frozen, "build", build_tiny)
    monkeypatch.setattr(frozen, "SIDES", {"sd15": 16})
    threads = str(torch.get_num_threads())
    arguments = ["frozen", "--device", "cpu", "--models", "sd15", "--side", "8", "--rounds", "1", "--threads", threads]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"\n| sd15 | freeze, {recompute} |" in shown for recompute in RECOMPUTE)
