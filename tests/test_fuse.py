"""Networks with fused blocks do what they did: outputs, gradients, and all that is done with networks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.autograd import forward_ad

from benchmarks import blocks
from benchmarks.__main__ import main
from benchmarks.memory import saved_bytes
from diffpp_fast import networks, ops
from diffpp_fast.networks import fusion
from diffpp_fast.networks.families.z_image import ZImage
from diffpp_fast.networks.fused_blocks import FusedEntrance

F64 = torch.float64


def unet_inputs(sdxl: bool = False) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, *tiny.LATENT, dtype=F64),
        "timestep": torch.tensor([3, 900]),
        "encoder_hidden_states": torch.randn(2, 5, tiny.TEXT_WIDTH, dtype=F64),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    if sdxl:
        text, ids = torch.randn(2, tiny.TEXT_WIDTH, dtype=F64), torch.randint(1024, (2, 6))
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    return inputs


def pixart_inputs() -> dict[str, Any]:
    inputs = unet_inputs()
    return {"hidden_states": inputs.pop("sample"), **inputs}


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, *tiny.LATENT, dtype=F64),
        "encoder_hidden_states": torch.randn(2, 5, tiny.TEXT_WIDTH, dtype=F64),
        "pooled_projections": torch.randn(2, 8, dtype=F64),
        "timestep": torch.tensor([3.0, 900.0], dtype=F64),
    }


def flux_inputs() -> dict[str, Any]:
    """Nine places in the picture and five words."""
    inputs = {**sd3_inputs(), "hidden_states": torch.randn(2, 9, 8, dtype=F64)}
    ids = torch.stack([torch.zeros(9), torch.arange(9.0) // 3, torch.arange(9.0) % 3], dim=1)
    return {**inputs, "timestep": inputs["timestep"] / 1000, "img_ids": ids, "txt_ids": torch.zeros(5, 3)}


def z_image() -> nn.Module:
    network = tiny.z_image()
    ZImage().prepare(network)
    return network


def z_image_inputs() -> dict[str, Any]:
    text, mask = torch.randn(2, 35, tiny.TEXT_WIDTH, dtype=F64), torch.ones(2, 35, dtype=torch.int64)
    mask[1, 3:] = 0
    times = torch.tensor([0.1, 0.9], dtype=F64)
    return {"x": torch.randn(2, *tiny.LATENT, dtype=F64), "t": times, "cap_feats": text, "cap_mask": mask}


def sana_inputs() -> dict[str, Any]:
    inputs = pixart_inputs()
    return {**inputs, "timestep": torch.tensor([3.0, 900.0], dtype=F64)}


def vae_inputs() -> dict[str, Any]:
    return {"sample": torch.randn(2, 3, 16, 16, dtype=F64)}


#: Network, its inputs, and how many blocks of each kind fuse.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], dict[str, int]]] = {
    "sd15": (tiny.unet, unet_inputs, {"ResnetBlock2D": 6, "GroupNorm": 4, "GEGLU": 3}),
    "sdxl": (
        lambda: tiny.sdxl_unet(),
        lambda: unet_inputs(sdxl=True),
        {"ResnetBlock2D": 8, "GroupNorm": 5, "GEGLU": 8},
    ),
    "scale_shift": (
        lambda: tiny.unet(
            resnet_time_scale_shift="scale_shift", down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D")
        ),
        unet_inputs,
        {"ResnetBlock2D": 7, "GroupNorm": 3, "GEGLU": 2},
    ),
    "resampling": (
        lambda: tiny.unet(
            down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "UpBlock2D"),
            resnet_skip_time_act=True,
            resnet_out_scale_factor=1.5,
        ),
        unet_inputs,
        {"ResnetBlock2D": 8, "GroupNorm": 1},
    ),
    "pixart": (tiny.pixart, pixart_inputs, {"BasicTransformerBlock": 2}),
    "sd3": (tiny.sd3, sd3_inputs, {"JointTransformerBlock": 3}),
    "flux": (
        tiny.flux,
        flux_inputs,
        {"FluxTransformerBlock": 2, "FluxAttention": 4, "AdaLayerNormZeroSingle": 2},
    ),
    "z_image": (z_image, z_image_inputs, {"ZImageTransformerBlock": 4, "Attention": 4, "FinalLayer": 1}),
    "sana": (tiny.sana, sana_inputs, {"SanaTransformerBlock": 2, "SanaModulatedNorm": 1}),
    "vae": (tiny.vae, vae_inputs, {"ResnetBlock2D": 10, "GroupNorm": 2}),
}
#: Networks that normalise or rotate in float32, whatever their dtype.
IN_FLOAT32 = ("flux", "z_image", "sana")
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name: str) -> nn.Module:
    """In float64, with every parameter that begins at 0 or 1 moved away."""
    network = NETWORKS[name][0]().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: cast(each, dtype) for key, each in value.items()}
    return value.to(dtype) if value.is_floating_point() else value


def step(network: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output and the gradients of all parameters and of the first input."""
    dtype = next(network.parameters()).dtype
    inputs = cast(inputs, dtype)
    first = next(iter(inputs))
    inputs[first] = inputs[first].detach().requires_grad_()
    output = network(**inputs, return_dict=False)
    output = output if isinstance(output, Tensor) else output[0]
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    named = {"input": inputs[first], **dict(network.named_parameters())}
    named = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    grads = torch.autograd.grad(output, list(named.values()), probe, allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return {"output": output.detach(), **found}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every result as a whole; a gradient that is zero but for rounding is held against the others."""
    assert actual.keys() == expected.keys()
    least = 1e-2 * max(float(value.norm()) for value in expected.values())
    for name, value in actual.items():
        error = (value.double() - expected[name].double()).norm()
        assert error <= tolerance * max(float(expected[name].norm()), least), name


@every_network
def test_outputs_and_gradients_are_those_of_the_unfused_network(name: str) -> None:
    network, inputs = build(name), NETWORKS[name][1]()
    oracle = step(network, inputs)
    single = copy.deepcopy(network).float()
    unfused = step(single, inputs)
    keys = list(network.state_dict())
    count = sum(NETWORKS[name][2].values())
    assert networks.fuse(network) == networks.fuse(single) == count
    assert networks.fuse(network) == 0
    assert list(network.state_dict()) == keys
    assert_same(step(network, inputs), oracle, 1e-6 if name in IN_FLOAT32 else 1e-11)
    fused = step(single, inputs)
    for key, value in oracle.items():
        # Twice the unfused network's rounding, and what is left where that happens to be next to nothing.
        allowed = 2.0 * (unfused[key].double() - value).norm() + 2e-6 * value.norm() + 1e-5
        assert (fused[key].double() - value).norm() <= allowed, key


def test_flux_attention_with_another_processor_is_left() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    network = build("flux")
    network.transformer_blocks[0].attn.processor = FluxIPAdapterAttnProcessor(32, 32)
    networks.fuse(network)
    left = {row.name: row.reason for row in networks.fusion_report(network) if not row.fused}
    assert left == {"transformer_blocks.0.attn": "its processor is a FluxIPAdapterAttnProcessor"}


@pytest.mark.parametrize("name", ["sd15", "scale_shift", "pixart"])
def test_tangents_are_those_of_the_unfused_network(name: str) -> None:
    network: Any = build(name).requires_grad_(False)
    network.set_attn_processor(AttnProcessor())  # torch's scaled_dot_product_attention has no tangents on the CPU
    inputs = NETWORKS[name][1]()
    first = next(iter(inputs))
    x = inputs.pop(first)
    tangent = torch.randn_like(x)

    def output(x: Tensor) -> Tensor:
        found: Tensor = network(**{first: x}, **inputs, return_dict=False)[0]
        return found

    expected = torch.func.jvp(output, (x,), (tangent,))
    assert networks.fuse(network) > 0
    torch.testing.assert_close(torch.func.jvp(output, (x,), (tangent,)), expected)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(output(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, expected[1])
    assert expected[1].norm() > 1


@every_network
def test_the_report_names_every_block(name: str) -> None:
    network = build(name)
    before = networks.fusion_report(network)
    assert not any(row.fused for row in before)
    networks.fuse(network)
    rows = networks.fusion_report(network)
    fused = [row for row in rows if row.fused]
    kinds = [row.kind for row in fused]
    assert {kind: kinds.count(kind) for kind in kinds} == NETWORKS[name][2]
    assert [row.name for row in rows] == [row.name for row in before]
    assert all(row.reason is None for row in fused)
    for row in fused:
        assert network.get_submodule(row.name).__class__.__name__.startswith("Fused")
    left = {row.name: row.reason for row in rows if not row.fused}
    norms = {name for name, part in network.named_modules() if type(part) is nn.GroupNorm}
    assert norms <= left.keys()
    if name == "vae":
        assert set(left.values()) == {"Attention has no fused version"}
    elif name == "pixart":
        assert left == {"norm_out": "its modulation is part of the network's forward, and is small"}
    else:
        assert left == {}


@every_network
def test_unfuse_restores_everything(name: str) -> None:
    network, inputs = build(name), NETWORKS[name][1]()
    classes = [type(part) for part in network.modules()]
    attributes = [set(vars(part)) for part in network.modules()]
    before = step(network, inputs)
    count = networks.fuse(network)
    assert networks.unfuse(network) == count
    assert networks.unfuse(network) == 0
    assert [type(part) for part in network.modules()] == classes
    assert [set(vars(part)) for part in network.modules()] == attributes
    after = step(network, inputs)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["sd15", "pixart", "vae"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    network, inputs = build(name).float(), NETWORKS[name][1]()
    networks.fuse(network)
    fused = step(network, inputs)
    network.save_pretrained(tmp_path / "fused")
    networks.unfuse(network)
    network.save_pretrained(tmp_path / "unfused")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "unfused" / file).read_bytes()
    loaded = type(network).from_pretrained(tmp_path / "fused")
    assert not any(row.fused for row in networks.fusion_report(loaded))
    networks.fuse(loaded)
    loaded_step = step(loaded, inputs)
    assert all(torch.equal(loaded_step[key], fused[key]) for key in fused)


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3", "flux", "z_image", "sana", "vae"])
def test_gradient_checkpointing(name: str) -> None:
    network, inputs = build(name), NETWORKS[name][1]()
    networks.fuse(network)
    expected = step(network, inputs)
    network.enable_gradient_checkpointing()
    assert_same(step(network.train(), inputs), expected, 1e-12)


@pytest.mark.parametrize("name", ["scale_shift", "pixart"])
def test_copies_are_fused_and_their_own(name: str) -> None:
    network, inputs = build(name), NETWORKS[name][1]()
    count = networks.fuse(network)
    twin = copy.deepcopy(network)
    assert sum(row.fused for row in networks.fusion_report(twin)) == count
    expected = step(network, inputs)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert_same(step(twin, inputs), expected, 1e-12)
    networks.unfuse(twin)
    assert sum(row.fused for row in networks.fusion_report(network)) == count


def compiles_to_one_graph(network: nn.Module, inputs: dict[str, Any]) -> None:
    expected = step(network, inputs)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    actual = step(torch.compile(network, fullgraph=True, backend=counter), inputs)
    assert_same({key.removeprefix("_orig_mod."): value for key, value in actual.items()}, expected, 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_torch_compile_makes_one_graph(name: str) -> None:
    network = build(name).float()
    networks.fuse(network)
    compiles_to_one_graph(network, NETWORKS[name][1]())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "scale_shift", "vae", "flux", "z_image", "sana"])
def test_torch_compile_makes_one_graph_of_large_networks(name: str) -> None:
    network = build(name).float()
    networks.fuse(network)
    compiles_to_one_graph(network, NETWORKS[name][1]())


@pytest.mark.parametrize("time_embedding_norm", ["default", "scale_shift"])
def test_torch_compile_makes_one_graph_of_a_residual_block(time_embedding_norm: str) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"temb_channels": 6, "groups": 2, "time_embedding_norm": time_embedding_norm}
            self.block = ResnetBlock2D(in_channels=4, out_channels=8, **options)

        def forward(self, x: Tensor, temb: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (self.block(x, temb),)

    network = Called()
    networks.fuse(network)
    compiles_to_one_graph(network, {"x": torch.randn(2, 4, 5, 7), "temb": torch.randn(2, 6)})


def test_channels_last_and_large_batches() -> None:
    network = build("resampling").to(memory_format=torch.channels_last)
    inputs = unet_inputs()
    inputs = {key: value.repeat_interleave(33, dim=0) for key, value in inputs.items()}
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    expected = step(network, inputs)
    networks.fuse(network)
    assert_same(step(network, inputs), expected, 1e-11)
    scaled = build("scale_shift").to(memory_format=torch.channels_last)
    expected = step(scaled, inputs)
    networks.fuse(scaled)
    assert_same(step(scaled, inputs), expected, 1e-11)


@pytest.mark.parametrize("linear", [False, True])
def test_a_unet_on_a_cpu_computes_in_channels_last(linear: bool) -> None:
    network = tiny.unet(use_linear_projection=linear, block_out_channels=(16, 32)).double().train()
    inputs = unet_inputs()
    expected = step(network, inputs)
    assert networks.fuse(network) > 0
    layouts = []

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        layouts.append(given[0].is_contiguous(memory_format=torch.channels_last))

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer is not network.conv_in:
            layer.register_forward_pre_hook(note)
    assert_same(step(network, inputs), expected, 1e-11)
    assert len(layouts) > 10 and all(layouts)
    networks.unfuse(network)
    assert type(network.conv_in) is nn.Conv2d
    assert network(**inputs, return_dict=False)[0].is_contiguous()


def test_a_unet_with_many_weights_keeps_the_layout_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.unet()
    weights = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d))
    for most, kind in ((weights - 1, nn.Conv2d), (weights, FusedEntrance)):
        monkeypatch.setattr(fusion, "MOST_IN_CHANNELS_LAST", most)
        assert networks.fuse(network) > 0 and type(network.conv_in) is kind
        networks.unfuse(network)


@pytest.mark.parametrize("name", ["scale_shift", "pixart", "sd3", "flux", "z_image", "sana"])
def test_low_precision_is_no_worse(name: str) -> None:
    network, inputs = build(name), NETWORKS[name][1]()
    oracle = step(network, inputs)
    low = copy.deepcopy(network).bfloat16()
    unfused = step(low, inputs)
    networks.fuse(low)
    fused = step(low, inputs)

    def error(results: dict[str, Tensor], key: str) -> float:
        return float((results[key].double() - oracle[key]).norm())

    assert all(value.dtype == torch.bfloat16 for value in fused.values())
    assert error(fused, "output") <= 1.2 * error(unfused, "output")
    total = [sum(error(results, key) ** 2 for key in oracle) ** 0.5 for results in (fused, unfused)]
    assert total[0] <= 1.2 * total[1]


@pytest.mark.parametrize("name", ["pixart", "z_image", "sana"])
def test_autocast_gives_the_dtypes_that_it_gave(name: str) -> None:
    network, inputs = build(name).float(), cast(NETWORKS[name][1](), torch.float32)
    kinds: list[torch.dtype] = []
    for part in network.modules():
        if type(part).__name__.endswith("TransformerBlock"):
            part.register_forward_hook(lambda part, given, output: kinds.append(output.dtype))

    def output() -> tuple[Tensor, list[torch.dtype]]:
        kinds.clear()
        found = network(**inputs, return_dict=False)
        found = found if isinstance(found, Tensor) else found[0]
        return found, [found.dtype, *kinds]

    with torch.autocast("cpu", torch.bfloat16):
        expected, dtypes = output()
        networks.fuse(network)
        actual, fused_dtypes = output()
    assert fused_dtypes == dtypes
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("wide", [False, True])
def test_z_images_rms_norms_return_the_dtypes_that_they_did(wide: bool) -> None:
    """diffusers' round to weights of 16 bits, and return float32 where the weights are."""
    block: Any = tiny.z_image().layers[0]
    norm = block.attention_norm1.to(torch.float32 if wide else torch.bfloat16)
    x = torch.randn(2, 3, 32).to(torch.bfloat16 if wide else torch.float32)
    expected = norm(x)
    networks.fuse(block)
    assert norm(x).dtype == expected.dtype == norm.weight.dtype
    torch.testing.assert_close(norm(x), expected, rtol=0.02, atol=0.01)
    assert norm(norm(x), residual=x)[1].dtype == expected.dtype


def test_z_images_lists_of_samples_go_the_way_of_diffusers() -> None:
    network: Any = tiny.z_image()
    samples = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 4, 8)]
    text = [torch.randn(3, tiny.TEXT_WIDTH), torch.randn(35, tiny.TEXT_WIDTH)]
    given = samples, torch.tensor([0.2, 0.8]), text
    expected = network(*given, return_dict=False)[0]
    networks.fuse(network)
    torch.testing.assert_close(network(*given, return_dict=False)[0], expected)
    network.layers[0].attention.processor = AttnProcessor()
    network.layers[1].ffn_norm2.bias = nn.Parameter(torch.zeros(32))
    networks.unfuse(network)
    networks.fuse(network)
    left = {row.name: row.reason for row in networks.fusion_report(network) if not row.fused}
    assert left == {"layers.0.attention": "its processor is a AttnProcessor", "layers.1": "ffn_norm2 has a bias"}


