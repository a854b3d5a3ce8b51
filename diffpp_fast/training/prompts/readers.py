"""The prompts of one file in turn: a library takes each format apart, and what is malformed is named by its place."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.terminal import is_unicode
from diffpp_fast.training.prompts.source import AROUND, DATASET, SPLITS, one_line

Item = TypeVar("Item")

#: Rows of a table that are checked at a time.
ROWS = 1 << 14
#: Characters of a line, bytes of an archive's member or header; more is not text that somebody wrote.
LONGEST = 1 << 20
#: Byte order marks of UTF-16 and UTF-32, as bytes that are not UTF-8 are decoded here.
MARKS_16 = ("\udcff\udcfe", "\udcfe\udcff")

# `json.loads` spends half its time on the white space around a value.
_parse_json = json.JSONDecoder().raw_decode


def read(path: Path, format: str, column: str | None) -> Iterator[str]:
    """Yield the prompts of a file, or of a dataset's folder.

    Args:
        path: of the file.
        format: a key of `READERS`.
        column: where in a row or an object the prompt stands; None: "prompt", and in archives the .txt members if any.

    Raises ConfigurationError for what can't be read, is malformed or holds no prompt.
    """
    empty = True
    try:
        for prompt in READERS[format](path, column):
            empty = False
            yield prompt
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"prompts: can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    if empty:
        raise ConfigurationError(f"prompts: {path} holds no prompt")


def read_text(path: Path, column: str | None) -> Iterator[str]:
    """Yield the lines of a text file. Blank ones are skipped."""
    return filter(None, _parsed(path, "line", _lines(path), one_line))


def read_json_lines(path: Path, column: str | None) -> Iterator[str]:
    """Yield what a JSON object in each line has under a key. Blank lines are skipped."""
    lines = ((number, line) for number, line in _lines(path) if line.strip(AROUND))
    return _parsed(path, "line", lines, partial(prompt_in_json, column=column or "prompt"))


def read_csv(path: Path, column: str | None) -> Iterator[str]:
    """Yield a column of comma-separated values, or in `.tsv` files tab-separated ones, with a header.

    Fields may be quoted, and quoted ones may hold line breaks.
    """
    column, rows = column or "prompt", _csv_rows(path)
    _, header = next(rows, (1, []))
    if column not in header:
        raise ConfigurationError(f"prompts: {path}, line 1: no column {column!r}: {_known_columns(header)}")
    place = header.index(column)

    def prompt_in_row(row: list[str]) -> str:
        if row == header:
            raise ValueError(": the header stands here again: it is no prompt, remove it")
        if len(row) != len(header):
            raise ValueError(f": {len(row)} fields, the header has {len(header)}: quote those that hold the delimiter")
        return _not_empty(one_line(row[place]), f", column {column!r}: empty: remove the row or give it a prompt")

    return _parsed(path, "line", rows, prompt_in_row)


def read_parquet(path: Path, column: str | None) -> Iterator[str]:
    """Yield a column of a Parquet file."""
    with pq.ParquetFile(path) as file:
        column = _text_column(file.schema_arrow, column, path)
        yield from _rows(file.iter_batches(ROWS, columns=[column]), path, column)


def read_dataset(path: Path, column: str | None) -> Iterator[str]:
    """Yield a column of a folder that `datasets.Dataset.save_to_disk` has written, or of an `.arrow` file."""
    if (path / SPLITS).is_file():
        splits = sorted(part.name for part in path.iterdir() if (part / DATASET).is_file())
        raise ConfigurationError(f"prompts: {path} holds the splits {', '.join(splits)}: name one, {path}/SPLIT")
    try:
        rows = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
    except (ValueError, KeyError) as error:
        raise ConfigurationError(f"prompts: can't read {path}: {error}") from None
    column = _text_column(rows.data.schema, column, path)
    yield from _rows(rows.select_columns([column]).with_format("arrow").iter(ROWS), path, column)


def read_archive(path: Path, column: str | None) -> Iterator[str]:
    """Yield the `.txt` members of an uncompressed tar archive, or what its `.json` members hold under a key.

    Pictures and all other members are passed over, unread.
    """
    with BoundedReader(io.FileIO(path)) as file:
        texts = _text_members(path, file)
        suffix = ".json" if column is not None or not texts[".txt"] else ".txt"
        if not texts[suffix]:
            kinds = ".txt or .json" if column is None else ".json"
            raise ConfigurationError(f"prompts: {path} holds no {kinds} members")

        def contents() -> Iterator[tuple[str, bytes]]:
            for name, offset, size in texts[suffix]:
                if size > LONGEST:
                    raise ConfigurationError(
                        f"prompts: {path} holds {name}, which has more than {LONGEST >> 20} MiB: is it text?"
                    )
                file.seek(offset)
                yield name, file.read(size)

        def prompt_in_member(data: bytes) -> str:
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f", byte {error.start + 1}: not UTF-8 ({error.reason})") from None
            if suffix == ".json":
                return prompt_in_json(text, column or "prompt")
            return _not_empty(one_line(text), ": empty: remove it or give it a prompt")

        yield from _parsed(path, "member", contents(), prompt_in_member)


READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    "text": read_text,
    "jsonl": read_json_lines,
    "csv": read_csv,
    "parquet": read_parquet,
    "dataset": read_dataset,
    "webdataset": read_archive,
}


def prompt_in_json(line: str, column: str) -> str:
    """Return the prompt that a JSON object has under the key `column`.

    Raises ValueError, whose message goes on where the place was named.
    """
    text = line.strip(AROUND)
    try:
        value, end = _parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f", column {line.index(text) + error.pos + 1}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f": {error}") from None
    except RecursionError:
        raise ValueError(": too many brackets within brackets") from None
    if end != len(text):
        raise ValueError(f", column {line.index(text) + end + 1}: more after the end of the object")
    if not isinstance(value, dict):
        raise ValueError(f': must be a JSON object, e.g. {{"{column}": "a red apple"}}, got {text[:40]}')
    if column not in value:
        raise ValueError(f": no key {column!r}: {_known_columns(list(value))}")
    prompt = value[column]
    if not isinstance(prompt, str):
        raise ValueError(f": {column!r} must be text, got {json.dumps(prompt)[:40]}")
    prompt = _not_empty(one_line(prompt), f": {column!r} is empty: remove it or give it a prompt")
    if not is_unicode(prompt):
        raise ValueError(f": {column!r} holds half of a surrogate pair, which is no character")
    return prompt


def _parsed(
    path: Path, kind: str, items: Iterable[tuple[int | str, Item]], parse: Callable[[Item], str]
) -> Iterator[str]:
    """Yield the prompts that `parse` makes of items; its ValueError is given their place."""
    for place, item in items:
        try:
            prompt = parse(item)
        except ValueError as error:
            raise ConfigurationError(f"prompts: {path}, {kind} {place}{error}") from None
        yield prompt


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file in UTF-8 with their numbers. Each ends with a line feed, a carriage return or both."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), ""), 1):
            if len(line) > LONGEST and not line.endswith("\n"):
                raise ConfigurationError(
                    f"prompts: {path}, line {number}: longer than {LONGEST >> 20} MiB: is it text?"
                )
            if not line.isascii():
                _refuse_encoding(path, number, line)
            yield number, line


def _refuse_encoding(path: Path, number: int, line: str) -> None:
    """Raise ConfigurationError for a line with bytes that are not UTF-8, which are half surrogate pairs in it."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        if number == 1 and line.startswith(MARKS_16):
            raise ConfigurationError(f"prompts: {path} is UTF-16 or UTF-32: save it as UTF-8") from None
        byte = ord(line[error.start]) & 0xFF
        raise ConfigurationError(
            f"prompts: {path}, line {number}, column {error.start + 1}: not UTF-8 (invalid byte 0x{byte:02x})"
        ) from None


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not blank, with the lines in which they begin."""
    # A byte order mark may stand in front of a quotation mark.
    lines = (line.removeprefix("\ufeff") for _, line in _lines(path))
    rows = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    start = 1
    try:
        for row in rows:
            if row:
                yield start, row
            start = rows.line_num + 1
    except csv.Error as error:
        raise ConfigurationError(
            f"prompts: {path}, line {start}: {error}; look at the quotes of the row that begins there"
        ) from None


def _text_column(schema: pa.Schema, column: str | None, path: Path) -> str:
    """Return the column's name, if it is there and holds text of whatever encoding."""
    column = column or "prompt"
    if column not in schema.names:
        raise ConfigurationError(f"prompts: {path}: no column {column!r}: {_known_columns(schema.names)}")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise ConfigurationError(f"prompts: {path}: column {column!r} holds {kind}, not text")
    return column


