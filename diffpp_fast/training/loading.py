"""Configurations from YAML files and from the command line, with errors that name file, key, value and remedy."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.loading import exists
from diffpp_fast.training.base_pipeline import fill_models
from diffpp_fast.training.config import MAY_CHANGE, Config
from diffpp_fast.training.initial_lora import fill_lora, fill_targets
from diffpp_fast.training.yaml_files import YamlError, dump_yaml, is_quoted, parse_value, read_yaml
from diffpp_fast.user_paths import real_path, user_path

#: Letters of a value or an override that a message shows.
SHOWN = 200
#: What stands for null on the command line, where a key takes it.
NULLS = ("", "~", "null", "Null", "NULL")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, check: Callable[[Mapping[str, Any]], None] | None = None
) -> Config:
    """Read a run's configuration.

    Args:
        path: a YAML file. Relative paths of inputs in it are relative to its folder and come back absolute. The key
            `extends` names another such file, relative to its folder too: its keys count where this one has none.
        overrides: `section.key=value`. A value for a key that holds text is that text, whatever it looks like; others
            are written as in YAML. Paths in them are relative to the working directory.
        check: called with all that is given, before the hub may be asked for the rest.

    What `models` leaves open is filled in from `models.base` and from the reference, which may ask the hub.

    Raises ConfigurationError for an unreadable file, an unknown key, a wrong type and parts that don't fit together.
    """
    file = user_path(str(path))
    data = _read_extended(file)
    given = {}
    for override in overrides:
        key, value = _parse_override(override)
        given[key] = override[:SHOWN]
        _insert(data, key, value, override)
    _refuse_wrong(data, str(file), given)
    if check is not None:
        check(data)
    fill_models(data, file)
    fill_lora(data, file)
    fill_targets(data)
    return make_config(data, str(file), given)


def make_config(data: dict[str, Any], source: str, given: Mapping[str, str] = types.MappingProxyType({})) -> Config:
    """Return the configuration that nested mappings describe.

    Args:
        data: with absolute paths.
        source, given: for messages: where they are from, and overrides by key that stand in them.

    Raises ConfigurationError for an unknown key, a wrong type and parts that don't fit together.
    """
    try:
        return _validated(data)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False), source, given) from None


def _refuse_wrong(data: dict[str, Any], source: str, given: Mapping[str, str]) -> None:
    """Raise ConfigurationError for what stays wrong whatever a base fills in: unknown keys and wrong values."""
    try:
        _validated(data)
    except ValidationError as error:
        wrong = [details for details in error.errors(include_url=False) if not _may_be_filled_in(details)]
        if wrong:
            raise _explained(wrong, source, given) from None


def _may_be_filled_in(details: ErrorDetails) -> bool:
    """Return whether it is a key that is missing, or a sentence about several, of which some may be."""
    of_models = not details["loc"] or details["loc"][0] == "models"
    return details["type"] in ("missing", "union_tag_not_found") or (details["type"] == "value_error" and of_models)


def _validated(data: dict[str, Any]) -> Config:
    _drop_null_keys_of_others(data, Config)
    # Through JSON, where a strict schema takes a list for a tuple.
    return Config.model_validate_json(json.dumps(data))


def _explained(errors: Sequence[ErrorDetails], source: str, given: Mapping[str, str]) -> ConfigurationError:
    found: dict[str, list[ErrorDetails]] = {}  # a union has a problem for each of its members
    for details in errors:
        found.setdefault(_key_of(details), []).append(details)
    return ConfigurationError("\n".join(_explain(key, problems, given, source) for key, problems in found.items()))


def with_keys(config: Config, changes: Mapping[str, Any], name: str | None = None) -> Config:
    """Return a configuration with other values for some dotted keys; raises like `make_config`.

    Args:
        name: of it, for messages; None: the keys.
    """
    data = config.model_dump(mode="json")
    for key, value in changes.items():
        _insert(data, key, value, key)
    return make_config(data, name or ", ".join(changes))


def may_change(key: str) -> bool:
    """Return whether a dotted key may have another value where a run goes on from a checkpoint."""
    return any(MAY_CHANGE in field.metadata for field in _fields_on_the_way(key))


def dump_config(config: Config) -> str:
    """Return a `config` with every default written out, as YAML that `load_config` reads."""
    return dump_yaml(config.model_dump(mode="json"))


def _read(file: Path) -> dict[str, Any]:
    try:
        data = read_yaml(file)
    except (OSError, UnicodeEncodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"can't read the configuration {file}: {reason}") from None
    except YamlError as error:
        raise ConfigurationError(f"{file} {error}") from None
    if not isinstance(data, dict):
        raise ConfigurationError(f"{file} must hold keys and values, got {shorten(data)}")
    # Through JSON, after which nothing is shared: what an alias names could else be changed through either name.
    copied: dict[str, Any] = json.loads(json.dumps(data))
    return copied


def _read_extended(file: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file on top of the one that it extends, with absolute paths; `readers` are the files that lead to it."""
    data = _read(file)
    _anchor(data, file.absolute().parent)
    if "extends" not in data:
        return data
    name = data.pop("extends")
    if not isinstance(name, str):
        raise ConfigurationError(f"{file}: extends should be the path of a YAML file, got {name!r}")
    other = file.parent / user_path(name)
    chain = (*readers, real_path(file))
    if real_path(other) in chain:
        raise ConfigurationError(f"{file} extends {other}, which extends it")
    if not other.is_file():
        raise ConfigurationError(f"{file} extends {other}: no such file")
    return _merge(_read_extended(other, chain), data)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; everything else that stands above replaces what stands below."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigurationError(
            f"{shorten(override)} is no override: write section.key=value, e.g. training.steps=200"
        )
    try:
        override.encode()
        value = _parse_value(key, text)
    except UnicodeEncodeError:
        raise ConfigurationError(f"{shorten(override)} is not UTF-8") from None
    except YamlError as error:
        raise ConfigurationError(f"command line, {override[:SHOWN]}: the value {error}") from None
    tree: dict[str, Any] = {}
    _insert(tree, key, value, override)
    _anchor(tree, Path.cwd())
    for name in key.split("."):
        tree = tree[name]
    return key, tree


