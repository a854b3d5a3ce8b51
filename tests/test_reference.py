"""The API reference: every public name stands on one of its pages, and docstrings say what signatures have."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import pytest
from pages import ROOT

from diffpp_fast import ops
from diffpp_fast.training import Config

PACKAGES = (
    "diffpp_fast",
    "diffpp_fast.ops",
    "diffpp_fast.methods",
    "diffpp_fast.networks",
    "diffpp_fast.rewards",
    "diffpp_fast.training",
)
#: Public names that are no classes or functions, or packages with a page of their own.
NOT_SHOWN = {"METHODS", "Scorer", "__version__", "methods", "networks", "ops", "rewards"}
#: What a docstring says in the place of arguments that stand elsewhere.
ELSEWHERE = re.compile(r"The rest is as for|the arguments of|arguments are those of|as above")
OPERATORS = sorted(name for name in ops.__all__ if name[0].islower())


def directives() -> list[str]:
    text = "".join(path.read_text() for path in sorted((ROOT / "docs/reference").glob("*.md")))
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def shown() -> list[Any]:
    return [pytest.param(found(path), id=path.removeprefix("diffpp_fast.")) for path in directives()]


def test_every_public_name_is_on_one_page() -> None:
    objects = [found(path) for path in directives()]
    assert len({id(each) for each in objects}) == len(objects)
    for package in PACKAGES:
        room = importlib.import_module(package)
        for name in set(room.__all__) - NOT_SHOWN:
            assert any(getattr(room, name) is each for each in objects), f"docs/reference lacks {package}.{name}"


def arguments(of: Any) -> list[str]:
    """Names of the arguments of a function or class; of a dataclass those that its base has not."""
    cls: Any = of
    if dataclasses.is_dataclass(of):
        given = {
            field.name
            for base in inspect.getmro(cls)[1:]
            if dataclasses.is_dataclass(base)
            for field in dataclasses.fields(base)
        }
        return [field.name for field in dataclasses.fields(of) if field.init and field.name not in given]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in inspect.signature(of).parameters.values() if each.kind in named]


@pytest.mark.parametrize("of", shown())
def test_a_docstring_names_every_argument(of: Any) -> None:
    text = of.__doc__
    assert text
    if inspect.isclass(of) and issubclass(of, (tuple, Exception, Config)):  # made by the package, not by its users
        return
    if not ELSEWHERE.search(text):
        assert [name for name in arguments(of) if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", ["Noise", *OPERATORS])
def test_the_section_of_an_operator_begins_with_its_signature(name: str) -> None:
    heading = f"`{name}`" if name == "Noise" else f"`ops.{name}`"
    text = (ROOT / "docs/operators.md").read_text()
    section = re.search(
        rf"^## [^\n]*{re.escape(heading)}\n\n```python title=\"Signature\"\n(.*?)\n```", text, re.MULTILINE | re.DOTALL
    )
    assert section, f"the section of {heading} does not begin with its signature"
    of = found(f"diffpp_fast.{name}") if name == "Noise" else getattr(ops, name)
    scope = dict(vars(inspect.getmodule(of)))
    exec(compile(section[1], "docs/operators.md", "exec", dont_inherit=True), scope)
    of, on_page = (each.__init__ if inspect.isclass(each) else each for each in (of, scope[name]))
    assert inspect.signature(on_page) == inspect.signature(of)
