"""Plain English in docstrings, comments and pages; a class name that means one class."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator

import pages
from pages import ROOT

FILES = sorted(
    path for room in ("diffpp_fast", "benchmarks", "csrc", "tests", "examples") for path in (ROOT / room).rglob("*.py")
)
#: A docstring says what the thing does ("Return ...") or, by a noun phrase, what it is.
BEGINNING = re.compile(r"(What|Of|That|Those of)\b")
#: Words and turns that the field does not use.
NOT_USED = re.compile(r"\b(dear(er|est|ly)?|mend(s|ed|ing)?|to be had|bears?|bearing)\b", re.IGNORECASE)


def docstrings() -> Iterator[tuple[str, str]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text is not None:
                    yield f"{path.relative_to(ROOT)}:{node.body[0].lineno}", text


def comments() -> Iterator[tuple[str, str]]:
    for path in FILES:
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type == tokenize.COMMENT:
                    yield f"{path.relative_to(ROOT)}:{token.start[0]}", token.string


def test_docstrings_begin_with_what_a_thing_does_or_is() -> None:
    assert not [f"{place}: {text[:50]}" for place, text in docstrings() if BEGINNING.match(text)]


def test_words() -> None:
    # CONTRIBUTING.md quotes what it advises against.
    of_pages = ((page, re.sub(r'"[^"\n]*"', "", (ROOT / page).read_text())) for page in pages.PAGES)
    texts = [*docstrings(), *comments(), *of_pages]
    assert not [f"{place}: {match[0]}" for place, text in texts for match in NOT_USED.finditer(text)]


def test_a_class_name_is_used_once() -> None:
    places = defaultdict(list)
    for path in (ROOT / "diffpp_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in places.items() if len(files) > 1}
