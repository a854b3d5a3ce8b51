"""The frozen decoder against diffusers' own decode: image, gradient to the latents, what it keeps, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.memory import kept_bytes, peak_temporary_bytes
from diffpp_fast.networks import FrozenDecoder, load_decoder
from diffpp_fast.networks.decoder import layers

LATENT = (4, 6, 5)
KL = {
    "sd": {"scaling_factor": 0.18215},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_post_quant_conv": False, "use_quant_conv": False},
    "without attention": {"mid_block_add_attention": False},
    "four resolutions": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2},
    "one resolution": {"block_out_channels": (16,)},
    "mean and std": {
        "scaling_factor": 0.5,
        "latents_mean": (-1.6574, 1.886, -1.383, 2.5155),
        "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
    },
}
FLUX2 = {"flux2": {}, "flux2 without convolutions": {"use_post_quant_conv": False, "use_quant_conv": False}}
QWEN = {"qwen": {}, "qwen of two": {"dim_mult": [1, 2], "temperal_downsample": [True], "num_res_blocks": 1}}
TINY = {
    "tiny": {},
    "tiny silu": {"act_fn": "silu"},
    "tiny bilinear": {"upsample_fn": "bilinear"},
    "tiny by three": {"upsampling_scaling_factor": 3},
}


def kl(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    settings = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, **settings}
    blocks = len(settings["block_out_channels"])
    settings.setdefault("up_block_types", ("UpDecoderBlock2D",) * blocks)
    return seeded(lambda: AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * blocks, **settings))


def tiny(**settings: Any) -> Any:
    from diffusers import AutoencoderTiny

    channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (2, 1, 1)}
    return seeded(lambda: AutoencoderTiny(**channels, **blocks, **settings))


def flux2(**settings: Any) -> Any:
    """FLUX.2's, of latents of one channel, four in patches; with statistics as after training."""
    from diffusers import AutoencoderKLFlux2

    blocks: dict[str, Any] = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "latent_channels": 1}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = seeded(lambda: AutoencoderKLFlux2(**blocks, **types, **settings))
    vae.bn.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
    vae.bn.running_var.copy_(torch.tensor([1.5, 0.7, 2.0, 3.0]))
    return vae


def qwen(**settings: Any) -> Any:
    from diffusers import AutoencoderKLQwenImage

    latents = {"z_dim": 4, "latents_mean": [-0.7, 0.4, 1.1, -0.2], "latents_std": [2.8, 1.4, 2.3, 0.6]}
    vae = seeded(lambda: AutoencoderKLQwenImage(base_dim=8, **latents, **settings))
    for module in vae.decoder.modules():
        if isinstance(module, nn.Upsample):  # which goes through float32, also in float64
            module.forward = partial(nn.Upsample.forward, module)  # type: ignore[method-assign]
    return vae


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = build().eval()
        # At their start the affine parameters of norms are ones and zeros, which hides mistakes.
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)
            elif hasattr(module, "gamma"):
                nn.init.normal_(module.gamma, 1.0, 0.2)
    return vae


def variant(name: str) -> Any:
    for settings, build in ((KL, kl), (FLUX2, flux2), (QWEN, qwen)):
        if name in settings:
            return build(**settings[name])
    return tiny(**TINY[name])


def unfused(vae: Any) -> Callable[[Tensor], Tensor]:
    """diffusers' decode of latents as its pipelines scale them."""
    from diffusers import Flux2KleinPipeline

    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")

    def decode(latents: Tensor) -> Tensor:
        if hasattr(vae, "bn"):
            scale = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
            latents = latents * scale.to(latents.dtype) + vae.bn.running_mean.view(1, -1, 1, 1).to(latents.dtype)
            return vae.decode(Flux2KleinPipeline._unpatchify_latents(latents)).sample
        if hasattr(vae, "temperal_downsample"):
            per_channel = [latents.new_tensor(values).view(1, -1, 1, 1) for values in (std, mean)]
            return vae.decode((latents * per_channel[0] + per_channel[1])[:, :, None]).sample[:, :, 0]
        if mean is not None:
            per_channel = [latents.new_tensor(values).view(1, -1, 1, 1) for values in (std, mean)]
            return vae.decode(latents * per_channel[0] / config.scaling_factor + per_channel[1]).sample
        return vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0.0)).sample

    return decode