def test_chunked_feed_forward_falls_back() -> None:
    network, inputs = build("pixart"), pixart_inputs()
    for block in network.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)
    expected = step(network, inputs)
    networks.fuse(network)
    assert_same(step(network, inputs), expected, 1e-12)


def test_frozen_networks_and_hooks() -> None:
    network, inputs = build("sd15"), unet_inputs()
    networks.fuse(network)
    called = []
    block = network.down_blocks[0].resnets[0]
    for part in (block, block.norm1, block.conv1):
        part.register_forward_hook(lambda part, args, output: called.append(part))
    expected = step(network, inputs)
    assert called == [block.norm1, block.conv1, block]
    network.requires_grad_(False)
    sample = inputs.pop("sample").requires_grad_()
    (grad,) = torch.autograd.grad(network(sample, **inputs).sample.sum(), sample)
    assert grad.isfinite().all() and expected["input"].shape == grad.shape


def test_parameters_are_read_in_their_modules_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ZeRO-3, where they hold nothing at any other time."""
    for name in ("sd15", "scale_shift", "pixart", "z_image", "sana", "vae"):
        network, inputs = build(name), NETWORKS[name][1]()
        networks.fuse(network)
        expected = step(network, inputs)
        whole: dict[str, Any] = {}

        def gather(part: nn.Module, args: Any, whole: dict[Any, Tensor] = whole) -> None:
            for parameter in part.parameters(recurse=False):
                parameter.data = whole[parameter]

        def release(part: nn.Module, args: Any, output: Any) -> None:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.new_empty(0)

        for part in network.modules():
            part.register_forward_pre_hook(gather)
            part.register_forward_hook(release)
            for parameter in part.parameters(recurse=False):
                whole[parameter] = parameter.data
                parameter.data = parameter.data.new_empty(0)
        with torch.no_grad():
            output = network(**inputs, return_dict=False)
        output = output if isinstance(output, Tensor) else output[0]
        torch.testing.assert_close(output, expected["output"])


def test_lora_layers_are_called() -> None:
    peft = pytest.importorskip("peft")
    network, inputs = build("sd15"), unet_inputs()
    targets = ["conv1", "conv2", "time_emb_proj", "to_q", "ff.net.0.proj"]
    network.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trained = [name for name, parameter in network.named_parameters() if "lora" in name]
    expected = step(network, inputs)
    assert networks.fuse(network) == 13
    actual = step(network, inputs)
    assert_same(actual, expected, 1e-11)
    assert trained and all(float(actual[name].abs().sum()) > 0.0 for name in trained)
    networks.unfuse(network)
    # And the other way round.
    network = build("sd15")
    networks.fuse(network)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    fused = step(network, inputs)
    networks.unfuse(network)
    assert_same(fused, step(network, inputs), 1e-11)


class Other(nn.GroupNorm):
    pass


def test_what_is_left_and_why(caplog: pytest.LogCaptureFixture) -> None:
    network = build("sd15")
    first, second = network.down_blocks[0].resnets[0], network.down_blocks[1].resnets[0]
    first.nonlinearity = nn.Mish()
    second.norm2.__class__ = Other
    hooked = network.down_blocks[1].attentions[0].norm
    hooked.forward = hooked.forward
    network.conv_act = nn.GELU()
    inputs = unet_inputs()
    expected = step(network, inputs)
    with caplog.at_level(logging.INFO, logger="diffpp_fast"):
        assert networks.fuse(network) == 9
    assert_same(step(network, inputs), expected, 1e-11)
    left = {row.name: row.reason for row in networks.fusion_report(network) if not row.fused}
    assert left == {
        "down_blocks.0.resnets.0": "its activation is Mish, not SiLU",
        "down_blocks.1.resnets.0": "norm2 is a Other, not a GroupNorm: fuse before it is wrapped or sharded",
        "down_blocks.1.attentions.0.norm": "it has a forward of its own (a hook): fuse before that is put on",
        "conv_norm_out": "the activation after it is GELU, not SiLU",
    }
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "fuse UNet2DConditionModel: 9 blocks are fused (3 GEGLU, 2 GroupNorm, 4 ResnetBlock2D)"
    assert "fuse UNet2DConditionModel: 1 ResnetBlock2D left: its activation is Mish, not SiLU" in said


def test_unfuse_refuses_what_was_wrapped_since() -> None:
    network = build("sd15")
    networks.fuse(network)
    norm = network.conv_norm_out
    norm.forward = norm.forward
    with pytest.raises(RuntimeError, match="unfuse: conv_norm_out was wrapped after it was fused"):
        networks.unfuse(network)
    assert sum(row.fused for row in networks.fusion_report(network)) == 13
    del norm.forward
    block = network.down_blocks[0].resnets[0]
    # As fully_shard does.
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"unfuse: down_blocks.0.resnets.0 was wrapped"):
        networks.unfuse(network)
    assert sum(row.fused for row in networks.fusion_report(network)) == 13


def test_a_block_or_any_module_around_one_can_be_fused() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=4, out_channels=8, temb_channels=None, groups=2)
    x = torch.randn(2, 4, 5, 7)
    expected = block(x, None)
    assert networks.fuse(nn.Sequential(networks.Denoiser(block))) == 1
    assert networks.fusion_report(block) == [networks.FusionRow("", "ResnetBlock2D", True, None)]
    torch.testing.assert_close(block(x, None), expected)
    assert networks.fuse(nn.Linear(2, 2)) == 0


def test_other_adaptive_norms_are_left() -> None:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(8, 2, 4, norm_type="ada_norm", num_embeds_ada_norm=10, activation_fn="gelu")
    assert networks.fuse(block) == 0
    (row,) = networks.fusion_report(block)
    assert row.reason == "its norm_type is 'ada_norm'; only 'ada_norm_single' has a fused version"
    affine = BasicTransformerBlock(8, 2, 4, norm_type="ada_norm_single", activation_fn="gelu")
    assert networks.fuse(affine) == 0
    assert networks.fusion_report(affine)[0].reason == "norm1 has parameters"


def test_less_is_kept_for_the_backward_pass() -> None:
    """A residual block drops two norms' outputs of its six tensors, a feed-forward gate its gelu."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=16, groups=8)
    x, temb = torch.randn(1, 32, 16, 16, requires_grad=True), torch.randn(1, 16)
    before = saved_bytes(lambda: block(x, temb), block)
    networks.fuse(block)
    after = saved_bytes(lambda: block(x, temb), block)
    assert before - after == pytest.approx(2 * x.nbytes, rel=0.01)
    gate = GEGLU(16, 64)
    tokens = torch.randn(1, 128, 16, requires_grad=True)
    before = saved_bytes(lambda: gate(tokens), gate)
    networks.fuse(gate)
    assert before - saved_bytes(lambda: gate(tokens), gate) == 4 * 128 * 64


