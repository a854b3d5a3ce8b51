"""Floor 3: diffusers' networks as the callables that methods take; diffusers is imported when one is loaded."""

from diffpp_fast.networks.attention import AttentionProcessor, set_attention
from diffpp_fast.networks.conditioning import Conditioning
from diffpp_fast.networks.decoder import FrozenDecoder
from diffpp_fast.networks.denoiser import Denoiser
from diffpp_fast.networks.discriminator import MiddleBlockDiscriminator
from diffpp_fast.networks.encoding import ImageEncoder
from diffpp_fast.networks.few_step import FewStepGenerator
from diffpp_fast.networks.freezing import FreezingRow, freeze, freezing_report, unfreeze
from diffpp_fast.networks.fusion import FusionRow, fuse, fusion_report, unfuse
from diffpp_fast.networks.loading import load_decoder, load_denoiser, load_schedule
from diffpp_fast.networks.one_step import OneStepGenerator
from diffpp_fast.networks.quantization import QuantizationRow, quantization_report, quantize
from diffpp_fast.networks.text import DualTextEncoder, TextEncoder

__all__ = [
    "AttentionProcessor",
    "Conditioning",
    "Denoiser",
    "DualTextEncoder",
    "FewStepGenerator",
    "FreezingRow",
    "FrozenDecoder",
    "FusionRow",
    "ImageEncoder",
    "MiddleBlockDiscriminator",
    "OneStepGenerator",
    "QuantizationRow",
    "TextEncoder",
    "freeze",
    "freezing_report",
    "fuse",
    "fusion_report",
    "load_decoder",
    "load_denoiser",
    "load_schedule",
    "quantization_report",
    "quantize",
    "set_attention",
    "unfreeze",
    "unfuse",
]