def random_latents(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, *LATENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def step(decode: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
    """The image, and the gradient of its product with a fixed random image."""
    latents = latents.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    image = decode(latents)
    outer = torch.randn(image.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(image, latents, outer.to(image.dtype))
    return image.detach(), gradient


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


# The same image and gradient


@pytest.mark.parametrize("name", [*KL, *FLUX2, *QWEN, *TINY])
def test_image_and_gradient_are_diffusers_own(name: str) -> None:
    vae = variant(name).double()
    expected = step(unfused(vae), random_latents(torch.float64))
    assert_equal(step(FrozenDecoder(vae), random_latents(torch.float64)), expected, 1e-13)


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_float32(name: str) -> None:
    vae = variant(name)
    expected = step(unfused(copy.deepcopy(vae).double()), random_latents(torch.float64))
    assert_equal(step(FrozenDecoder(vae), random_latents()), expected, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux2", "qwen", "tiny"])
def test_low_precision_is_as_good_as_diffusers_own(name: str, dtype: torch.dtype) -> None:
    vae = variant(name).to(dtype)
    latents = random_latents(dtype)
    oracle = step(unfused(copy.deepcopy(vae).double()), latents.double())
    results = list(zip(step(FrozenDecoder(vae), latents), step(unfused(vae), latents), oracle, strict=True))
    # Where a ReLU's input rounds to zero the gradient has no second digit in either version.
    for actual, plain, expected in results[:1] if name == "tiny" else results:
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= 2.0 * (plain.double() - expected).norm()


@pytest.mark.parametrize("name", ["sd", "flux2", "qwen", "tiny"])
@pytest.mark.parametrize(
    "options",
    [{"checkpoint": True}, {"slice_size": 2}, {"slice_size": 1, "checkpoint": True}, {"slice_size": 9}],
    ids=str,
)
def test_recomputation_and_slices_change_nothing(name: str, options: dict[str, Any]) -> None:
    vae, latents = variant(name).double(), random_latents(torch.float64, batch=3)
    tolerance = 1e-13 if name == "qwen" else 1e-14  # a matrix product may depend on the batch
    assert_equal(step(FrozenDecoder(vae, **options), latents), step(FrozenDecoder(vae), latents), tolerance)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 5, 64])
@pytest.mark.parametrize("name", [*KL, "flux2"])
def test_slices_of_rows_change_nothing(name: str, rows: int, checkpoint: bool) -> None:
    """Heights are 6 to 48: slices of unequal height, a single one, and borders of every kind."""
    vae, latents = variant(name).double(), random_latents(torch.float64)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        expected = step(FrozenDecoder(vae, memory_format=memory_format), latents)
        sliced = FrozenDecoder(vae, checkpoint, rows=rows, memory_format=memory_format)
        assert_equal(step(sliced, latents), expected, 1e-13)


def test_slices_of_rows_scale_their_blocks_output() -> None:
    vae = variant("sd").double()
    for module in vae.decoder.modules():
        if hasattr(module, "output_scale_factor"):
            module.output_scale_factor = 2.0
    expected = step(unfused(vae), random_latents(torch.float64))
    assert_equal(step(FrozenDecoder(vae, rows=2), random_latents(torch.float64)), expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_rows_are_as_close_to_float64_as_whole_tensors(dtype: torch.dtype) -> None:
    vae, latents = variant("four resolutions").to(dtype), random_latents(dtype)
    # Means that are large beside the deviations, where sums of squares would lose them.
    with torch.no_grad():
        vae.decoder.conv_in.bias.fill_(100.0)
    oracle = step(unfused(copy.deepcopy(vae).double()), latents.double())
    both = step(FrozenDecoder(vae, rows=3), latents), step(FrozenDecoder(vae), latents)
    for sliced, whole, expected in zip(*both, oracle, strict=True):
        assert sliced.dtype == dtype
        assert (sliced.double() - expected).norm() <= 1.5 * (whole.double() - expected).norm()


def test_slices_of_rows_without_fused_attention() -> None:
    vae, latents = variant("sd").double(), random_latents(torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        assert_equal(step(FrozenDecoder(vae, rows=2), latents), step(FrozenDecoder(vae), latents), 1e-13)


@pytest.mark.parametrize("name", ["sd", "tiny"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(name: str, memory_format: torch.memory_format, layout: Callable[[Tensor], Tensor]) -> None:
    vae, latents = variant(name).double(), random_latents(torch.float64)
    decoder = FrozenDecoder(vae, memory_format=memory_format)
    expected = step(unfused(vae), latents)
    assert_equal(step(decoder, layout(latents)), expected, 1e-13)
    assert decoder(layout(latents)).is_contiguous()


def test_activations_keep_the_memory_format_that_was_asked_for() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        decoder = FrozenDecoder(variant("sd"), memory_format=memory_format)
        seen: list[Any] = []

        def pack(tensor: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(random_latents().requires_grad_())
        weights = {weight.data_ptr() for weight in decoder.parameters()}
        activations = [tensor for tensor in seen if tensor.dim() == 4 and tensor.data_ptr() not in weights]
        images = [tensor for tensor in activations if tensor.shape[1] > 1]  # the attention's are [B, 1, N, C]
        assert len(images) == 2 * 8 + 2
        assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in images)


def test_dtypes_of_latents_weights_and_autocast() -> None:
    vae = variant("sd")
    decoder = FrozenDecoder(vae)
    exact = step(decoder, random_latents())
    image, gradient = step(decoder, random_latents(torch.bfloat16))
    assert image.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        latents = random_latents().requires_grad_()
        image = decoder(latents)
    image.float().square().sum().backward()
    assert image.dtype == torch.bfloat16 and latents.grad is not None and latents.grad.dtype == torch.float32
    assert_equal((image,), exact[:1], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert FrozenDecoder(copy.deepcopy(vae).double())(random_latents()).dtype == torch.float64


def test_a_latent_that_is_not_finite_spoils_its_image_alone() -> None:
    latents = random_latents()
    latents[0, 0, 0, 0] = torch.nan
    for name in ("sd", "tiny"):
        images = FrozenDecoder(variant(name))(latents)
        assert images[0].isnan().any() and images[1].isfinite().all()


# Layers


def test_enlarged_convolution_is_interpolation_and_convolution() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 4, 1, dtype=torch.float64, requires_grad=True)
    taps = layers.enlarging_taps(x)
    y = layers.enlarged_convolution(x, layer, taps)
    torch.testing.assert_close(y, layer(F.interpolate(x, scale_factor=2.0, mode="nearest")))
    assert torch.autograd.gradcheck(lambda x: layers.enlarged_convolution(x, layer, taps), (x,))
    unbiased = nn.Conv2d(3, 5, 3, padding=1, bias=False).double()
    torch.testing.assert_close(
        layers.enlarged_convolution(x, unbiased, taps), unbiased(F.interpolate(x, scale_factor=2.0))
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1}, {"kernel_size": 3, "dilation": 2, "padding": (2, 0)}],
    ids=str,
)
def test_convolution(geometry: dict[str, Any], residual: bool, relu: bool) -> None:
    layer = nn.Conv2d(4, 6, groups=2, **geometry).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    added = torch.randn_like(layer(x)).requires_grad_() if residual else None

    def plain(x: Tensor, added: Tensor | None) -> Tensor:
        y = layer(x) if added is None else layer(x) + added
        return y.relu() if relu else y

    def frozen(x: Tensor, added: Tensor | None) -> Tensor:
        return layers.convolution(x, layer, residual=added, relu=relu)

    wrt = [x] if added is None else [x, added]
    outer = torch.randn_like(layer(x))
    torch.testing.assert_close(frozen(x, added), plain(x, added))
    for a, b in zip(
        torch.autograd.grad(frozen(x, added), wrt, outer), torch.autograd.grad(plain(x, added), wrt, outer), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_layers_give_weights_no_gradient() -> None:
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    convolution, norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
    y = layers.enlarged_convolution(x, convolution, layers.enlarging_taps(x))
    y = layers.group_norm(layers.convolution(y, convolution, relu=True), norm)
    layers.linear(y, nn.Linear(8, 3)).sum().backward()
    assert x.grad is not None
    assert all(weight.grad is None for layer in (convolution, norm) for weight in layer.parameters())


# What is kept


def test_what_is_kept_for_the_backward_pass() -> None:
    vae = kl(block_out_channels=(32, 64, 64), layers_per_block=2)
    latents = torch.randn(2, 4, 16, 16)
    decoder = FrozenDecoder(vae)
    eager = kept_bytes(unfused(vae), latents, vae)
    assert kept_bytes(decoder, latents, vae) <= 0.36 * eager
    # The inputs of group norms are all of it, but for the attention's and the statistics.
    tensors = {16: 64 * 10 + 64 * 5, 32: 64 * 6, 64: 64 + 32 * 6}
    inputs = sum(4 * 2 * channels * side**2 for side, channels in tensors.items())
    assert inputs < kept_bytes(decoder, latents, vae) < 1.01 * inputs
    assert kept_bytes(FrozenDecoder(vae, checkpoint=True), latents, vae) <= 0.03 * eager


def test_what_slices_of_rows_take() -> None:
    """The inputs of blocks are kept; the peak has two tensors of the last resolution more, and slices."""
    vae = kl(block_out_channels=(32, 64, 64), layers_per_block=2)
    latents = torch.randn(1, 4, 32, 32)
    sliced = FrozenDecoder(vae, rows=4)
    tensors = {32: 64 * 7, 64: 64 * 3, 128: 32 * 3}
    inputs = sum(4 * channels * side**2 for side, channels in tensors.items())
    assert inputs < kept_bytes(sliced, latents, vae) < 1.01 * inputs

    def peak(decoder: FrozenDecoder) -> int:
        return peak_temporary_bytes(lambda: step(decoder, latents), latents.device)

    largest = 4 * 32 * 128**2
    assert peak(sliced) < inputs + 2.6 * largest < 0.7 * peak(FrozenDecoder(vae))
    assert peak(FrozenDecoder(vae, True, rows=4)) < 7 * largest < 0.7 * peak(FrozenDecoder(vae, True))


def test_what_qwen_images_decoder_keeps() -> None:
    """The inputs of its norms, twice the attention's, and none of the frames before the picture."""
    vae = qwen()
    latents = torch.randn(2, 4, 16, 16)
    assert kept_bytes(FrozenDecoder(vae), latents, vae) <= 0.2 * kept_bytes(unfused(vae), latents, vae)
    assert kept_bytes(FrozenDecoder(vae, checkpoint=True), latents, vae) <= 0.02 * kept_bytes(
        unfused(vae), latents, vae
    )


def test_what_a_tiny_autoencoder_keeps() -> None:
    vae = tiny()
    latents = torch.randn(2, 4, 16, 16)
    assert kept_bytes(FrozenDecoder(vae), latents, vae) <= 0.3 * kept_bytes(unfused(vae), latents, vae)


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_without_a_gradient_nothing_is_kept(name: str) -> None:
    vae = variant(name)
    decoder = FrozenDecoder(vae, checkpoint=True)
    assert not decoder(random_latents()).requires_grad
    with torch.no_grad():
        assert not decoder(random_latents().requires_grad_()).requires_grad
    assert kept_bytes(decoder, random_latents(), vae, gradient=False) == 0
    with torch.inference_mode():
        decoder(random_latents())


# Compilers


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"checkpoint": True}, {"slice_size": 1}))],
    ids=str,
)
@pytest.mark.parametrize("name", ["sd", "tiny", pytest.param("qwen", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    decoder = FrozenDecoder(variant(name).double(), **options)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    latents = random_latents(torch.float64)
    assert_equal(step(compiled, latents), step(decoder, latents), 1e-13)


@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.slow), True])
def test_slices_of_rows_compiled_in_one_graph(checkpoint: bool) -> None:
    torch._dynamo.reset()
    decoder = FrozenDecoder(kl(block_out_channels=(8, 8)).double(), checkpoint, rows=7)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    latents = random_latents(torch.float64)
    assert_equal(step(compiled, latents), step(decoder, latents), 1e-13)


