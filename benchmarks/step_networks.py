"""The networks of a whole training step at random weights, what trains them, and batches of addresses for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.reward import TOWERS, NetworkPlan, PathNetworks, Tower, default_dtype
from diffpp_fast.methods import Batch
from diffpp_fast.networks import Conditioning
from diffpp_fast.networks.lora import inject
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training import config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import PlainEngine

#: The layers that get an adapter: the trainer's default.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
#: Conditioning that batches take in turns.
PROMPTS = 64
#: Of AdamW. An update costs what it costs, and the weights stay those that the gate has seen.
LEARNING_RATE = 0.0
BETAS, CLIP, DECAY = (0.0, 0.999), 1.0, 0.999


class OneStepModel(NamedTuple):
    """A UNet2DConditionModel and how it is a one-step generator; its decoder has the same name in `reward.MODELS`."""

    unet: Mapping[str, Any]  # beyond diffusers' defaults, which are those of SD1.5
    timestep: int
    input_scale: float | None  # of z; None: the schedule's sigma
    batch: int  # where none is asked for and memory is not filled
    tokens: int = 77  # of every text encoder of the family


MODELS = {
    "tiny": OneStepModel(
        {
            "block_out_channels": (32, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
        },
        625,
        None,
        2,
    ),
    "small": OneStepModel({"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 128}, 625, None, 1),
    # That of the example, at random weights.
    "emoji": OneStepModel(
        {
            "block_out_channels": (64, 96),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 384,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        625,
        None,
        16,
        tokens=16,
    ),
    "sd15": OneStepModel({"cross_attention_dim": 768}, 625, None, 4),
    "sdxl": OneStepModel(
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        399,
        1.0,
        1,
    ),
}


class Parts(NamedTuple):
    """The modules of one provider. Other providers have others with the same parameters."""

    generator: nn.Module
    fake: nn.Module
    reference: nn.Module
    path: PathNetworks

    def twin(self) -> Parts:
        """Modules of their own on the same parameters, so that blocks can be swapped in one copy alone."""
        return Parts(twin(self.generator), twin(self.fake), twin(self.reference), self.path)


class StepNetworks:
    """Generator and TA in float32, the frozen ones in the dtype of the step.

    Args:
        model: of MODELS.
        latent: side of the latents.
        dtype: of the frozen networks' weights.
        device: "meta" makes them without memory.
        tower: of the reward; None: that of the device.
        lora: the rank of adapters for generator and TA on the reference's weights; None: networks of their own.
    """

    def __init__(
        self,
        model: str,
        latent: int,
        dtype: torch.dtype,
        device: torch.device,
        tower: Tower | None = None,
        lora: int | None = None,
    ) -> None:
        self.model = MODELS[model]
        self.dtype = dtype
        self.device = device
        self.shape = (4, latent, latent)
        self.schedule = stable_diffusion_schedule()
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            if lora is None:
                generator, fake = (self._unet(latent, torch.float32) for _ in range(2))
            reference = self._unet(latent, dtype).requires_grad_(False)
            if lora is not None:
                generator, fake = (_adapted(reference, name, lora) for name in ("generator", "fake"))
        facts = NetworkPlan(model, 1, latent, dtype, device, (), 0)
        self.parts = Parts(generator, fake, reference, PathNetworks(facts, tower or TOWERS[device.type]))
        #: Of the reward's gradient, so that it is as long as the score's.
        self.reward_scale = 1.0

    def _unet(self, latent: int, dtype: torch.dtype) -> nn.Module:
        from diffusers import UNet2DConditionModel

        with default_dtype(dtype):
            # In eval mode, as the trainer has it, so that no dropout draws from a global generator.
            return UNet2DConditionModel(**{"sample_size": latent, **self.model.unet}).eval()

    def exact(self, dtype: torch.dtype) -> StepNetworks:
        """The same numbers in `dtype`. What is in it already is shared."""
        other = copy.copy(self)
        other.dtype = dtype
        generator, fake, reference = (
            part if _dtype_of(part) == dtype else nn.Module.to(copy.deepcopy(part), dtype)
            for part in (self.parts.generator, self.parts.fake, self.parts.reference)
        )
        other.parts = Parts(generator, fake, reference, self.parts.path.cast(dtype))
        return other

    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` of `size` samples: other addresses and other prompts for every number."""
        first = number * size
        place = torch.arange(first, first + size, device=self.device)
        generator = torch.Generator(self.device).manual_seed(number % PROMPTS) if self.device.type != "meta" else None
        unet = self.model.unet
        wide = torch.promote_types(self.dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(wide)

        def embeddings(count: int) -> dict[str, Any]:
            tensors: dict[str, Any] = {
                "encoder_hidden_states": normal(count, self.model.tokens, unet["cross_attention_dim"])
            }
            if "addition_embed_type" in unet:
                times = 6 * unet["addition_time_embed_dim"]
                side = 8.0 * self.shape[-1]
                sizes = torch.tensor([side, side, 0.0, 0.0, side, side], dtype=wide, device=self.device)
                tensors["added_cond_kwargs"] = {
                    "text_embeds": normal(count, unet["projection_class_embeddings_input_dim"] - times),
                    "time_ids": sizes.expand(count, 6),
                }
            return tensors

        return Batch(
            place,
            Conditioning(("",) * size, embeddings(size)),
            shape=self.shape,
            null_conditioning=Conditioning(("",), embeddings(1)).expand(size),
        )


class Trained:
    """AdamW on a network, and its moving average: the state is the trainer's, and for every provider the same.

    Args:
        network: whose parameters are trained.
        average: keep a moving average of them.
    """

    def __init__(self, network: nn.Module, average: bool) -> None:
        named = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self.parameters = list(named.values())
        settings = config.Optimizer(lr=1.0, betas=BETAS, clip=CLIP).model_copy(update={"lr": LEARNING_RATE})
        world, ema = World.alone(self.parameters[0].device), config.EmaSection(decay=DECAY) if average else None
        self.engine = PlainEngine("generator", network, named, settings, 1, world, ema)
        self.optimizer: Any = self.engine.optimizer
        self.average = None if self.engine.average is None else self.engine.average.averages

    def update(self, ours: bool = False) -> None:
        """Clip the gradient, move weights and average and free the gradient: by hand, or as the trainer does."""
        if ours:
            self.engine.step()
            self.optimizer.grad_scale = self.optimizer.found_inf = None
        else:
            self._update_by_hand()

    @torch.no_grad()
    def _update_by_hand(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(self.parameters, CLIP, norm)
        self.optimizer.step()
        if self.average is not None:
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1.0 - DECAY)
        self.forget()

    def forget(self) -> None:
        """Frees the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Moves weights, optimizer state and average into another order of memory; nothing where they are in it."""
        lay_out(self.parameters, memory_format)
        states = (value for state in self.optimizer.state.values() for value in state.values())
        lay_out(chain(states, self.average or ()), memory_format)


def map_tensors(function: Callable[[Tensor], Tensor], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a function to the tensors among a network's keyword arguments, which may hold mappings."""
    return {
        name: map_tensors(function, value) if isinstance(value, Mapping) else function(value)
        for name, value in tensors.items()
    }


def twin(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares all parameters and buffers."""
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


@torch.no_grad()
def lay_out(tensors: Iterable[Tensor], memory_format: torch.memory_format) -> None:
    """In place, the [O, I, H, W] among the tensors; the values stay what they are."""
    for tensor in tensors:
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def stable_diffusion_schedule() -> NoiseSchedule:
    """The noise process of Stable Diffusion 1.5 and XL, predicting the noise."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    products = (1.0 - betas).cumprod(0)
    return NoiseSchedule(products.sqrt(), (1.0 - products).sqrt(), "epsilon")


def resident_bytes(networks: StepNetworks) -> int:
    """Return the bytes of weights, gradients, AdamW's two moments and the generator's average: resident all the time.

    Gradients count once, for the two networks are updated one after the other.
    """
    parts = networks.parts
    generator, fake = (sum(weight.nbytes for weight in trained_of(part)) for part in (parts.generator, parts.fake))
    # Weights under adapters are the reference's.
    frozen = sum(map(_bytes, (parts.reference, *parts.path.networks)))
    return 4 * generator + 3 * fake + max(generator, fake) + frozen


def trained_of(network: nn.Module) -> list[nn.Parameter]:
    """Return what is trained of a network."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _adapted(reference: nn.Module, name: str, rank: int) -> nn.Module:
    """A network on the reference's weights with adapters as they are in the middle of a run."""
    network = twin(reference)
    inject(network, name, rank=rank, alpha=rank, targets=ADAPTED)
    for path, weight in network.named_parameters():
        if ".lora_" in path:
            weight.data = torch.randn(weight.shape) / rank
    return network


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
