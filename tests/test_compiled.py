"""training.compile: refused where its gradients are known to be wrong, compared with eager's everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning
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