def _rows(batches: Iterable[Any], path: Path, column: str) -> Iterator[str]:
    """Yield the prompts in batches or tables of one column of text."""
    first = 1
    for batch in batches:
        texts = batch.column(0).cast(pa.large_string())
        texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
        if (bad := _first_bad(texts)) is not None:
            raise ConfigurationError(f"prompts: {path}, row {first + bad[0]}, column {column!r}: {bad[1]}")
        yield from map(one_line, texts.to_pylist())
        first += len(texts)


def _first_bad(values: pa.LargeStringArray) -> tuple[int, str] | None:
    """Return the place of the first row that holds no prompt, and why; None where all do."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        for row, data in enumerate(values.cast(pa.large_binary()).to_pylist()):
            try:
                (data or b"").decode()
            except UnicodeDecodeError as error:
                return row, f"not UTF-8 ({error.reason})"
    blank = pc.fill_null(pc.equal(pc.utf8_trim(values, AROUND), ""), True)
    bad = pc.or_kleene(blank, pc.match_substring(values, "\0"))
    row = pc.index(bad, True).as_py()
    if row < 0:
        return None
    if not values[row].is_valid:
        return row, "null: remove the row or give it a prompt"
    return row, "empty: remove the row or give it a prompt" if blank[row].as_py() else "it holds a NUL character"


class BoundedReader(io.BufferedReader):
    """A file of which no more is read at a time than text or a header has: hostile headers name any size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _text_members(path: Path, file: BoundedReader) -> dict[str, list[tuple[str, int, int]]]:
    """Return names, offsets and sizes of the members that hold a prompt, by the last suffix of their names in any case.

    `x.tags.txt` beside `x.jpg` or `x.txt` is another text of sample `x`, and none of its own. Hidden files, which
    macOS puts beside others, hold none.
    """
    samples: set[str] = set()
    texts: dict[str, list[tuple[str, int, int]]] = {".txt": [], ".json": []}
    for member in members(path, file):
        sample, dot, suffix = member.name.lower().rpartition(".")
        samples.add(sample)
        if dot + suffix in texts and not member.name.rpartition("/")[2].startswith("."):
            texts[dot + suffix].append((member.name, member.offset_data, member.size))
    return {
        suffix: [text for text in found if not _has_longer_name(text[0].lower(), samples)]
        for suffix, found in texts.items()
    }


def members(path: Path, file: BoundedReader, key: str = "prompts") -> Iterator[tarfile.TarInfo]:
    """Yield the files in an archive, none of which is kept; raise ConfigurationError, naming the key of the
    configuration, for what is damaged or cut off."""
    archive, damaged = None, False
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="replace")
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            # `tarfile` of some Python versions goes back by a negative size, and so on for ever.
            if member.size < 0:
                raise tarfile.ReadError
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None:
                yield member
    except (tarfile.TarError, ValueError, OverflowError):
        damaged = True
    # For `tarfile` an archive that was cut off between members, or before a damaged header, is a whole one.
    position = archive.offset if archive is not None else 0
    length = file.seek(0, io.SEEK_END)
    file.seek(min(position, length))
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ConfigurationError(f"{key}: {path} ends at byte {length} without an end mark: it is truncated")
    if damaged or any(block):
        raise ConfigurationError(
            f"{key}: {path} has no tar header at byte {position}: it is damaged, compressed or no tar archive"
        )


def _has_longer_name(name: str, samples: Set[str]) -> bool:
    """Return whether one of these samples' names, a dot and more than a suffix make up a member's name."""
    sample = name.rpartition(".")[0]
    while "." in sample.rpartition("/")[2]:
        sample = sample.rpartition(".")[0]
        if sample in samples:
            return True
    return False


def _known_columns(names: list[str]) -> str:
    """Return what there is instead of the column that was asked for."""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"set prompts.column to one of {shown}" if names else "it has none at all"


def _not_empty(prompt: str, said: str) -> str:
    if not prompt:
        raise ValueError(said)
    return prompt
