"""What Parquet files and Hugging Face datasets share: columns of text in Arrow's format."""

from __future__ import annotations

import importlib
from typing import Any

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.json_lines import known_columns
from diffpp_fast.training.prompts.source import one_line

#: Rows that are checked at a time.
ROWS = 1 << 16


def need(module: str, name: str) -> Any:
    """An optional module, or a ConfigurationError that says what to install to read `name`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"prompts: {name} can't be read without {error.name}: {install.extra('data')}"
        ) from None


def check_column(schema: Any, column: str, name: str) -> None:
    """Refuses an Arrow schema in which the column is missing or holds anything but text."""
    import pyarrow as pa

    if column not in schema.names:
        raise ConfigurationError(f"prompts: {name}: no column {column!r}: {known_columns(schema.names)}")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise ConfigurationError(f"prompts: {name}: column {column!r} holds {kind}, not text")


def as_text(values: Any) -> Any:
    """A column of text of any encoding as one `large_string` array, without copying where it is one already."""
    import pyarrow as pa

    values = values.cast(pa.large_string())
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def prompts_of(values: Any) -> list[str]:
    """The prompts in rows that have been checked."""
    return [one_line(text) for text in values.to_pylist()]


def check_rows(values: Any, name: str, column: str, first: int) -> list[str]:
    """The prompts in a column of text. Rows that hold none are refused by their number.

    Args:
        values: the rows.
        name: of the file.
        column: its name.
        first: the number of the first row; a file's rows count from 1.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = as_text(values)
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        row, reason = _first_that_is_not_utf8(values)
        raise ConfigurationError(
            f"prompts: {name}, row {first + row}, column {column!r}: not UTF-8 ({reason})"
        ) from None
    null = pc.index(pc.match_substring(values, "\0"), True).as_py()
    if null >= 0:
        raise ConfigurationError(f"prompts: {name}, row {first + null}, column {column!r}: it holds a NUL character")
    blank = pc.equal(pc.utf8_trim_whitespace(values), "")
    bad = pc.index(pc.fill_null(blank, True), True).as_py()
    if bad >= 0:
        what = "empty" if values[bad].is_valid else "null"
        raise ConfigurationError(
            f"prompts: {name}, row {first + bad}, column {column!r}: {what}: remove the row or give it a prompt"
        )
    return prompts_of(values)


def _first_that_is_not_utf8(values: Any) -> tuple[int, str]:
    import pyarrow as pa

    for row, data in enumerate(values.cast(pa.large_binary()).to_pylist()):
        try:
            (data or b"").decode()
        except UnicodeDecodeError as error:
            return row, error.reason
    raise AssertionError("Arrow and Python disagree about UTF-8")
