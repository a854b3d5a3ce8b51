"""Which kernel attends, in diffusers' UNets, PixArt and autoencoders.

Their own processor calls `scaled_dot_product_attention` itself, so that `set_attention_backend` of diffusers says yes
and changes nothing there. The processor here does the same arithmetic and reaches the backend that is named.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Container
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffpp_fast import install

#: (query, key, value, mask or None, scale) -> attended; [B, heads, N, D], mask [B, heads, 1 or N, N'] added to scores.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
HALF = (torch.float16, torch.bfloat16)


class Backend(NamedTuple):
    """A backend, and what it serves."""

    gpu: bool = True  # and nothing else
    dtypes: tuple[torch.dtype, ...] | None = None  # None: all
    most_head_dim: int | None = None
    head_dim_multiple: int = 1
    masks: bool = True
    package: str | None = None  # that it needs
    extra: str = ""  # that brings it


#: Limits on the head dimension are those of aten's sdp_utils.cpp; some GPUs serve less, and torch says so.
BACKENDS = {
    "sdpa": Backend(gpu=False),
    "math": Backend(gpu=False),
    "flash": Backend(dtypes=HALF, most_head_dim=256, masks=False),
    "cudnn": Backend(dtypes=HALF, most_head_dim=256, head_dim_multiple=8),
    "efficient": Backend(dtypes=(*HALF, torch.float32), head_dim_multiple=4),
    "flash_attn": Backend(
        dtypes=HALF,
        most_head_dim=256,
        masks=False,
        package="flash_attn",
        extra="flash",
    ),
    "xformers": Backend(dtypes=(*HALF, torch.float32), head_dim_multiple=4, package="xformers", extra="xformers"),
}
_SDPA = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: The backends by the names that diffusers has for them, whose newer processors can be told one.
_TOLD = {
    "sdpa": "native",
    "math": "_native_math",
    "flash": "_native_flash",
    "cudnn": "_native_cudnn",
    "efficient": "_native_efficient",
    "flash_attn": "flash",
    "xformers": "xformers",
}


def set_attention(module: nn.Module, backend: str) -> int:
    """Makes every attention layer of a diffusers network use `backend`, and nothing else.

    Args:
        module: a UNet2DConditionModel, a PixArtTransformer2DModel, an AutoencoderKL, or any module that holds their
            `Attention` layers; or a network whose own processors choose among backends (FLUX, Qwen-Image, Z-Image).
        backend: "sdpa" (torch chooses among the next four) and "math" (unfused) serve everything; others CUDA alone.
            "flash": torch's FlashAttention, for float16 and bfloat16, heads of up to 256 channels, no mask. "cudnn":
            the same dtypes, heads of up to 256 channels in multiples of 8; 128 on some GPUs. "efficient": torch's
            memory-efficient attention, heads in multiples of 4 channels, of 8 in half precision. "flash_attn" and
            "xformers": the packages of that name, for what "flash" and "efficient" serve.

    Returns:
        How many layers were set.

    Raises:
        ValueError: unknown backend, or a layer whose processor does more than attend (adapters, fused projections).
        RuntimeError: the package is not installed, there is no GPU, or a head is too wide for the backend. What only
            tensors tell (dtype, device, a mask) is refused when a layer is called. Nothing is changed then.
    """
    if backend not in BACKENDS:
        raise ValueError(f"set_attention: unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    attend = _attend(backend)
    told = {name: part for name, part in module.named_modules() if _can_be_told(part)}
    layers = _layers(module, told)
    for name, layer in (layers | told).items():
        reason = _head_dim_refused(
            BACKENDS[backend], getattr(layer, "head_dim", None) or layer.inner_dim // layer.heads
        )
        if reason is not None:
            raise RuntimeError(f"set_attention: backend {backend!r} can't serve {name or 'the layer'}: {reason}")
    if BACKENDS[backend].gpu and (layers or told) and not torch.cuda.is_available():
        raise RuntimeError(
            f"set_attention: backend {backend!r} serves CUDA tensors only, and PyTorch can use no GPU; "
            "'sdpa' and 'math' serve the CPU"
        )
    processor = AttentionProcessor(backend, attend)
    for layer in layers.values():
        layer.set_processor(processor)
    for layer in told.values():
        layer.processor._attention_backend = _TOLD[backend]
    return len(layers) + len(told)


def _can_be_told(part: Any) -> bool:
    """Return whether a layer's processor hands its attention to the backend that it was told."""
    return hasattr(getattr(part, "processor", None), "_attention_backend")


