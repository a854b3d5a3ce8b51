"""training.compile: refused where its gradients are known to be wrong, compared with eager's everywhere else; how many
graphs it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning, Denoiser, freeze, fuse
from diffpp_fast.networks.lora import Adapters
from diffpp_fast.training.build.compiling import compile_network
from diffpp_fast.training.build.networks import check_gradients, refuse_known_faults

CPU = torch.device("cpu")


class Network(nn.Module):
    """The second layer's gradient depends on the first layer's output, the first one's on the way back."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def with_wrong_gradient(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A compiler whose outputs are exact, and whose gradients are too long by a fifth."""
    return lambda *inputs: [out + 0.2 * (out - out.detach()) for out in graph(*inputs)]


@pytest.mark.parametrize("by", ["weights", "samples"])
def test_gradients_that_a_compiler_gets_wrong_are_named(by: str) -> None:
    network = Network().requires_grad_(by == "weights")
    weights = dict(network.named_parameters()) if by == "weights" else {}
    rest = (network, weights, Conditioning(("a", "b"), {}), (4, 8), torch.float32, CPU)
    torch._dynamo.reset()
    network.compile(backend="eager")
    check_gradients("generator", *rest)
    torch._dynamo.reset()
    network.compile(backend=with_wrong_gradient)
    count = "4 of 4" if weights else "1 of 1"
    with pytest.raises(
        ConfigurationError, match=rf"compile.*the generator, its gradients are wrong: {count} .* by 20%"
    ):
        check_gradients("generator", *rest)
    assert all(weight.grad is None for weight in network.parameters())


def test_what_is_known_to_be_compiled_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.unet()
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(ConfigurationError, match=r"UNet2DConditionModel without fused blocks .* training.fuse=true"):
        refuse_known_faults(network, fused=False, device=CPU)
    refuse_known_faults(network, fused=True, device=CPU)
    refuse_known_faults(network, fused=False, device=torch.device("cuda"))
    refuse_known_faults(tiny.pixart(), fused=False, device=CPU)
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    refuse_known_faults(network, fused=False, device=CPU)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that torch.compile makes inside, which are run as they are."""
    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend=keep, **options))
        yield graphs
    torch._dynamo.reset()


def call(denoise: nn.Module, text: torch.Tensor, grad: bool = True) -> torch.Tensor:
    """A prediction for as many samples as there are texts."""
    numbers = torch.arange(len(text))
    x = numbers.view(-1, 1, 1, 1) / 10 + torch.linspace(-1, 1, 4 * 8 * 8).view(4, 8, 8)
    with torch.set_grad_enabled(grad):
        result: torch.Tensor = denoise(x, 100 * numbers, text)
    return result


def texts(count: int) -> Iterator[torch.Tensor]:
    """Prompts, and the empty prompt as a batch has it: one in memory."""
    yield torch.linspace(-1, 1, count * 8 * tiny.TEXT_WIDTH).view(count, 8, -1)
    yield torch.ones(1, 8, tiny.TEXT_WIDTH).expand(count, -1, -1)


def test_the_empty_prompt_needs_no_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one for each network, grad mode and shape."""
    network = tiny.unet(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",)
    )
    fuse(network.eval())
    with counted(monkeypatch) as graphs:
        assert compile_network(network, "whole") == 1
        denoise = Denoiser(network)
        for count, grad in ((2, False), (3, False)):
            before = len(graphs)
            for text in (*texts(count), *texts(count)):
                call(denoise, text, grad)
            assert len(graphs) == before + 1
        assert torch._dynamo.config.recompile_limit > 8  # which the networks of a run share


@pytest.mark.parametrize("kind", ["fused", "frozen", "lora", "checkpointing"])
def test_a_block_is_compiled_once_for_all_that_are_alike(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    results = []
    with counted(monkeypatch) as graphs:
        for compiled in (False, True):
            network: Any = tiny.unet(transformer_layers_per_block=3).eval()
            fuse(network)
            names = list(network.state_dict())
            blocks = compile_network(network, "regional") if compiled else 0
            adapters, weights = None, dict(network.named_parameters())
            if kind == "frozen":
                freeze(network, recompute="feed_forward")
            elif kind == "lora":
                adapters = Adapters(network)
                weights = adapters.add("fake", rank=2, alpha=2, targets=["to_q", "to_v"], seed=1, stream=5)
            elif kind == "checkpointing":
                network.enable_gradient_checkpointing()
            assert kind == "lora" or list(network.state_dict()) == names
            denoise = Denoiser(network, adapters=adapters, adapter="fake" if adapters else None)
            text = next(texts(2)).requires_grad_(kind == "frozen")
            prediction = call(denoise, text)
            leaves = [text] if kind == "frozen" else list(weights.values())
            with nullcontext() if adapters is None else adapters.active("fake"):
                results.append([prediction, *torch.autograd.grad(prediction.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])
    # Without adapters before it the first block of all gets an input without a graph.
    assert (blocks, len(graphs)) == (9, 2 if kind in ("frozen", "lora") else 1)