def test_the_command_that_measures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.activations import GEGLU

    case = blocks.BlockCase("gate", lambda: GEGLU(8, 16), ((1, 4, 8),))
    monkeypatch.setattr(blocks, "cases", lambda: [case])
    threads = str(torch.get_num_threads())
    assert main(["blocks", "--device", "cpu", "--min-time", "0.001", "--threads", threads]) == 0
    assert "\n| gate | float32 |" in capsys.readouterr().out
    monkeypatch.setattr(networks, "fuse", lambda module: module.proj.weight.data.mul_(1.01))
    with pytest.raises(AssertionError, match="gate: fusing changes the output by"):
        main(["blocks", "--device", "cpu"])


@pytest.mark.parametrize("name", ["sd15", "pixart", "vae"])
def test_matrix_products_get_no_worse_layouts_than_before(name: str) -> None:
    """A fused block that keeps a transposed layout sends every projection behind it down the slow path."""
    network, transposed = build(name), []

    def look(module: nn.Module, given: tuple[Tensor | None, ...], *_: Any) -> None:
        rows = [
            tensor.stride(-1) == 1 or (tensor.dim() == 4 and tensor.stride(1) == 1)
            for tensor in given
            if tensor is not None
        ]
        transposed.append(not all(rows))

    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(look)
            module.register_full_backward_pre_hook(look)
    counts = []
    for change in (lambda _: None, networks.fuse):
        change(network)
        transposed.clear()
        network(**NETWORKS[name][1](), return_dict=False)[0].sum().backward()
        assert len(transposed) > 4
        counts.append(sum(transposed))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_rotary_embedding_is_the_networks_own(interleaved: bool, sequence_dim: int) -> None:
    x, weight = torch.randn(2, 5, 3, 8), torch.randn(8)
    angle = torch.randn(x.shape[sequence_dim], 8)
    turn: dict[str, Any] = {"use_real_unbind_dim": -1 if interleaved else -2, "sequence_dim": sequence_dim}
    theirs = apply_rotary_emb(F.rms_norm(x, (8,), weight, 1e-6), (angle.cos(), angle.sin()), **turn)
    options = {"interleaved": interleaved, "sequence_dim": sequence_dim}
    torch.testing.assert_close(ops.rms_norm_rope(x, angle.cos(), angle.sin(), weight, eps=1e-6, **options), theirs)
