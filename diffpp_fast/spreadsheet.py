"""Cells of CSV files that somebody opens in a spreadsheet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What makes a spreadsheet take a cell for a formula; the last four are the wide forms of the first.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def cell(value: Any) -> Any:
    """Return a value as a cell holds it: text that would be a formula gets an apostrophe in front; numbers stay."""
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row, each value as its cell holds it."""
    return {name: cell(value) for name, value in row.items()}
