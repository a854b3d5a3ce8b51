"""A configuration is YAML 1.2 (core schema) in UTF-8, in files and on the command line."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from diffpp_fast.training import ConfigurationError
from diffpp_fast.training.loading import load_config
from diffpp_fast.training.yaml_files import YamlError, dump_yaml, parse_yaml, read_yaml

ROOT = Path(__file__).parent.parent
#: Where YAML 1.1 gives another value.
CORE = {
    "010": 10,
    "1:30": "1:30",
    "190:20:30.15": "190:20:30.15",
    "1_000": "1_000",
    "yes": "yes",
    "No": "No",
    "on": "on",
    "OFF": "OFF",
    "2024-01-01": "2024-01-01",
    "2024-01-01T00:00:00Z": "2024-01-01T00:00:00Z",
    "1e-4": 1e-4,
    "1E5": 1e5,
    ".5": 0.5,
    "-.5": -0.5,
    "1.": 1.0,
    "0o17": 15,
    "0x1F": 31,
    "0b11": "0b11",
    "=": "=",
    "<<": "<<",
    "12345678901234567890": 12345678901234567890,
    "null": None,
    "~": None,
    "TRUE": True,
    "-.INF": -math.inf,
    "!!str 12": "12",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("project") / "align.yaml"
    path.write_text(yaml.safe_dump(tiny.settings()))
    return path


def value_of(file: Path, *overrides: str) -> Any:
    """Return the value under the last override's key."""
    value: Any = load_config(file, overrides)
    for name in overrides[-1].partition("=")[0].split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize("text", CORE)
def test_the_core_schema(text: str) -> None:
    expected = CORE[text]
    assert parse_yaml(f"[{text}]") == [expected] and type(parse_yaml(text)) is type(expected)


@pytest.mark.parametrize("text", ["yes", "010", "1e4", ".5", "1_000", "1:30", "0o17", "~", "=", "", "a #b", "a\u2028b"])
def test_text_is_written_so_that_both_versions_read_it(text: str) -> None:
    written = dump_yaml({"key": text})
    assert parse_yaml(written) == yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output=runs/exp #3", "runs/exp #3"),
        ("output=1e-4", "1e-4"),
        ("output=null", "null"),
        ("output=a: [b", "a: [b"),
        ("output='runs/a b'", "runs/a b"),
        ("output='a' and 'b'", "'a' and 'b'"),
        ("prompts.column=007", "007"),
        ("prompts.column=null", None),
        ("training.steps=010", 10),
        ("training.attention=math", "math"),
        ("models.generator.input_scale=.5", 0.5),
        ("rewards.optimised.arguments.word=a #3", "a #3"),
    ],
)
def test_the_value_of_an_override(file: Path, override: str, value: Any) -> None:
    assert value_of(file, override) == value


def test_a_path_of_prompts_may_hold_what_yaml_would_cut(file: Path) -> None:
    assert load_config(file, ["prompts=a #3: b.txt"]).prompts.path == str(Path.cwd() / "a #3: b.txt")


def test_a_home_is_filled_in_and_a_variable_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert value_of(file, "output=~/runs") == "/home/somebody/runs"
    for override, said in (
        ("output=$HOME/runs", "output is $HOME/runs: variables of the environment"),
        ("distributed.nvme_path=/mnt/${USER}", "nvme_path is /mnt/${USER}: variables"),
        ("output=~nobody-of-this-name/runs", "there is no home folder for its ~"),
        ("output=", "output should name a folder"),
    ):
        with pytest.raises(ConfigurationError) as error:
            load_config(file, [override])
        assert said in str(error.value)


def test_what_an_alias_names_is_not_changed_through_it(file: Path, tmp_path: Path) -> None:
    text = "extends: align.yaml\noptimizers: {generator: &same {lr: 1.0}, fake: *same}\n"
    both = file.with_name("both.yaml")
    both.write_text(text)
    config = load_config(both, ["optimizers.fake.lr=0.5"])
    assert (config.optimizers.generator.lr, config.optimizers.fake.lr) == (1.0, 0.5)


def laughs(link: str) -> str:
    return "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {link.format(','.join([f'*a{n - 1}'] * 9))}\n" for n in range(1, 30)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs("[{}]"), "once its aliases are written out"),
        (laughs("{{<<: [{}]}}"), "once its aliases are written out"),
        ("a: &a [*a]", "an alias stands within what it names"),
        ("[" * 20_000, "nests too deeply"),
        ("{a: " * 20_000, "nests too deeply"),
        ("seed: " + "9" * 5000, "is no integer that can be read"),
        ("a" * (1 << 21), "more than 1 MiB"),
        ('a: "\\0"', "holds a NUL character"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !!timestamp 2024-01-01", "could not determine a constructor"),
        ("a: !!int 1_000", "is no integer"),
        ("a: !!bool yes", "neither true nor false"),
        ("\ta: 1", "'\\t'"),
    ],
    ids=range(14),
)
def test_hostile_files_are_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "align.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(YamlError) as error:
        read_yaml(path)
    assert said in str(error.value) and len(str(error.value)) < 500
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_a_run_in_another_locale_can_be_read_back(tmp_path: Path) -> None:
    """Its own configuration holds letters that Latin-1 lacks, and a name that ASCII does."""
    tiny.write(tmp_path)
    code = (
        "import sys; from diffpp_fast.cli.main import main; from diffpp_fast.training.loading import *;"
        "from diffpp_fast.training.trainer import Trainer; from pathlib import Path;"
        "config = load_config('align.yaml', ['training.grid_prompts=[\\u591c]']);"
        "Path('copy.yaml').write_text(dump_config(config), encoding='utf-8');"
        "sys.exit(main(['train', 'copy.yaml', 'output=run', 'training.steps=1', 'training.grid_every=null',"
        " 'rewards.held_out=null', 'training.baseline_steps=null'])"
        " or main(['train', 'run/checkpoints/step_000001/config.yaml', '--print-config']))"
    )
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    # In the C locale, without the coercions, files and terminal are ASCII.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**environment, "LC_ALL": "C"}, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "\\u591c" in done.stdout.decode() and "夜" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


def test_text_files_are_opened_as_utf_8() -> None:
    """Every call that opens text names its encoding, in the package, its examples and its set-up."""
    places = [
        ROOT / "setup.py",
        *(file for name in ("diffpp_fast", "examples") for file in (ROOT / name).rglob("*.py")),
    ]
    calls = [
        (place, node)
        for place in places
        for node in ast.walk(ast.parse(place.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert [f"{place}:{node.lineno}" for place, node in calls if _opens_text(node) and not _names_encoding(node)] == []


def _opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords) and owner == "subprocess":
        return True
    if name in ("read_text", "write_text"):
        return not (name == "read_text" and call.args)  # a distribution's own takes a name, and is UTF-8
    # Files of prompts have an `open` of their own, in bytes; Pillow's and os' know no text.
    if name != "open" or owner in ("Image", "os") or owner.endswith(("self", "_file")):
        return False
    mode = call.args[-1] if call.args and len(call.args) > (not owner) else None
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def _names_encoding(call: ast.Call) -> bool:
    return any(keyword.arg == "encoding" for keyword in call.keywords)
