"""Whether a provider's losses and gradients are right, against the unfused step in float64 or plain float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.reward import allowance, full_precision
from benchmarks.step_networks import StepNetworks, map_tensors, trained_of
from benchmarks.step_providers import ROLES, Step, Unfused, differentiate, no_time
from diffpp_fast.methods import Batch
from diffpp_fast.networks import Conditioning

#: A tensor's gradient is measured against at least this part of what it would be if all elements' were as large.
LEAST_GRADIENT = 1e-2


class Truth(NamedTuple):
    """The truth about one role: the loss, and the gradients in the order of the parameters, on the CPU."""

    loss: float
    gradients: list[Tensor]


class Oracle:
    """The unfused step computed exactly, and how far from it a provider may be.

    Args:
        networks: whose numbers are used.
        batch: on which providers are judged.
        dtype: float64, or float32, which is computed without TF32.

    Attributes:
        allowed: relative errors by what they are of: twice those of the unfused step in the providers' own dtype, or
            the gate's tolerance where that is more. Both go sample by sample, so that they need little memory.
    """

    def __init__(self, networks: StepNetworks, batch: Batch, dtype: torch.dtype) -> None:
        self.batch = batch
        self.truth: dict[str, Truth] = {}
        with full_precision():
            exact = networks.exact(dtype)
            step = Unfused(exact)
            for role in ROLES:
                network = getattr(exact.parts, role)
                loss = _by_sample(step, role, network, [_sample(batch, i, dtype) for i in range(len(batch))])
                self.truth[role] = Truth(loss, _take_gradients(network))
        self.allowed: dict[str, float] = {}
        step = Unfused(networks)
        for role in ROLES:
            network = getattr(networks.parts, role)
            loss = _by_sample(step, role, network, [_sample(batch, i, step.wide) for i in range(len(batch))])
            errors = self.errors(role, loss, network)
            self.allowed |= allowance(errors, networks.dtype)
            network.zero_grad()

    def differentiate(self, step: Step, role: str) -> float:
        """A provider's loss on the oracle's batch, with its gradients on the parameters."""
        with _addressed(step):
            return float(differentiate(step, role, self.batch, no_time)[0])

    def errors(self, role: str, loss: float, network: nn.Module) -> dict[str, float]:
        """Return the relative errors of a loss and of the gradients on the parameters, these in the 2-norm."""
        truth = self.truth[role]
        whole, worst = _relative([parameter.grad for parameter in trained_of(network)], truth.gradients)
        return {
            f"{role} loss": abs(loss - truth.loss) / abs(truth.loss),
            f"{role} gradient": whole,
            f"{role} gradient at its worst tensor": worst,
        }


@contextmanager
def _addressed(step: Step) -> Iterator[None]:
    """Within the block, the step draws what the package draws."""
    before, step.addressed = step.addressed, True
    try:
        yield
    finally:
        step.addressed = before


def _by_sample(step: Step, role: str, network: nn.Module, samples: Sequence[Batch]) -> float:
    """The mean loss, with the mean gradients on the parameters."""
    with _addressed(step):
        losses = [float(differentiate(step, role, sample, no_time)[0]) for sample in samples]
    for parameter in trained_of(network):
        assert parameter.grad is not None, "every parameter is used"
        parameter.grad /= len(samples)
    return sum(losses) / len(losses)


def _take_gradients(network: nn.Module) -> list[Tensor]:
    gradients = [parameter.grad.cpu() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    return gradients


def _sample(batch: Batch, index: int, dtype: torch.dtype) -> Batch:
    """One sample of a batch, its conditioning in the dtype of the networks."""
    part = slice(index, index + 1)
    conditioning, null = (
        Conditioning(("",), map_tensors(lambda tensor: tensor[part].to(dtype), source.tensors))
        for source in (batch.conditioning, batch.null_conditioning)
    )
    return Batch(batch.samples[part], conditioning, batch.seed, batch.shape, null)


def _relative(gradients: Sequence[Tensor | None], truth: Sequence[Tensor]) -> tuple[float, float]:
    """The relative error of all gradients as one vector, and that of the worst of them. None is a gradient of zero."""
    errors, sizes = [], []
    for gradient, exact in zip(gradients, truth, strict=True):
        if gradient is None:
            exact = exact.double()
            errors.append(exact.norm())
        else:
            exact = exact.to(gradient.device)
            errors.append((gradient.to(exact.dtype) - exact).norm().double().cpu())
        sizes.append(exact.norm().double().cpu())
    error, size = torch.stack(errors), torch.stack(sizes)
    elements = torch.tensor([exact.numel() for exact in truth], dtype=torch.float64)
    least = LEAST_GRADIENT * size.norm() * (elements / elements.sum()).sqrt()
    return float(error.norm() / size.norm()), float((error / torch.maximum(size, least)).max())
