"""HTML that can't be forgotten to be escaped: text is, unless it is markup already."""

from __future__ import annotations

from html import escape
from typing import Any

#: Elements that have no end.
VOID = ("img", "meta")


class Markup(str):
    """Text that is HTML and stays as it is."""


def element(name: str, /, *children: object, **attributes: Any) -> Markup:
    """An element. Children that are no Markup are escaped; an attribute `class_` is `class`, and one of None is left
    out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escape(str(child)) for child in children))


def table(head: tuple[object, ...], rows: list[Markup], **attributes: Any) -> Markup:
    """In a frame of its own that scrolls where the page is narrow. `rows` are made by `row`."""
    cells = [element("th", cell, scope="col") for cell in head]
    body = element("tbody", *rows)
    inner = element("table", element("thead", element("tr", *cells)), body, **attributes)
    return element("div", inner, class_="scroll")


def row(name: object, /, *cells: object, **attributes: Any) -> Markup:
    """The first cell names the row; others are put into `<td>` unless they are one already."""
    done = [cell if isinstance(cell, Markup) and cell.startswith("<td") else element("td", cell) for cell in cells]
    return element("tr", element("th", name, scope="row"), *done, **attributes)