def test_compiled_under_autocast() -> None:
    torch._dynamo.reset()
    decoder = FrozenDecoder(variant("sd"))
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(random_latents()), decoder(random_latents()))


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", ["sd", "mean and std", "flux2", "qwen", "tiny"])
def test_no_value_is_read(name: str, rows: int | None) -> None:
    """Fake tensors have none: reading one, or a branch on it, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    decoder = FrozenDecoder(variant(name), rows=None if name in ("qwen", "tiny") else rows)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        latents = mode.from_tensor(random_latents()).requires_grad_()
        decoder(latents).sum().backward()
    assert latents.grad is not None and latents.grad.shape == latents.shape


# The autoencoder that it is given


def test_the_autoencoder_is_shared_and_stays_usable() -> None:
    vae = variant("sd").train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    latents, pictures = random_latents(), torch.rand(1, 3, 16, 16)
    expected = unfused(vae.eval())(latents), vae.encode(pictures).latent_dist.mean
    decoder = FrozenDecoder(vae.train())
    decoder(latents.requires_grad_()).sum().backward()
    assert decoder.vae is vae and not vae.training
    assert all(not weight.requires_grad and weight.grad is None for weight in vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert set(decoder.state_dict()) == {f"vae.{name}" for name in before}
    assert torch.equal(unfused(vae)(latents), expected[0])
    assert torch.equal(vae.encode(pictures).latent_dist.mean, expected[1])


def test_weights_are_read_when_they_are_used() -> None:
    vae = variant("sd")
    decoder = FrozenDecoder(vae)
    with torch.no_grad():
        for weight in vae.parameters():
            weight.mul_(1.1)
    assert_equal((decoder(random_latents()),), (unfused(vae)(random_latents()),), 1e-5)
    vae.double()
    assert decoder(random_latents(torch.float64)).dtype == torch.float64
    other = copy.deepcopy(decoder)
    vae.decoder.conv_in.weight.data.zero_()
    assert not torch.equal(other(random_latents()), decoder(random_latents()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"checkpoint": checkpoint}) for name in ("sd", "tiny", "tiny silu") for checkpoint in (False, True)),
        ("flux2", {}),
        ("qwen of two", {}),
        *(("sd", {"checkpoint": checkpoint, "rows": 3}) for checkpoint in (False, True)),
    ],
    ids=str,
)
def test_tangents_second_derivatives_and_vmap(name: str, options: dict[str, Any]) -> None:
    decoder = FrozenDecoder(variant(name).double(), **options)
    z, tangent = random_latents(torch.float64), torch.randn(2, *LATENT, dtype=torch.float64)
    image, pushed = jvp(decoder, (z,), (tangent,))
    torch.testing.assert_close(image, decoder(z))
    outer = torch.randn_like(image)
    leaf = z.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(decoder(leaf), leaf, outer)
    both = torch.stack((outer, 2 * outer))
    (batched,) = torch.autograd.grad(decoder(leaf), leaf, both, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack((pulled, 2 * pulled)))
    torch.testing.assert_close((pushed * outer).sum(), (tangent * pulled).sum())
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(decoder(forward_ad.make_dual(z, tangent)))
    torch.testing.assert_close(dual.tangent, pushed)
    torch.testing.assert_close(vmap(decoder)(torch.stack((z, tangent)))[1], decoder(tangent))

    def energy(z: Tensor) -> Tensor:
        return decoder(z).square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # torch's other attention has no second derivative, and raises
        (gradient,) = torch.autograd.grad(energy(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient, leaf, tangent)
    torch.testing.assert_close(second, jvp(grad(energy), (z,), (tangent,))[1])


@pytest.mark.parametrize("weight", ["conv_in.weight", "conv_out.bias", "conv_norm_out.weight"])
def test_a_derivative_by_a_weight_is_refused(weight: str) -> None:
    decoder, latents = FrozenDecoder(kl()), random_latents()
    name = f"vae.decoder.{weight}"
    value = decoder.get_parameter(name).detach()

    def energy(value: Tensor) -> Tensor:
        return functional_call(decoder, {name: value}, (latents,)).sum()

    for derive in (lambda: grad(energy)(value), lambda: jvp(energy, (value,), (value,))):
        with pytest.raises(RuntimeError, match="FrozenDecoder: a derivative by its weights is asked for"):
            derive()


def test_weights_that_are_unfrozen_later_get_no_gradient() -> None:
    for name in ("sd", "tiny"):
        decoder = FrozenDecoder(variant(name)).requires_grad_()
        decoder(random_latents().requires_grad_()).sum().backward()
        assert all(weight.grad is None for weight in decoder.parameters())


def test_a_tiny_autoencoder_loads_from_its_folder(tmp_path: Path) -> None:
    vae = variant("tiny")
    vae.save_pretrained(tmp_path / "vae")
    expected = FrozenDecoder(vae)(random_latents())
    assert torch.equal(load_decoder(str(tmp_path / "vae"), checkpoint=True)(random_latents()), expected)


def test_a_decoder_is_loaded_with_rows(tmp_path: Path) -> None:
    vae = variant("sd")
    vae.save_pretrained(tmp_path / "vae")
    decoder = load_decoder(str(tmp_path / "vae"), rows=5)
    assert decoder.rows == 5
    assert_equal(step(decoder, random_latents()), step(FrozenDecoder(vae), random_latents()), 1e-5)


# Refusals


def test_unknown_autoencoders_are_refused() -> None:
    from diffusers import AsymmetricAutoencoderKL

    for vae in (nn.Identity(), AsymmetricAutoencoderKL()):
        with pytest.raises(TypeError, match=f"one of AutoencoderKL, .*; got {type(vae).__name__}"):
            FrozenDecoder(vae)


def test_what_an_autoencoder_may_hold() -> None:
    with pytest.raises(ValueError, match="up_block_types holds 'AttnUpDecoderBlock2D'; known: UpDecoderBlock2D"):
        FrozenDecoder(kl(up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")))
    with pytest.raises(ValueError, match="unknown act_fn 'gelu'"):
        FrozenDecoder(kl(act_fn="gelu"))
    vae = kl()
    vae.decoder.mid_block.attentions[0].to_q = nn.Bilinear(16, 16, 16)
    with pytest.raises(ValueError, match=r"decoder\.mid_block\.attentions\.0\.to_q is a Bilinear"):
        FrozenDecoder(vae)
    vae = kl()
    vae.decoder.conv_in.padding_mode = "reflect"
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.padding_mode is 'reflect'; only 'zeros'"):
        FrozenDecoder(vae)
    vae = kl()
    vae.decoder.up_blocks[0].upsamplers[0].conv = nn.Conv2d(16, 16, 5, padding=2)
    with pytest.raises(ValueError, match=r"up_blocks\.0\.upsamplers\.0\.conv must be a convolution with kernel_size"):
        FrozenDecoder(vae)
    vae = kl()
    vae.decoder.conv_out.half()
    with pytest.raises(ValueError, match="must have one floating dtype"):
        FrozenDecoder(vae)
    vae = kl()
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        FrozenDecoder(vae)
    with pytest.raises(ValueError, match="one of latents_mean and latents_std"):
        FrozenDecoder(kl(latents_mean=(0.0,) * 4))
    with pytest.raises(ValueError, match="both latents_mean and shift_factor"):
        FrozenDecoder(kl(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4, shift_factor=0.1))
    with pytest.raises(ValueError, match="latents_std must have 4 values, got 3"):
        FrozenDecoder(kl(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 3))
    with pytest.raises(ValueError, match="slice_size must be at least 1"):
        FrozenDecoder(kl(), slice_size=0)


def test_rows_that_make_no_sense() -> None:
    for rows in (0, -3):
        with pytest.raises(ValueError, match=f"rows must be at least 1, got {rows}"):
            FrozenDecoder(kl(), rows=rows)
    wrong: Any
    for wrong in (True, 2.0, "8"):
        with pytest.raises(TypeError, match="rows must be an integer or None"):
            FrozenDecoder(kl(), rows=wrong)
    with pytest.raises(ValueError, match="rows is for AutoencoderKL; AutoencoderTiny keeps"):
        FrozenDecoder(tiny(), rows=8)
    vae = kl()
    vae.decoder.up_blocks[0].resnets[0].conv2 = nn.Conv2d(16, 16, 5, padding=2)
    with pytest.raises(ValueError, match=r"up_blocks\.0\.resnets\.0\.conv2 must be a convolution with kernel_size"):
        FrozenDecoder(vae, rows=8)


def test_float16_is_refused_where_the_config_says_that_it_overflows() -> None:
    with pytest.raises(ValueError, match=r"overflow in float16.*bfloat16 or float32"):
        FrozenDecoder(kl(force_upcast=True).half())
    decoder = FrozenDecoder(kl(force_upcast=True))
    with pytest.raises(ValueError, match="overflow in float16"), torch.autocast("cpu", torch.float16):
        decoder(random_latents())
    decoder(random_latents(torch.float16))
    assert decoder.bfloat16()(random_latents()).dtype == torch.bfloat16
    for vae in (kl(force_upcast=False), kl()):
        assert FrozenDecoder(vae.half())(random_latents()).dtype == torch.float16


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        (torch.zeros(0, 4, 8, 8), ValueError, r"none of them 0, got \[0, 4, 8, 8\]"),
        (torch.zeros(1, 4, 8, 0), ValueError, r"\[B, 4, h, w\], none of them 0"),
        (torch.zeros(4, 8, 8), ValueError, r"\[B, 4, h, w\].*got \[4, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8), ValueError, r"got \[1, 3, 8, 8\]"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.int64), TypeError, r"got torch\.int64"),
        (None, TypeError, "got NoneType"),
        (torch.zeros(1, 4, 8, 8, device="meta"), ValueError, "latents are on meta, the weights on cpu"),
    ],
)
def test_wrong_latents(latents: Any, error: type[Exception], message: str) -> None:
    for name in ("sd", "sd3", "tiny"):
        with pytest.raises(error, match=message):
            FrozenDecoder(variant(name))(latents)


# The true size


@pytest.mark.slow
def test_the_true_decoder_of_stable_diffusion() -> None:
    vae = kl(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = step(unfused(vae), latents)
    for options in ({}, {"checkpoint": True}):
        assert_equal(step(FrozenDecoder(vae, **options), latents), expected, 1e-5)
    eager = kept_bytes(unfused(vae), latents, vae)
    assert kept_bytes(FrozenDecoder(vae), latents, vae) <= 0.36 * eager
    assert kept_bytes(FrozenDecoder(vae, checkpoint=True), latents, vae) <= 0.03 * eager