class AttentionProcessor:
    """A processor for diffusers' `Attention`: the arithmetic of its AttnProcessor2_0 on a backend of one's choice.

    Args:
        backend: its name.
        attend: its function: (query, key, value, mask or None, scale) -> [B, heads, L, D], of tensors so shaped.
    """

    def __init__(self, backend: str, attend: Attend) -> None:
        self.backend = backend
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, N, C] or [B, C, H, W] -> the same shape.

        Args:
            attn: the layer.
            hidden_states: gives the queries.
            encoder_hidden_states: [B, N', C'] gives keys and values, or None for hidden_states.
            attention_mask: as diffusers prepares it: added to the scores, [B or B heads, 1 or N, N'].
            temb: for layers with a spatial norm.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch = len(context)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        def heads(values: Tensor) -> Tensor:
            return values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        reason = _refused(BACKENDS[self.backend], value, attention_mask)
        if reason is not None:
            raise RuntimeError(f"attention: backend {self.backend!r} can't serve this call: {reason}")
        attended = self._attend(query, key, value, attention_mask, attn.scale)
        hidden_states = attended.transpose(1, 2).flatten(2).to(query.dtype)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states if attn.rescale_output_factor == 1.0 else hidden_states / attn.rescale_output_factor


def _layers(module: nn.Module, told: Container[str]) -> dict[str, Any]:
    """The attention layers by name but for some, if it is known what their processors do."""
    from diffusers.models import attention_processor as theirs

    plain = (
        AttentionProcessor,
        theirs.AttnProcessor,
        theirs.AttnProcessor2_0,
        theirs.SlicedAttnProcessor,
        theirs.XFormersAttnProcessor,
    )
    layers = {name: part for name, part in module.named_modules() if isinstance(part, theirs.Attention)}
    layers = {name: layer for name, layer in layers.items() if name not in told}
    for name, layer in layers.items():
        if not isinstance(layer.processor, plain):
            kind = type(layer.processor).__name__
            raise ValueError(f"set_attention: {name or 'the layer'} has a {kind}, whose work this can't take over")
    return layers


def _attend(backend: str) -> Attend:
    """The backend's function.

    Raises RuntimeError if its package is not installed or can't be imported.
    """
    if backend == "sdpa":
        return _sdpa
    if backend in _SDPA:
        return _Restricted(_SDPA[backend])
    package, command = str(BACKENDS[backend].package), install.extra(BACKENDS[backend].extra)
    if package == "flash_attn":  # is compiled against the torch that is here, by packages that it does not ask for
        build = command.replace("pip install", "pip install --no-build-isolation", 1)
        command = f"where nvcc is, pip install ninja packaging psutil, then {build}"
    if find_spec(package) is None:
        raise RuntimeError(
            f"set_attention: backend {backend!r} needs the package {package}, which is not installed: {command}"
        )
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(f"set_attention: the package {package} can't be imported ({error}): {command}") from error
    return _flash_attn if backend == "flash_attn" else _xformers


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class _Restricted:
    """torch's scaled_dot_product_attention with one of its backends."""

    def __init__(self, backend: SDPBackend) -> None:
        self._backend = backend

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        with sdpa_kernel(self._backend):
            return _sdpa(query, key, value, mask, scale)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    attended: Tensor = flash_attn_func(*(values.transpose(1, 2) for values in (query, key, value)), softmax_scale=scale)
    return attended.transpose(1, 2)


def _xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if mask is not None:
        # Its kernels want rows of the mask to begin at multiples of 8 elements, and the whole shape.
        width = mask.shape[-1]
        mask = F.pad(mask.to(query.dtype), (0, -width % 8))[..., :width].expand(*query.shape[:3], width)
    attended: Tensor = memory_efficient_attention(
        *(values.transpose(1, 2) for values in (query, key, value)), attn_bias=mask, scale=scale
    )
    return attended.transpose(1, 2)


def _refused(backend: Backend, value: Tensor, mask: Tensor | None) -> str | None:
    """None, or why a backend can't attend to these values [B, heads, N, D]."""
    if backend.gpu and not value.is_cuda:
        return f"it serves CUDA tensors, these are on {value.device.type}"
    if backend.dtypes is not None and value.dtype not in backend.dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        return f"it serves {known}, these are {str(value.dtype).removeprefix('torch.')}"
    if mask is not None and not backend.masks:
        return "it takes no attention mask"
    return _head_dim_refused(backend, value.shape[-1])


def _head_dim_refused(backend: Backend, head_dim: int) -> str | None:
    if backend.most_head_dim is not None and head_dim > backend.most_head_dim:
        return f"its heads have {head_dim} channels, the backend serves up to {backend.most_head_dim}"
    if head_dim % backend.head_dim_multiple:
        return f"its heads have {head_dim} channels, the backend serves multiples of {backend.head_dim_multiple}"
    return None
