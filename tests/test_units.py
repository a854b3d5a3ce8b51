"""Other authors' clipping norms, eps and weights in this package's units: the factors of docs/method.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast import NoiseSchedule
from diffpp_fast.methods import Batch, DiffInstructPP

SHAPE, BATCH = (4, 3, 5), 6
ELEMENTS = 60
#: By what a peer's clip and eps are multiplied: as many times longer than theirs is the gradient here.
GENERATORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "DMD2": (lambda x0, g: 0.5 * F.mse_loss(x0, (x0 - g).detach()), ELEMENTS),
    "DMD of PixArt": (lambda x0, g: F.mse_loss(x0, (x0 - g).detach()), ELEMENTS / 2),
    "SiD-LSG": (lambda x0, g: (x0 * g).sum() / BATCH, 1.0),
}
FAKES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "DMD2": (lambda residual: residual.square().mean(), 1.0),
    "SiD-LSG": (lambda residual: residual.square().sum() / BATCH, 1 / ELEMENTS),
}


class Predicts(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor, t: Tensor, conditioning: None) -> Tensor:
        return self.table


def gradients(reward_scale: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The package's gradients by x0 and by the fake score's prediction, and what that prediction is off by."""
    x0, fake, reference = nn.Parameter(torch.randn(BATCH, *SHAPE)), Predicts(1), Predicts(2)
    products = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)
    schedule = NoiseSchedule(products.sqrt(), (1 - products).sqrt(), "sample")
    method = DiffInstructPP(
        lambda z, c: x0, fake, reference, schedule, reward=lambda x, c: x.sum((1, 2, 3)), reward_scale=reward_scale
    )
    batch = Batch(torch.arange(BATCH), None, 0, SHAPE)
    method.generator_loss(batch).loss.backward()
    method.fake_loss(batch).loss.backward()
    assert x0.grad is not None and fake.table.grad is not None
    return x0.grad, fake.table.grad, (fake.table - x0).detach()


@pytest.mark.parametrize("peer", GENERATORS)
def test_a_clip_of_the_generator_is_multiplied_by(peer: str) -> None:
    ours = gradients()[0]
    x0 = torch.zeros(BATCH, *SHAPE, requires_grad=True)
    loss, factor = GENERATORS[peer]
    (theirs,) = torch.autograd.grad(loss(x0, BATCH * ours), x0)  # ours is the gradient on a sample, over B
    torch.testing.assert_close(ours, factor * theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("peer", FAKES)
def test_a_clip_of_the_fake_score_is_multiplied_by(peer: str) -> None:
    _, ours, residual = gradients()
    residual.requires_grad_()
    loss, factor = FAKES[peer]
    (theirs,) = torch.autograd.grad(loss(residual), residual)
    torch.testing.assert_close(ours, factor * theirs, rtol=1e-4, atol=1e-6)


def test_a_reward_beside_a_mean_is_multiplied_by_the_elements() -> None:
    """DMDR's generator: 0.5 mean (x0 - (x0 - g))^2 - weight mean over samples of the reward."""
    weight = 0.3
    torch.manual_seed(0)
    score = gradients()[0]
    torch.manual_seed(0)
    ours = gradients(reward_scale=weight * ELEMENTS)[0]
    x0 = torch.zeros(BATCH, *SHAPE, requires_grad=True)
    loss = GENERATORS["DMD2"][0](x0, BATCH * score) - weight * x0.sum((1, 2, 3)).mean()
    (theirs,) = torch.autograd.grad(loss, x0)
    torch.testing.assert_close(ours, ELEMENTS * theirs, rtol=1e-4, atol=1e-6)
