"""Captioned pictures from Noto Color Emoji: 64 x 64, white ground, a little variation in place, size and angle.

    python examples/emoji/data.py --out build/emoji

A caption ("a red apple") names its picture by the emoji's English short name. Writes `pictures.safetensors` with
`images` [N, 3, 64, 64] uint8, `caption` [N] int64 (line of prompts.txt; N = 200 captions x views) and `everything`
[M, 3, 64, 64] uint8, the whole font, which only the autoencoder sees. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rewards import captions
from safetensors.torch import save_file

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the one size that this bitmap font has
SIZE = 64


def characters() -> dict[str, str]:
    """English short name ("red_apple") -> character, without skin tones."""
    return {
        entry["en"].strip(":"): character
        for character, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"] and "skin_tone" not in entry["en"]
    }


def name_of(caption: str) -> str:
    """The emoji's short name in a caption: the article goes, spaces become underscores."""
    first, _, rest = caption.partition(" ")
    return (rest if first in {"a", "an", "the"} else caption).replace(" ", "_")


def glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The picture cropped to its ink, RGBA; None where the font has no such glyph."""
    canvas = Image.new("RGBA", (3 * FONT_SIZE, 2 * FONT_SIZE), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((FONT_SIZE // 2, FONT_SIZE // 4), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None or box[2] - box[0] > 1.5 * FONT_SIZE:  # absent, or a sequence drawn as several glyphs
        return None
    return canvas.crop(box)


def view(picture: Image.Image, generator: np.random.Generator) -> np.ndarray:
    """One variation, [3, 64, 64] uint8: turned by up to 12 degrees, perhaps mirrored, 72 to 92 % wide, central."""
    if generator.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(generator.uniform(-12, 12), resample=Image.Resampling.BICUBIC, expand=True)
    box = picture.getchannel("A").getbbox()
    picture = picture.crop(box)
    longest = generator.uniform(0.72, 0.92) * SIZE
    ratio = longest / max(picture.size)
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    # Near the middle: half of the free room on either side.
    left, top = (round(free * generator.uniform(0.25, 0.75)) for free in (SIZE - width, SIZE - height))
    ground = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    ground.alpha_composite(picture, (left, top))
    return np.ascontiguousarray(np.asarray(ground.convert("RGB")).transpose(2, 0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/emoji"))
    parser.add_argument("--font", type=Path, default=FONT, help="Debian: apt-get install fonts-noto-color-emoji")
    parser.add_argument("--views", type=int, default=64, help="pictures per caption")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.font.is_file():
        parser.error(
            f"no font at {args.font}; on Debian: apt-get install fonts-noto-color-emoji, elsewhere pass --font"
        )

    font = ImageFont.truetype(str(args.font), FONT_SIZE)
    known = characters()
    images, labels = [], []
    for index, caption in enumerate(captions()):
        picture = glyph(known[name_of(caption)], font)
        if picture is None:
            parser.error(f"{args.font} has no picture of {caption!r}")
        generator = np.random.default_rng([args.seed, index])
        images += [view(picture, generator) for _ in range(args.views)]
        labels += [index] * args.views

    everything = []
    for index, character in enumerate(known.values()):
        picture = glyph(character, font)
        if picture is not None:
            generator = np.random.default_rng([args.seed, 1_000_000 + index])
            everything += [view(picture, generator) for _ in range(4)]

    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {
        "images": torch.from_numpy(np.stack(images)).contiguous(),
        "caption": torch.tensor(labels),
        "everything": torch.from_numpy(np.stack(everything)).contiguous(),
    }
    save_file(tensors, args.out / "pictures.safetensors")
    print(f"{len(images)} pictures of {len(captions())} captions, {len(everything)} of the whole font -> {args.out}")


if __name__ == "__main__":
    main()
