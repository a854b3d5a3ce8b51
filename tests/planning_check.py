"""The plan's bytes against what an engine really holds, on a GPU by its allocator's counters.

`python tests/planning_check.py --device cuda`; without a GPU it sums up tensors on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from diffpp_fast.networks import Denoiser, fuse
from diffpp_fast.networks.last_layer import WideConv2d
from diffpp_fast.training import config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import PlainEngine
from diffpp_fast.training.planning import KNOWN
from diffpp_fast.training.planning.architectures import conditioning, on_meta
from diffpp_fast.training.planning.counting import GpuKernels, Ledger, NetworkSize
from diffpp_fast.training.planning.states import trained_state

#: What CUDA's allocator may give beyond what it is asked for: it rounds every tensor up to 512 bytes.
STATES_ALLOWED = 0.01
#: Kernels for convolutions and attention keep what they like beside what autograd asks for.
KEPT_ALLOWED = 0.10
#: A UNet of about a hundredth of the true one, for the CPU.
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 768,
    "sample_size": 16,
}


class Compared(NamedTuple):
    """A number of bytes, planned and measured, and by which share they may differ."""

    what: str
    planned: int
    measured: int
    allowed: float

    @property
    def right(self) -> bool:
        return abs(self.measured - self.planned) <= self.allowed * self.planned


def measure_states(device: torch.device, *, small: bool, samples: int = 1) -> list[Compared]:
    """One update of a UNet with the plain engine, in bfloat16 on a GPU: what lasts, and what its forward pass keeps.

    Args:
        small: a scaled-down UNet instead of Stable Diffusion 1.5's.
        samples: of the micro-batch.
    """
    on_gpu = device.type == "cuda"
    models, side = KNOWN["sd15"], 16 if small else 64
    before = _allocated(device)
    network = _unet(small).to(device)
    parameters = dict(network.named_parameters())
    engine = PlainEngine(
        "generator", network, parameters, config.Optimizer(lr=1e-6), 1, World.alone(device), config.EmaSection()
    )
    condition = conditioning(network, models, samples)
    inputs = torch.randn(samples, 4, side, side, device=device), torch.zeros(samples, dtype=torch.int64, device=device)
    text = torch.randn(condition.tensors["encoder_hidden_states"].shape, device=device)
    lasting = trained_state(NetworkSize.of(network), config.Zero(stage=0), gpus=1, low=True, ema=True)
    rows = []
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        start = _allocated(device)
        prediction = Denoiser(network)(*inputs, text)
    if on_gpu:
        kept = _allocated(device) - start
        rows.append(Compared("kept by the forward pass", _planned_kept(small, samples, side), kept, KEPT_ALLOWED))
    engine.backward(prediction.square().mean(), last=True)
    del prediction
    gradients = sum(parameter.grad.nbytes for parameter in network.parameters() if parameter.grad is not None)
    rows.append(Compared("gradients", lasting.gradients, gradients, 0.0))
    engine.step()
    if on_gpu:
        held = _allocated(device) - before - sum(tensor.nbytes for tensor in (*inputs, text))
        rows.append(Compared("weights, optimizer and average", lasting.resident, held, STATES_ALLOWED))
    rows += engine_rows(engine)
    return rows


def engine_rows(engine: PlainEngine) -> list[Compared]:
    """Compare what an engine holds after an update with the plan, tensor by tensor and to the byte."""
    planned = trained_state(NetworkSize.of(engine.network), config.Zero(stage=0), gpus=1, low=True, ema=True)
    states = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
    averages = [] if engine.average is None else engine.average.averages
    weights = [*engine.network.parameters(), *engine.network.buffers()]
    return [
        Compared("weights", planned.weights, _sum(weights), 0.0),
        Compared("optimizer", planned.optimizer, _sum(states), 0.0),
        Compared("EMA", planned.ema, _sum(averages), 0.0),
    ]


def _planned_kept(small: bool, samples: int, side: int) -> int:
    network: Any = on_meta(lambda: _unet(small))
    ledger, gpu = Ledger(), GpuKernels()
    denoiser = Denoiser(network)
    for layer in denoiser.modules():
        if isinstance(layer, WideConv2d):
            gpu.leave_out(layer)
    x = torch.empty(samples, 4, side, side, device="meta")
    t = torch.zeros(samples, dtype=torch.int64, device="meta")
    condition = conditioning(network, KNOWN["sd15"], samples)
    with gpu.active(), ledger, gpu.autocast(True):
        prediction = denoiser(x, t, condition)
    kept = ledger.alive.total()
    del prediction
    return kept


def _unet(small: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    network: nn.Module = UNet2DConditionModel(**SMALL) if small else KNOWN["sd15"].reference()
    fuse(network)
    return network.eval()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _sum(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows; 1 if one is wrong."""
    parser = argparse.ArgumentParser(prog="check", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    rows = measure_states(device, small=device.type == "cpu")
    for row in rows:
        said = "right" if row.right else f"WRONG: may differ by {row.allowed:.0%}"
        print(f"{row.what:<32} planned {row.planned:>14,}  measured {row.measured:>14,}  {said}")
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
