"""The attention processor against diffusers' own, and the backends that it refuses."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffpp_fast import networks
from diffpp_fast.networks import attention

F64 = torch.float64
MASK = -1e4 * torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]], dtype=F64)[:, None]


def layer(**options: Any) -> Attention:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, **options).double()
    assert isinstance(attn.processor, AttnProcessor2_0)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attn


def tokens() -> Tensor:
    return torch.randn(2, 5, 16, dtype=F64)


def pixels() -> Tensor:
    return torch.randn(2, 16, 3, 4, dtype=F64)


def context(width: int = 16) -> Tensor:
    return torch.randn(2, 7, width, dtype=F64)


CALLS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "self": ({"bias": True}, lambda: {"hidden_states": tokens()}),
    "cross": (
        {"cross_attention_dim": 6, "dropout": 0.0},
        lambda: {"hidden_states": tokens(), "encoder_hidden_states": context(6)},
    ),
    "mask": (
        {"cross_attention_dim": 16},
        lambda: {"hidden_states": tokens(), "encoder_hidden_states": context(), "attention_mask": MASK},
    ),
    "mask per head": (
        {},
        lambda: {"hidden_states": tokens(), "attention_mask": torch.randn(4, 5, 5, dtype=F64)},
    ),
    "padded mask": (
        {"cross_attention_dim": 16},
        lambda: {
            "hidden_states": tokens(),
            "encoder_hidden_states": torch.randn(2, 14, 16, dtype=F64),
            # diffusers appends as many zeros as there are keys: an empty mask is one that it makes whole.
            "attention_mask": MASK[..., :0],
        },
    ),
    "autoencoder": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.5, "bias": True},
        lambda: {"hidden_states": pixels()},
    ),
    "spatial norm": (
        {"spatial_norm_dim": 3, "residual_connection": True},
        lambda: {"hidden_states": torch.randn(2, 16, 4, 4, dtype=F64), "temb": torch.randn(2, 3, 2, 2, dtype=F64)},
    ),
    "norms of queries and keys": ({"qk_norm": "layer_norm"}, lambda: {"hidden_states": tokens()}),
    "norm of the context": (
        {"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
        lambda: {"hidden_states": tokens(), "encoder_hidden_states": context(6)},
    ),
    "group norm of the context": (
        {"cross_attention_dim": 6, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 2},
        lambda: {"hidden_states": tokens(), "encoder_hidden_states": context(6)},
    ),
}


def step(attn: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    output = attn(**leaves)
    wanted = [*leaves.values(), *attn.parameters()]
    grads = torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_it_equals_diffusers_processor(call: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, make = CALLS[call]
    if "spatial_norm_dim" in options:
        # diffusers builds its norm with 32 groups, whatever the channels.
        build = nn.GroupNorm
        monkeypatch.setattr(nn, "GroupNorm", lambda num_channels, num_groups, **rest: build(4, num_channels, **rest))
    attn, inputs = layer(**options), make()
    expected = step(attn, inputs)
    assert networks.set_attention(attn, backend) == 1
    assert attn.processor.backend == backend
    actual = step(attn, inputs)
    assert len(actual) == len(expected) > 4
    for value, oracle in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-10, atol=1e-10)


def test_a_scale_of_its_own() -> None:
    """Without `scale_qk` diffusers uses another processor, which multiplies itself."""
    attn = Attention(query_dim=16, heads=2, dim_head=8, scale_qk=False).double()
    assert isinstance(attn.processor, AttnProcessor)
    x = tokens()
    expected = step(attn, {"hidden_states": x})
    networks.set_attention(attn, "sdpa")
    for value, oracle in zip(step(attn, {"hidden_states": x}), expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "vae"])
def test_whole_networks(name: str) -> None:
    build = {"sd15": tiny.unet, "sdxl": tiny.sdxl_unet, "pixart": tiny.pixart, "vae": tiny.vae}[name]
    network = build().double()
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 5, tiny.TEXT_WIDTH, dtype=F64),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([3, 900]),
    }
    if name == "vae":
        inputs = {}
    if name == "sdxl":
        text = torch.randn(2, tiny.TEXT_WIDTH, dtype=F64)
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.zeros(2, 6)}
    sample = torch.randn(2, 3 if name == "vae" else 4, 8, 8, dtype=F64)
    expected = network(sample, **inputs).sample
    layers = [part for part in network.modules() if isinstance(part, Attention)]
    assert networks.set_attention(network, "math") == len(layers) > 0
    assert all(part.processor.backend == "math" for part in layers)
    torch.testing.assert_close(network(sample, **inputs).sample, expected, rtol=1e-9, atol=1e-9)
    assert all(part.processor.backend == "math" for part in copy.deepcopy(network).modules() if hasattr(part, "to_q"))
    networks.fuse(network)
    torch.testing.assert_close(network(sample, **inputs).sample, expected, rtol=1e-9, atol=1e-9)


def test_lora_layers_are_called() -> None:
    class Lora(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    attn = layer()
    for name in ("to_q", "to_k", "to_v"):
        getattr(attn, name).__class__ = Lora
    attn.to_out[0].__class__ = Lora
    inputs = {"hidden_states": tokens()}
    expected = step(attn, inputs)
    networks.set_attention(attn, "sdpa")
    for value, oracle in zip(step(attn, inputs), expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-10, atol=1e-10)


def allowed_backends() -> dict[str, bool]:
    flags = torch.backends.cuda
    return {
        "flash": flags.flash_sdp_enabled(),
        "cudnn": flags.cudnn_sdp_enabled(),
        "efficient": flags.mem_efficient_sdp_enabled(),
        "math": flags.math_sdp_enabled(),
    }


@pytest.mark.parametrize("backend", ["math", "flash", "cudnn", "efficient"])
def test_torch_is_left_one_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attn = layer()
    monkeypatch.setitem(attention.BACKENDS, backend, attention.Backend(gpu=False))
    networks.set_attention(attn, backend)
    seen = []

    def spy(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(allowed_backends())
        return query

    before = allowed_backends()
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attn(tokens())
    assert seen == [{name: name == backend for name in before}]
    assert allowed_backends() == before


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_torch_compile_makes_one_graph(backend: str) -> None:
    attn = layer(cross_attention_dim=16)
    inputs = {"hidden_states": tokens(), "encoder_hidden_states": context(), "attention_mask": MASK}
    expected = step(attn, inputs)
    networks.set_attention(attn, backend)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    actual = step(torch.compile(attn, fullgraph=True, backend=counter), inputs)
    for value, oracle in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("backend", "package", "command"),
    [
        (
            "flash_attn",
            "flash_attn",
            "where nvcc is, pip install ninja packaging psutil, then pip install --no-build-isolation PLACE[flash]",
        ),
        ("xformers", "xformers", "pip install PLACE[xformers]"),
    ],
)
def test_an_absent_package_is_named(backend: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.install, "extra", lambda name: f"pip install PLACE[{name}]")
    attn = layer()
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError) as refusal:
        networks.set_attention(attn, backend)
    assert str(refusal.value) == (
        f"set_attention: backend {backend!r} needs the package {package}, which is not installed: {command}"
    )
    assert isinstance(attn.processor, AttnProcessor2_0)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"the package {package} can't be imported \(.+\): .*pip install.* PLACE"):
        networks.set_attention(attn, backend)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the two packages with their calling conventions: [B, N, heads, D]. The value notes the calls."""
    called: list[str] = []

    def attend(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        called.append(name)
        with sdpa_kernel(SDPBackend.MATH):
            heads_first = (values.transpose(1, 2) for values in (query, key, value))
            return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)

    def memory_efficient(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, scale: float) -> Tensor:
        if attn_bias is not None:
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            assert attn_bias.stride(-2) % 8 == 0 and attn_bias.dtype == query.dtype
        return attend("xformers", query, key, value, attn_bias, scale)

    flash_attn, xformers, xformers_ops = (ModuleType(name) for name in ("flash_attn", "xformers", "xformers.ops"))
    flash_attn.flash_attn_func = lambda q, k, v, softmax_scale: attend(  # type: ignore[attr-defined]
        "flash_attn", q, k, v, None, softmax_scale
    )
    xformers_ops.memory_efficient_attention = memory_efficient  # type: ignore[attr-defined]
    for module in (flash_attn, xformers, xformers_ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    for name, backend in attention.BACKENDS.items():
        monkeypatch.setitem(attention.BACKENDS, name, backend._replace(gpu=False, dtypes=None))
    return called


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
@pytest.mark.parametrize("call", ["self", "cross", "mask", "mask per head", "autoencoder"])
def test_the_packages_are_called_as_they_want(call: str, backend: str, packages: list[str]) -> None:
    options, make = CALLS[call]
    attn, inputs = layer(**options), make()
    expected = step(attn, inputs)
    networks.set_attention(attn, backend)
    if backend == "flash_attn" and "mask" in call:
        with pytest.raises(
            RuntimeError, match="backend 'flash_attn' can't serve this call: it takes no attention mask"
        ):
            step(attn, inputs)
        return
    for value, oracle in zip(step(attn, inputs), expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-10, atol=1e-10)
    assert packages == [backend]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient"])
def test_without_a_gpu_its_backends_are_refused(backend: str) -> None:
    attn = layer()
    with pytest.raises(RuntimeError, match=f"backend '{backend}' serves CUDA tensors only, and PyTorch can use no GPU"):
        networks.set_attention(attn, backend)
    assert isinstance(attn.processor, AttnProcessor2_0)


def test_what_a_backend_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wide = nn.ModuleDict({"wide": Attention(query_dim=512, heads=1, dim_head=512)})
    for backend in ("flash", "cudnn"):
        with pytest.raises(
            RuntimeError, match="can't serve wide: its heads have 512 channels, the backend serves up to 256"
        ):
            networks.set_attention(wide, backend)
    odd = Attention(query_dim=6, heads=1, dim_head=6)
    with pytest.raises(
        RuntimeError, match="can't serve the layer: its heads have 6 channels, the backend serves multiples"
    ):
        networks.set_attention(odd, "efficient")
    attn = layer()
    assert networks.set_attention(attn, "flash") == 1
    with pytest.raises(
        RuntimeError, match="backend 'flash' can't serve this call: it serves CUDA tensors, these are on cpu"
    ):
        attn(tokens())
    monkeypatch.setitem(attention.BACKENDS, "flash", attention.BACKENDS["flash"]._replace(gpu=False))
    with pytest.raises(RuntimeError, match="it serves float16, bfloat16, these are float64"):
        attn(tokens())
    with pytest.raises(RuntimeError, match="it takes no attention mask"):
        attn.bfloat16()(tokens().bfloat16(), context().bfloat16(), MASK.bfloat16())


def test_what_is_not_known_is_refused_and_nothing_is_changed() -> None:
    attn = layer()
    with pytest.raises(ValueError, match="unknown backend 'fast'; known: sdpa, math, flash, cudnn"):
        networks.set_attention(attn, "fast")
    network = nn.ModuleDict({"plain": attn, "other": layer()})
    network["other"].set_processor(FusedAttnProcessor2_0())
    with pytest.raises(ValueError, match="other has a FusedAttnProcessor2_0, whose work this can't take over"):
        networks.set_attention(network, "sdpa")
    assert isinstance(attn.processor, AttnProcessor2_0)
    assert networks.set_attention(nn.Linear(2, 2), "sdpa") == 0
