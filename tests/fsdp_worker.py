"""One of the processes of a loop of one's own under FSDP2; tests/test_ops_embedding.py starts it and compares.

python fsdp_worker.py FILE: trains, and process 0 writes the whole weights to FILE.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffpp_fast import Noise, ops

STEPS, BATCH, SHAPE = 3, 4, (4, 8, 8)


class Block(nn.Module):
    """The operators that stand between a network's layers; this block's norm lends its parameters to one of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(channels, 4 * channels)
        self.out = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = self.convolution(ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
        tokens = y.flatten(2).transpose(1, 2)
        scale, shift = self.modulation(tokens.mean(1)).chunk(2, dim=-1)
        tokens = self.out(ops.geglu(self.project(ops.ada_layer_norm(tokens, scale, shift))))
        return x + tokens.transpose(1, 2).reshape(x.shape)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), Block(8), Block(8), nn.Conv2d(8, 4, 3, padding=1))


def shard(module: nn.Sequential, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (size,))
    for part in (module[1], module[2], module):
        # The outermost one otherwise stays gathered after a pass without gradients, and misses `requires_grad_(False)`.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    assert isinstance(module[1].norm.weight, DTensor)


def train(rank: int, size: int) -> dict[str, Tensor]:
    """The weights of generator and fake after rounds of a denoising loss, DMD's gradient and SiD's loss."""
    networks = {"generator": network(1), "fake": network(2), "reference": network(3).requires_grad_(False)}
    if size > 1:
        for module in networks.values():
            shard(module, size)
    generator, fake, reference = networks.values()
    trained = {role: networks[role] for role in ("generator", "fake")}
    # Adam's first updates would magnify roundings, were it not for a large eps.
    optimizers = {role: torch.optim.AdamW(each.parameters(), lr=1e-2, eps=1e-3) for role, each in trained.items()}
    alpha, sigma = torch.full((BATCH // size,), 0.8), torch.full((BATCH // size,), 0.6)
    first = 0
    for _ in range(STEPS):
        for update in ("denoising", "dmd", "sid"):
            samples = torch.arange(first + rank, first + BATCH, size)  # this process's part of the next numbers
            first += BATCH
            z, noise = Noise(0, samples, stream=0).normal(SHAPE), Noise(0, samples, stream=1)
            optimizer = optimizers["fake" if update == "denoising" else "generator"]
            optimizer.zero_grad()
            x0 = generator(z) if update != "denoising" else generator(z).detach()
            x_t = ops.add_noise(x0, alpha, sigma, noise)
            if update == "denoising":
                ops.denoising_loss(fake(x_t), x0, noise, alpha, sigma).backward()
            elif update == "dmd":
                with torch.no_grad():
                    target = {"x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma}
                    outputs = fake(x_t), reference(x_t), reference(0.9 * x_t)
                    gap = ops.score_gap(*outputs, guidance_scale=3.0, normalizer="mean_abs", **target)
                x0.backward(gap.gradient / len(x0))
            else:
                fake.zero_grad()
                fake.requires_grad_(False)
                loss = ops.sid_loss(fake(x_t), reference(x_t), None, x0, noise, alpha, sigma, guidance_scale=1.0)
                (loss.mean() / x0[0].numel()).backward()
                fake.requires_grad_(True)
                assert all(weight.grad is None for weight in fake.parameters())
            optimizer.step()
    return {f"{role}.{name}": weight.detach()
            for role, each in trained.items() for name, weight in each.named_parameters()}  # fmt: skip


if __name__ == "__main__":
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    weights = train(dist.get_rank(), dist.get_world_size())
    assert all(isinstance(weight, DTensor) for weight in weights.values())
    whole = {name: weight.full_tensor() for name, weight in weights.items()}
    if dist.get_rank() == 0:
        save_file(whole, sys.argv[1])
    dist.destroy_process_group()
    # Not by the interpreter's end: DTensors keep the group, and its threads then abort the process, now and then.
    os._exit(0)