def _parse_value(key: str, text: str) -> Any:
    way = _fields_on_the_way(key)
    annotation = way[-1].annotation if len(way) == len(key.split(".")) else None
    if key == "prompts":
        # A section, or a path, which may begin with braces too.
        try:
            value = parse_value(text)
        except YamlError:
            value = None
        if isinstance(value, dict):
            return value
        annotation = str
    if not _is_text(annotation) or is_quoted(text):
        return parse_value(text)
    section, _, name = key.rpartition(".")
    takes_null = type(None) in get_args(annotation) or name in _keys_of_some(_holder(section))
    return None if text in NULLS and takes_null else text


def _insert(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, last = key.split(".")
    for number, name in enumerate(sections, 1):
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise ConfigurationError(
                f"command line, {override[:SHOWN]}: {'.'.join(sections[:number])} has no keys in it"
            )
    tree[last] = value


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make the input paths in a raw configuration absolute, in place; a path of prompts becomes a section."""
    for section, key in ((data, "output"), (data.get("distributed"), "nvme_path")):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = _output_path(key, section[key])
    if isinstance(data.get("prompts"), str):
        data["prompts"] = {"path": data["prompts"]}
    for key in ("path", "embeddings"):
        if isinstance(data.get("prompts"), dict) and isinstance(data["prompts"].get(key), str):
            data["prompts"][key] = _absolute(data["prompts"][key], folder)
    models = data.get("models")
    parts = [*_mappings(models), *(lora for part in _mappings(models) for lora in _mappings(part))]
    for model in (models, *parts) if isinstance(models, dict) else ():
        for key in ("base", "path", "tokenizer"):
            if isinstance(model.get(key), str):
                model[key] = _model_path(model[key], folder)
    for method in _mappings({"method": data.get("method")}):
        for section in _mappings(method.get("regularizers")):
            if isinstance(section.get("path"), str):
                section["path"] = _absolute(section["path"], folder)
    for reward in _mappings(data.get("rewards")):
        factory = reward.get("factory")
        if isinstance(factory, str) and factory.rpartition(":")[0].endswith(".py"):
            reward["factory"] = _absolute(factory, folder)
        arguments = reward.get("arguments")
        if isinstance(arguments, dict):
            for name, value in arguments.items():
                if isinstance(value, str) and value.startswith(("./", "../")):
                    arguments[name] = _absolute(value, folder)


def _mappings(section: Any) -> list[dict[str, Any]]:
    return [value for value in section.values() if isinstance(value, dict)] if isinstance(section, dict) else []


def _output_path(key: str, path: str) -> str:
    """A folder that a run makes: what is not taken for a name would else become one."""
    if not path:
        raise ConfigurationError(f"{key} should name a folder, got an empty text")
    if variable := re.search(r"\$(\w+|\{\w+\})", path):
        raise ConfigurationError(
            f"{key} is {path}: variables of the environment such as {variable[0]} are not filled in here. Write the "
            f"path out, begin it with ~, or let the shell fill it in: {key}=... on the command line"
        )
    return str(user_path(path))


def _absolute(path: str, folder: Path) -> str:
    try:
        return str(real_path(folder / user_path(path))) if path else path
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path!r} can't be a path: {error}") from None


def _model_path(path: str, folder: Path) -> str:
    # "weights/reference" reads like a hub id too: it is one only where there is no such folder.
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", path) and not exists(folder / path)
    return path if path.startswith("package:") or hub_id or not path else _absolute(path, folder)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold, seen through `| None` and unions."""
    if get_origin(annotation) is Annotated:
        return _sections(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [section for part in get_args(annotation) for section in _sections(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _members(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections of a union by the names that choose them; empty for a single section."""
    sections = _sections(annotation)
    if len(sections) < 2:
        return {}
    return {name: section for section in sections for name in get_args(section.model_fields["name"].annotation)}


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """The keys of a section, or of all members of a union."""
    return {name: field for section in _sections(annotation) for name, field in section.model_fields.items()}


def _keys_of_some(annotation: Any) -> set[str]:
    """The keys that some members of a union have and others don't."""
    members: list[set[str]] = [set(section.model_fields) for section in _sections(annotation)]
    return set().union(*members) - members[0].intersection(*members) if members else set()


def _fields_on_the_way(key: str) -> list[FieldInfo]:
    """The fields that a dotted key leads through, as far as the schema goes."""
    annotation: Any = Config
    way: list[FieldInfo] = []
    for name in key.split("."):
        field = _fields(annotation).get(name)
        if field is None:
            break
        way.append(field)
        annotation = field.annotation
    return way


def _holder(key: str) -> Any:
    """The type of the section with this dotted key."""
    way = _fields_on_the_way(key)
    return way[-1].annotation if key and way else Config


def _drop_null_keys_of_others(data: Any, annotation: Any) -> None:
    """Remove, in place, keys that are null and that not all members of a union have: nobody has given them.

    A null leaves such a key open, and earlier versions wrote the keys of all members out.
    """
    if not isinstance(data, dict):
        return
    for name in _keys_of_some(annotation):
        if data.get(name, ...) is None:
            del data[name]
    for name, field in _fields(annotation).items():
        _drop_null_keys_of_others(data.get(name), field.annotation)


def _key_of(details: ErrorDetails) -> str:
    """The dotted key of a problem, without the names of a union's members and places in lists."""
    annotation: Any = Config
    names: list[str] = []
    for place in details["loc"]:
        if place in (fields := _fields(annotation)):
            names.append(str(place))
            annotation = fields[str(place)].annotation
        elif place in (members := _members(annotation)):
            annotation = members[str(place)]
        elif isinstance(place, str) and details["type"] in ("extra_forbidden", "missing"):
            names.append(place)
            annotation = None
        else:
            break
    if details["type"].startswith("union_tag"):
        names.append("name")
    return ".".join(names)


def _is_text(annotation: Any) -> bool:
    """Whether a key holds text and nothing else, but for null."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_text(parts[0])
    if origin is Literal:
        return all(isinstance(part, str) for part in parts)
    if origin in (Union, types.UnionType):
        return all(_is_text(part) for part in parts if part is not type(None))
    return annotation is str


def _explain(key: str, found: list[ErrorDetails], given: Mapping[str, str], origin: str) -> str:
    overriding = (override for name, override in given.items() if f"{key}.".startswith(f"{name}."))
    source = next((f"command line, {override}" for override in overriding), origin)
    first = found[0]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        return f"{source}: {_belongs_to(key, first['loc'])}"
    if kind == "union_tag_not_found" or (kind == "missing" and isinstance(first["loc"][-1], str)):
        return f"{source}: the key {key} is missing"
    if kind == "value_error":
        section = f"{key}: " if key else ""
        return f"{source}: {section}{first['msg'].removeprefix('Value error, ')}"
    if kind == "union_tag_invalid":
        names, _, last = first["ctx"]["expected_tags"].rpartition(", ")
        return f"{source}: {key} should be {names} or {last}, got {shorten(value['name'])}"
    wishes = [
        "should have more values" if details["type"] == "missing" else re.sub(r"^\w+ (?=should )", "", details["msg"])
        for details in found
    ]
    wish = " or ".join([wishes[0], *(other.removeprefix("should be ") for other in wishes[1:])])
    remedy = ""
    if "valid string" in wish and isinstance(value, int | float):
        remedy = ": write it in quotes"
    elif "valid boolean" in wish:
        remedy = ": write true or false"
    return f"{source}: {key} {wish}, got {shorten(value)}{remedy}"


def _belongs_to(key: str, location: Sequence[int | str]) -> str:
    """A sentence about a key that its section does not have."""
    parent, _, name = key.rpartition(".")
    members = _members(_holder(parent))
    owners = [member for member, section in members.items() if name in section.model_fields]
    if owners:
        return f"{parent}: {name} belongs to {' and '.join(owners)}, not to {location[-2]}: remove it"
    return f"unknown key {key}{_suggest(key)}"


def shorten(value: Any) -> str:
    """Return a value as a message shows it: its beginning, where it is long."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


def _suggest(key: str) -> str:
    """The nearest known key: in the same section, else the name anywhere."""
    parent, _, name = key.rpartition(".")
    known = list(known_keys())
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    for candidates in (siblings, known):
        names = {other.rpartition(".")[2] for other in candidates}
        close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
        if close:
            same = [other for other in candidates if other.rpartition(".")[2] == close[0]]
            return f": did you mean {difflib.get_close_matches(key, same, n=1, cutoff=0.0)[0]}?"
    return f": known here are {', '.join(other.rpartition('.')[2] for other in siblings)}" if siblings else ""


def known_keys(annotation: Any = Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema, sections included."""
    for name, field in _fields(annotation).items():
        yield prefix + name
        yield from known_keys(field.annotation, f"{prefix}{name}.")
