"""The documentation's pages as tests read them: fenced blocks, shell commands, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = tuple(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/README.md", "benchmarks/README.md", "tests/README.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"  # tells what was
)


class Block(NamedTuple):
    page: str
    line: int  # of its first line, counted from 1
    language: str
    title: str | None
    code: str
    before: str  # the page up to the block

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    place: str
    words: tuple[str, ...]  # without variables in front

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def blocks(language: str | None = None) -> Iterator[Block]:
    """The fenced blocks of all pages, or those of one language; a fence that is not closed is an error."""
    for page in PAGES:
        for block in _blocks_of(page):
            if language is None or block.language == language:
                yield block


def _blocks_of(page: str) -> Iterator[Block]:
    lines = (ROOT / page).read_text().splitlines(keepends=True)
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        assert line.strip() == "```", f"{page}:{number + 1}: a block begins before the last one has ended"
        fence = re.fullmatch(r"( *)```(\w*)(?: title=\"([^\"]+)\")?\n", lines[opened])
        assert fence is not None, f"{page}:{opened + 1}: not a fence that is understood: {lines[opened]}"
        code = "".join(each.removeprefix(fence[1]) for each in lines[opened + 1 : number])
        yield Block(page, opened + 2, fence[2], fence[3], code, "".join(lines[:opened]))
        opened = None
    assert opened is None, f"{page}:{opened}: the block does not end"


def commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a block of shell code."""
    logical = re.sub(r"\\\n\s*", " ", block.code)
    for line in logical.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield Command(block.place, tuple(words))


def without_blocks(page: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The names by which links call the headings of a page."""
    text = without_blocks(str(path.relative_to(ROOT)))
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return names


def links(page: str) -> Iterator[tuple[str, str]]:
    """File and anchor of every relative link; both may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor
