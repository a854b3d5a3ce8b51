"""The prompts of an evaluation: any that a run reads, and the files of the standard sets, told by their format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.terminal import is_unicode
from diffpp_fast.training.config import Prompts
from diffpp_fast.training.prompts import open_prompts
from diffpp_fast.training.prompts.source import one_line

#: Files of the HPSv2 benchmark, one list of prompts for each style.
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
#: How the header of PartiPrompts begins.
PARTI_HEADER = ("Prompt", "Category")


class Prompt(NamedTuple):
    """A prompt, and the group that also has a mean of its own: a style, a category, or None."""

    text: str
    group: str | None = None


def read_prompts(path: str, *, column: str | None = None, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a file or a folder, in their order.

    The HPSv2 benchmark is a folder with `anime.json`, `concept-art.json`, `paintings.json` and `photo.json`, or one of
    them; PartiPrompts its `.tsv`; MS-COCO a JSON file of captions, of which each image's first by number is taken, in
    the order of the images' numbers. All else is read as a run's `prompts.path`.

    Args:
        path: the file or folder.
        column: the prompt's column in a table; None: "prompt".
        limit: the number of prompts to take, from the first.

    Raises ConfigurationError for what can't be read, and where there is no prompt.
    """
    found = _read(Path(path), path, column)
    if not found:
        raise ConfigurationError(f"prompts: {path} holds no prompt")
    return found[:limit]


def _read(file: Path, path: str, column: str | None) -> list[Prompt]:
    if file.is_dir() and any((file / f"{style}.json").is_file() for style in HPSV2_STYLES):
        return [prompt for style in HPSV2_STYLES for prompt in _read_json(file / f"{style}.json")]
    if file.suffix.lower() == ".json":
        return _read_json(file)
    if file.suffix.lower() == ".tsv" and column is None and _first_line(file).split("\t")[:2] == [*PARTI_HEADER]:
        return list(_read_parti(file))
    return [Prompt(text) for text in open_prompts(Prompts(path=path, column=column))]


def _read_json(file: Path) -> list[Prompt]:
    try:
        data: Any = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"prompts: {file}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets within brackets
        raise ConfigurationError(f"prompts: {file} can't be read: {error}") from None
    if isinstance(data, list) and all(isinstance(text, str) for text in data):
        prompts = [Prompt(_one_line(file, text), file.stem) for text in data]
    elif isinstance(data, dict) and isinstance(data.get("annotations"), list):
        prompts = [Prompt(text) for text in _coco_captions(file, data["annotations"])]
    else:
        raise ConfigurationError(
            f"prompts: {file} is neither a list of prompts, as HPSv2's, nor captions with the key annotations, as "
            "MS-COCO's; other formats are those of docs/prompts.md"
        )
    for number, prompt in enumerate(prompts, 1):
        if not prompt.text:
            raise ConfigurationError(f"prompts: {file}: prompt {number} is empty")
    return prompts


def _coco_captions(file: Path, annotations: list[Any]) -> list[str]:
    """Return one caption for each image."""
    try:
        ordered = sorted((entry["image_id"], entry["id"], _one_line(file, entry["caption"])) for entry in annotations)
    except (KeyError, TypeError, AttributeError):
        raise ConfigurationError(
            f"prompts: {file}: every annotation must have image_id, id and caption, as in captions_val2014.json"
        ) from None
    first: dict[Any, str] = {}
    for image, _, caption in ordered:
        first.setdefault(image, caption)
    return list(first.values())


def _read_parti(file: Path) -> Iterator[Prompt]:
    # Its fields are not quoted: a quotation mark is part of the prompt.
    for number, line in enumerate(_text(file).split("\n")[1:], 2):
        fields = line.split("\t")
        if line.strip() and (len(fields) < 2 or not fields[0].strip()):
            raise ConfigurationError(f"prompts: {file}, line {number}: no prompt and category between tabs")
        if line.strip():
            yield Prompt(_one_line(file, fields[0]), fields[1].strip())


def _one_line(file: Path, text: str) -> str:
    try:
        if not is_unicode(text):
            raise ValueError(": it holds half of a surrogate pair, which is no character")
        return one_line(text)
    except ValueError as error:
        raise ConfigurationError(f"prompts: {file}, {text[:80]!a}{error}") from None


def _first_line(file: Path) -> str:
    return _text(file).partition("\n")[0]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"prompts: can't read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"prompts: {file} is not UTF-8: {error.reason} at byte {error.start}") from None
