"""A reward's pixels against its official preprocessing, written here with Pillow on 8-bit images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffpp_fast.rewards import ImageBatch, Preprocessing

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SIZES = [(512, 512), (512, 384), (300, 449), (64, 96), (224, 224), (830, 1214)]


def picture(height: int, width: int, low: float, high: float) -> np.ndarray:
    """8-bit [H, W, 3], smooth with some texture and edges."""
    rows, columns = np.mgrid[:height, :width]
    waves = [
        np.sin(rows / 9 + c) * np.cos(columns / 13 - c) + 0.4 * ((rows // 31 + columns // 23) % 2) for c in range(3)
    ]
    stack = np.stack(waves, 2) + 0.1 * np.random.default_rng(0).standard_normal((height, width, 3))
    unit = (stack - stack.min()) / (stack.max() - stack.min())
    return np.round(255 * (low + (high - low) * unit)).astype(np.uint8)


def decoded(picture: np.ndarray) -> Tensor:
    """[1, 3, H, W] in [-1, 1], as a decoder would give it."""
    return (torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 127.5 - 1).float()


def clip_official(picture: np.ndarray, size: int) -> Tensor:
    """openai/CLIP `_transform`: torchvision's Resize(bicubic), CenterCrop, ToTensor, Normalize on a PIL image."""
    image = Image.fromarray(picture)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short != size:
        longer = int(size * long / short)
        image = image.resize((size, longer) if width <= height else (longer, size), Image.Resampling.BICUBIC)
    width, height = image.size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - MEAN) / STD


def hps_official(picture: np.ndarray, size: int, antialias: bool = True) -> Tensor:
    """HPSv2 `ResizeMaxSize` on a float tensor, after ToTensor: long side to size, zeros around, Normalize."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1).double() / 255
    height, width = pixels.shape[1:]
    scale = size / float(max(height, width))
    if scale != 1.0:
        new = round(height * scale), round(width * scale)
        pixels = F.interpolate(pixels[None], new, mode="bicubic", align_corners=False, antialias=antialias)[0]
        below, right = size - new[0], size - new[1]
        pixels = F.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))
    return ((pixels - MEAN) / STD).float()


def ours(picture: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    return ImageBatch(decoded(picture)).pixels(preprocessing, torch.float32)[0]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [224, 336])
def test_crop_is_that_of_clip_but_for_rounding_to_8_bits(height: int, width: int, size: int) -> None:
    """Pillow rounds twice, after the rows and after the columns: half a level, widened by the second filter's negative
    lobes (1.25 at most for this cubic), and another half.
    """
    image = picture(height, width, 0.15, 0.85)
    difference = (ours(image, Preprocessing(size)) - clip_official(image, size)) * STD * 255
    assert difference.abs().max() <= 0.5 * 1.25 + 0.5 + 0.01
    assert difference.square().mean().sqrt() <= 0.5
    assert difference.mean().abs() <= 0.03


def test_over_the_full_range_pillow_also_cuts_the_overshoot_off() -> None:
    image = picture(512, 512, 0.0, 1.0)
    image[100:200, 100:200], image[200:300, 100:200] = 255, 0
    pixels = ours(image, Preprocessing(224)) * STD + MEAN
    official = clip_official(image, 224) * STD + MEAN
    assert pixels.max() > 1.02  # the cubic's overshoot at an edge from black to white
    # Cut off in the same place, the rest is rounding, but for corners, where Pillow cuts after the rows already.
    difference = (pixels.clamp(0, 1) - official).abs() * 255
    assert difference.quantile(0.999) <= 1.2
    assert difference.max() <= 16
    assert ((pixels - official) * 255).square().mean().sqrt() <= 1.0


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pad_is_that_of_hpsv2_exactly(height: int, width: int, antialias: bool) -> None:
    """HPSv2 resizes floating-point pixels: on an 8-bit image there is no difference."""
    image = picture(height, width, 0.0, 1.0)
    pixels = ours(image, Preprocessing(224, fit="pad", antialias=antialias))
    torch.testing.assert_close(pixels, hps_official(image, 224, antialias), rtol=0, atol=2e-5)


def test_an_image_that_was_never_8_bits_differs_by_half_a_level() -> None:
    """The decoder's images are not rounded to 8 bits: at most half a level before the resize, 1.6 times that after."""
    exact = torch.rand(1, 3, 300, 400, generator=torch.Generator().manual_seed(0))
    rounded = (exact * 255).round() / 255
    for preprocessing in (Preprocessing(224), Preprocessing(224, fit="pad")):
        difference = preprocessing(2 * exact - 1, torch.float32) - preprocessing(2 * rounded - 1, torch.float32)
        level = (difference[0] * STD * 255).abs()
        assert level.max() <= 0.5 * 1.25**2
        assert level.max() > 0.05


def test_square_images_are_those_of_transformers_processor() -> None:
    """PickScore's official preprocessing is the processor of CLIP-ViT-H-14: CLIPImageProcessor at its defaults."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(512, 512, 0.15, 0.85)
    official = CLIPImageProcessorPil()(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"][0]
    assert ((ours(image, Preprocessing(224)) - official) * STD * 255).abs().max() <= 1.15


def test_transformers_processor_crops_one_pixel_aside_where_the_rest_is_odd() -> None:
    """A known difference of PickScore, e.g. at 1216 x 832: torchvision rounds half to even, transformers down."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    height, width = 152, 104
    longer = int(224 * height / width)
    rest = longer - 224
    assert rest % 2 == 1
    image = picture(height, width, 0.15, 0.85)
    official = CLIPImageProcessorPil()(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"][0]
    shift = round(rest / 2) - math.floor(rest / 2)
    pixels = ours(image, Preprocessing(224))
    overlap = (pixels[:, : 224 - shift] - official[:, shift:]) * STD * 255
    assert overlap.abs().max() <= 1.15
