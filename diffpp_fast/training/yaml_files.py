"""YAML as configurations have it: the core schema of YAML 1.2, by PyYAML's parser."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

#: What a configuration may have at most: bytes, and values once every alias stands for what it names.
MOST_BYTES, MOST_VALUES = 1 << 20, 100_000

_CORE = "tag:yaml.org,2002:"
#: Plain scalars that are no text (YAML 1.2.2, section 10.3.2), and what they begin with. Unlike those of YAML 1.1 they
#: are neither 010 (8), 1:30 (90), 1_000 (1000) nor yes, no, on, off (booleans) nor dates.
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class YamlError(ValueError):
    """A text that is not YAML, or more than a configuration may hold."""


def read_yaml(file: Path) -> Any:
    """Return what a YAML file in UTF-8 holds.

    Raises OSError, and YamlError for what is not UTF-8, not YAML, too large, or has a key twice.
    """
    with file.open("rb") as opened:
        data = opened.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise YamlError(f"has more than {MOST_BYTES >> 20} MiB, which no configuration has")
    try:
        return parse_yaml(data.decode())
    except UnicodeDecodeError as error:
        raise YamlError(f"is not UTF-8: {error.reason} at byte {error.start}") from None


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds; raises YamlError."""
    return _guarded(lambda: _construct(_compose(text)))


def parse_value(text: str) -> Any:
    """Return what a value on the command line holds; raises YamlError.

    It is written as in YAML, without comments: a number sign is part of a text.
    """

    def parse() -> Any:
        node, whole = _compose(text), text.strip()
        if not whole or (node is not None and node.end_mark.index == len(text.rstrip())):
            return _construct(node)
        if node is not None and not (isinstance(node, ScalarNode) and node.style is None):
            raise YamlError(f"has {text[node.end_mark.index :].strip()!r} behind its value: quote all of it")
        return _construct(ScalarNode(_Loader("").resolve(ScalarNode, whole, (True, False)), whole))

    return _guarded(parse)


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML; text that any reader, of YAML 1.1 or 1.2, could take for something else is quoted."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_quoted(text: str) -> bool:
    """Whether a text is one quoted scalar of YAML."""
    try:
        node = _compose(text) if text[:1] in ("'", '"') else None
    except yaml.YAMLError:
        return False
    return isinstance(node, ScalarNode) and node.end_mark.index == len(text.rstrip())


class _Loader(yaml.SafeLoader):
    """The core schema; merge keys (`<<`) of YAML 1.1 are kept, and a key that stands twice is an error."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            # Other keys, such as lists, are refused by the class above.
            if isinstance(key, ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_bool(self, node: ScalarNode) -> bool:
        if node.value.lower() not in ("true", "false"):
            raise ConstructorError(None, None, f"{node.value[:40]} is neither true nor false", node.start_mark)
        return bool(node.value.lower() == "true")

    def construct_yaml_int(self, node: ScalarNode) -> int:
        digits = node.value
        base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
        if "_" not in digits:
            try:
                return int(digits[2:] if base != 10 else digits, base)
            except ValueError:  # not a number, or one of thousands of digits, which take Python too long
                pass
        raise ConstructorError(None, None, f"{digits[:40]} is no integer that can be read", node.start_mark)

    def construct_yaml_float(self, node: ScalarNode) -> float:
        if "_" not in node.value:
            try:
                return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", node.value.lower()))
            except ValueError:
                pass
        raise ConstructorError(None, None, f"{node.value[:40]} is no number", node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version's schema resolves; aliases are written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    None: yaml.SafeLoader.yaml_constructors[None],  # refuses all other tags
    **{f"{_CORE}{kind}": yaml.SafeLoader.yaml_constructors[f"{_CORE}{kind}"] for kind in ("null", "str", "seq", "map")},
    f"{_CORE}merge": yaml.SafeLoader.yaml_constructors[f"{_CORE}str"],  # as a value it is text
    f"{_CORE}bool": _Loader.construct_yaml_bool,
    f"{_CORE}int": _Loader.construct_yaml_int,
    f"{_CORE}float": _Loader.construct_yaml_float,
}
for _kind, _pattern, _first in _RESOLVERS:
    # An empty scalar is looked up under "".
    _letters = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(f"{_CORE}{_kind}", re.compile(f"(?:{_pattern})$"), _letters)
    if _kind in ("int", "float"):
        _Dumper.add_implicit_resolver(f"{_CORE}{_kind}", re.compile(f"(?:{_pattern})$"), _letters)


def _guarded(parse: Any) -> Any:
    try:
        return parse()
    except yaml.YAMLError as error:
        raise YamlError(f"is not valid YAML: {error}") from None
    except RecursionError:
        raise YamlError("is not valid YAML: it nests too deeply") from None


def _compose(text: str) -> Node | None:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    if node is not None:
        _refuse_expansion(node, {}, set())
    return node


def _construct(node: Node | None) -> Any:
    return None if node is None else _Loader("").construct_document(node)


def _refuse_expansion(node: Node, known: dict[int, int], above: set[int]) -> int:
    """Count the values under a node, those behind an alias each time that it stands for them."""
    place = id(node)
    if place in above:
        raise YamlError("is not valid YAML: an alias stands within what it names")
    if place not in known:
        if isinstance(node, ScalarNode):
            _refuse_no_text(node)
        parts = [] if isinstance(node, ScalarNode) else node.value
        if isinstance(node, MappingNode):
            parts = [part for pair in parts for part in pair]
        known[place] = 1 + sum(_refuse_expansion(part, known, above | {place}) for part in parts)
    if known[place] > MOST_VALUES:
        raise YamlError(f"holds more than {MOST_VALUES} values once its aliases are written out")
    return known[place]


def _refuse_no_text(node: ScalarNode) -> None:
    """Refuse what neither a path nor a file of text can hold; escapes such as "\\0" bring it."""
    try:
        node.value.encode()
    except UnicodeEncodeError:
        raise YamlError(f"holds half of a surrogate pair, which is no character, in {node.value[:40]!r}") from None
    if "\0" in node.value:
        raise YamlError(f"holds a NUL character, in {node.value[:40]!r}")
