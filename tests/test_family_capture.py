"""Every family's updates without what a CUDA graph forbids: numbers that are read, and copies to or from the device."""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from typing import Any

import method_cases
import pytest
import tiny
import tiny_flux
import torch
from family_networks import FAMILIES, inputs, network
from test_capture import WAITS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffpp_fast import ops
from diffpp_fast.methods import METHODS, Batch
from diffpp_fast.networks import (
    Conditioning,
    Denoiser,
    FewStepGenerator,
    FrozenDecoder,
    OneStepGenerator,
    freeze,
    fuse,
)
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.build.networks import _recompute

aten = torch.ops.aten
#: What makes tensors of Python's numbers, by a copy from the host where they are to be on a device; and the way back.
OF_NUMBERS = {"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor"}
TO_NUMBERS = {"tolist", "numpy"}


def devices(values: Any) -> set[str]:
    """Where the tensors among some values are; numbers that are tensors go along with a launch."""
    return {value.device.type for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.dim()}


def place() -> str:
    """Name the innermost line of a network or of this package."""
    frame = [frame for frame in traceback.extract_stack() if "/diff" in frame.filename or "/test" in frame.filename][-1]
    return f"{frame.filename}:{frame.lineno}"


class Copies(TorchDispatchMode):
    """Refuses operators that wait for a device, or that read or write beyond it."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        met = devices((arguments, options))
        assert function.overloadpacket not in WAITS or met == {"cpu"}, f"{function} waits: {place()}"
        crosses = len(met | devices(result)) > 1
        if function.overloadpacket in (aten._to_copy, aten.copy_):
            every = [each for each in tree_leaves((arguments, result)) if isinstance(each, torch.Tensor)]
            crosses = len({each.device.type for each in every}) > 1
        assert not crosses, f"{function} goes from one device to another: {place()}"
        return result


class Numbers(TorchFunctionMode):
    """Refuses tensors of Python's numbers on a device, which are made by a copy that no operator shows."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result, name = function(*arguments, **(options or {})), getattr(function, "__name__", "")
        made = name in OF_NUMBERS and result.device.type != "cpu"
        index = arguments[1] if name in ("__getitem__", "__setitem__") else ()
        listed = any(isinstance(each, list) for each in (index if isinstance(index, tuple) else (index,)))
        assert not made and not listed and name not in TO_NUMBERS, f"{name} of Python's numbers: {place()}"
        return result


def test_what_is_forbidden_is_seen() -> None:
    x = torch.zeros(3, 4, device="meta")
    forbidden = [
        lambda: torch.tensor(2, device="meta"),
        lambda: x.new_tensor([1.0]),
        lambda: x[:, [0, 1]],
        lambda: x[torch.tensor([0, 1])],
        lambda: torch.ones(3).to("meta"),
        lambda: torch.ones(()).to("meta"),
        lambda: x.copy_(torch.ones(3, 4)),
    ]
    for made in forbidden:
        with pytest.raises(AssertionError), Copies(), Numbers():
            made()
    with Copies(), Numbers():
        torch.arange(4, device="meta") * torch.tensor(2.0) + torch.full((4,), 3.0, device="meta")


def update(family: str, name: str, timesteps: tuple[int, ...], *, recompute: bool) -> None:
    """Both updates on the meta device, which is not the host's: once for caches, and again where copies are refused."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = method_cases.variance_preserving()
    if family in FAMILIES[3:]:
        schedule = NoiseSchedule.from_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0))
    networks: list[Any] = [network(family, seed) for seed in range(3)]
    for each in networks:
        fuse(each)
        if recompute:
            each.enable_gradient_checkpointing(_recompute)
    freeze(networks[2])
    generator, fake, reference = (Denoiser(each.to("meta")) for each in networks)
    drawing: Any = OneStepGenerator(generator, schedule, timestep=timesteps[0])
    if len(timesteps) > 1:
        drawing = FewStepGenerator(generator, schedule, timesteps=timesteps)
    kind = METHODS[name]
    options: dict[str, Any] = {"guidance_scale": 1.5, "t_range": (20, 980)}
    if kind.takes_reward:
        options |= {"reward": lambda x0, _: x0.mean((1, 2, 3)), "reward_scale": 1.0, "reward_clip": 1.0}
    method = kind(drawing, fake, reference, schedule, **options)
    x, _, text = inputs(family, 2, tokens=40)
    conditioning = Conditioning(("",) * 2, text).to("meta")
    null = conditioning[:1].map(lambda tensor: tensor[:1]).expand(2)
    batch = Batch(torch.arange(2, device="meta"), conditioning, seed=3, shape=x.shape[1:], null_conditioning=null)
    modes: tuple[Any, ...]
    for modes in ((), (Copies(), Numbers())):
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            for loss in (method.fake_loss, method.generator_loss):
                loss(batch).loss.backward()


@pytest.mark.parametrize("family", [pytest.param(each, marks=() if each == "qwen_image" else pytest.mark.slow)
                                    for each in FAMILIES])  # fmt: skip
def test_a_familys_updates_can_be_captured(family: str) -> None:
    update(family, "diff_instruct_pp", (625,), recompute=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_updates_of_a_few_steps_can_be_captured(family: str) -> None:
    update(family, "dmd2", (900, 600), recompute=True)


#: Autoencoders of the families, with the latents' shape.
DECODERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "stable diffusion": (tiny.vae, tiny.LATENT),
    "sana": (tiny.deep_vae, tiny.LATENT),
    "flux_2": (tiny_flux.flux_2_vae, tiny_flux.LATENTS["flux_2"]),
    "qwen_image": (tiny_flux.qwen_image_vae, tiny_flux.LATENTS["qwen_image"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_a_rewards_way_through_a_familys_decoder_can_be_captured(kind: str) -> None:
    build, shape = DECODERS[kind]
    decode = FrozenDecoder(build().eval()).to("meta")
    latents = torch.randn(2, *shape).to("meta").requires_grad_()
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    modes: tuple[Any, ...]
    for modes in ((), (Copies(), Numbers())):
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            ops.reward_pixels(decode(latents), 8, mean=mean, std=std).sum().backward()
