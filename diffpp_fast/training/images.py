"""Users' images with captions, by index: of a folder or of WebDataset archives; as latents for the samples of a run."""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods.base import IMAGE_ORDER, ImageData
from diffpp_fast.networks import Conditioning
from diffpp_fast.training.config import ImageSection
from diffpp_fast.training.inputs import digest_of
from diffpp_fast.training.prompts.order import PromptOrder
from diffpp_fast.training.prompts.source import find_files, one_line

KEY = "method.regularizers.images"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION = ".txt"
#: Bytes of a picture in which its header is looked for when a run begins.
HEADER = 1 << 20
#: Bytes of latents that are kept.
CAPACITY = 256 * 2**20
#: Bytes of a caption; more is not text that somebody wrote.
LONGEST = 1 << 20


class _Entry(NamedTuple):
    """A picture: its file, where in it, and its caption; `name` is told in messages."""

    name: str
    file: Path
    offset: int
    size: int
    caption: str


class ImageSource:
    """Pictures with captions, in an order that does not change. Pictures are read when they are asked for.

    A picture `x.png` has its caption in `x.txt` beside it, in the same folder (with all that is below it) or archive.

    Args:
        path: a folder, or uncompressed `.tar` archives, which braces and wildcards may name.
        height, width: in pixels, that every picture is brought to: resized to cover them, then its centre is cut out.

    Raises ConfigurationError for what can't be read, for no picture, and for one without caption or that is damaged.
    """

    def __init__(self, path: str, height: int, width: int) -> None:
        self.path, self.height, self.width = path, height, width
        self._entries: list[_Entry] = []
        try:
            for file in find_files(path, KEY):
                self._entries += _in_folder(file) if file.is_dir() else _in_archive(file)
            for entry in self._entries:
                self._open(entry, HEADER)
        except OSError as error:
            raise ConfigurationError(f"{KEY}: can't read {path}: {error.strerror or error}") from None
        if not self._entries:
            raise ConfigurationError(f"{KEY}: {path} holds no picture ({', '.join(PICTURES)})")

    def __len__(self) -> int:
        return len(self._entries)

    def captions(self) -> list[str]:
        """Return the captions of all pictures, in order."""
        return [entry.caption for entry in self._entries]

    def read(self, index: int) -> Tensor:
        """Return a picture [3, height, width], float32 in [-1, 1]. Raises ConfigurationError for a damaged one."""
        from PIL import Image, ImageOps

        entry = self._entries[index]
        try:
            picture = ImageOps.exif_transpose(self._open(entry))
            fitted = ImageOps.fit(picture.convert("RGB"), (self.width, self.height), Image.Resampling.LANCZOS)
            data = bytearray(fitted.tobytes())
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigurationError(f"{KEY}: the picture {entry.name} can't be read: {error}") from None
        pixels = torch.frombuffer(data, dtype=torch.uint8).view(self.height, self.width, 3)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1.0

    def facts(self) -> list[Any]:
        """Return what tells these pictures from others: names, bytes in all and captions."""
        return [[os.path.basename(entry.name), entry.size, entry.caption] for entry in self._entries]

    def _open(self, entry: _Entry, most: int | None = None) -> Any:
        """Return Pillow's image, of which the header has been read, from so many bytes of it at most."""
        from PIL import Image

        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size if most is None else min(entry.size, most))
        try:
            return Image.open(io.BytesIO(data))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConfigurationError(f"{KEY}: {entry.name} is no picture: {error}") from None


def open_images(section: ImageSection | None, size: tuple[int, int]) -> ImageSource | None:
    """Open the images of a configuration, at this height and width; None where it has none."""
    return None if section is None else ImageSource(section.path, *size)


class ImageBatches:
    """The images that samples come with, as latents and conditioning: a function of the seed and the sample number.

    Every image comes once in as many consecutive sample numbers as there are images, in an order of its own each time.
    Latents are made one by one, so that none depends on the others of a batch, and those made last are kept.

    Args:
        source: of the images.
        seed: of the run.
        encode_image: images [1, 3, H, W] in [-1, 1] -> latents [1, C, h, w], on the device.
        device: of them.
        capacity: bytes of latents to keep.
    """

    def __init__(
        self,
        source: ImageSource,
        seed: int,
        encode_image: Callable[[Tensor], Tensor],
        device: torch.device,
        capacity: int = CAPACITY,
    ) -> None:
        self.source, self.encode_image, self.device, self.capacity = source, encode_image, device, capacity
        self.order = PromptOrder(seed, len(source), IMAGE_ORDER)
        self._captions = source.captions()
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def __call__(self, numbers: Tensor, encode: Callable[[Sequence[str]], Conditioning]) -> ImageData:
        """Sample numbers, int64 [B] on the CPU -> their images.

        Args:
            numbers: of the samples.
            encode: captions -> their conditioning.
        """
        indices = self.order(numbers).tolist()
        latents = torch.cat([self._latents(index) for index in indices])
        return ImageData(latents, encode([self._captions[index] for index in indices]))

    def _latents(self, index: int) -> Tensor:
        if index not in self._kept:
            self._kept[index] = self.encode_image(self.source.read(index)[None].to(self.device))
            if len(self._kept) * self._kept[index].nbytes > self.capacity and len(self._kept) > 1:
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return self._kept[index]


def digest_of_images(source: ImageSource, encoder: Any) -> str:
    """Return a digest of the pictures' names, sizes and captions, and of the weights that encode them."""
    return digest_of([source.height, source.width, source.facts()], dict(encoder.state_dict()))


def _in_folder(folder: Path) -> list[_Entry]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]

    def caption(file: Path) -> str:
        beside = file.with_suffix(CAPTION)
        if not beside.is_file():
            raise ConfigurationError(f"{KEY}: {file} has no caption: write it into {beside}")
        with open(beside, "rb") as opened:
            return _caption(str(beside), opened.read(LONGEST + 1))

    return [_Entry(str(file), file, 0, file.stat().st_size, caption(file)) for file in files]


def _in_archive(path: Path) -> list[_Entry]:
    from diffpp_fast.training.prompts.readers import BoundedReader, members

    pictures: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, tuple[int, int]] = {}
    with BoundedReader(io.FileIO(path)) as file:
        for member in members(path, file, KEY):
            sample, dot, suffix = member.name.rpartition(".")
            if member.name.rpartition("/")[2].startswith("."):
                continue
            if dot + suffix.lower() in PICTURES:
                if sample in pictures:
                    raise ConfigurationError(f"{KEY}: {path} holds two pictures of one name, {member.name}")
                pictures[sample] = member
            elif dot + suffix.lower() == CAPTION:
                texts[sample] = member.offset_data, member.size
        entries = []
        for sample, member in pictures.items():
            name = f"{path}, member {member.name}"
            if sample not in texts:
                raise ConfigurationError(f"{KEY}: {name} has no caption: there is no member {sample}{CAPTION}")
            offset, size = texts[sample]
            file.seek(offset)
            caption = _caption(f"{path}, member {sample}{CAPTION}", file.read(min(size, LONGEST + 1)))
            entries.append(_Entry(name, path, member.offset_data, member.size, caption))
    return entries


def _caption(name: str, data: bytes) -> str:
    try:
        if len(data) > LONGEST:
            raise ValueError(f" has more than {LONGEST >> 20} MiB: is it text?")
        text = one_line(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{KEY}: the caption {name} is not UTF-8 ({error.reason})") from None
    except ValueError as error:
        raise ConfigurationError(f"{KEY}: the caption {name}{error}") from None
    if not text:
        raise ConfigurationError(f"{KEY}: the caption {name} is empty")
    return text
