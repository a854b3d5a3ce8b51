"""The documentation against the code: every fenced block runs, is parsed by what it is for, or is listed with a reason.

A block of a language, a title or a program that nobody listed here fails. The tables of launches and bytes are
recounted in test_docs_tables.py; that the site builds is in test_site.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import tiny
import torch
import yaml
from pages import ROOT, Block, Command
from traffic import Traffic, triton_traffic

import diffpp_fast.cli
from diffpp_fast import use_backend
from diffpp_fast.cli.main import main
from diffpp_fast.training import Config, base_pipeline
from diffpp_fast.training.loading import known_keys, load_config

#: Of what is neither run nor parsed.
PROSE = {"math": "a formula", "text": "something that is printed, or a picture of letters"}
#: Titles of Python blocks that are not run, and why. They are parsed, and what they import from the package is there.
NEEDS = {
    "a GPU": "needs a GPU; make gpu-check captures every operator in a graph",
    "kernels": "needs Hugging Face's package, and what make hub-kernels writes",
    "the runs above": "needs the runs of its page; test_a_page_as_it_is_read runs it after them",
    "the downloads": "needs files of others",
    "the weights": "needs the weights of reward models",
}
#: Programs that are not ours, and why nothing looks at their arguments.
OTHERS = {
    "apt-get": "the system's packages",
    "tensorboard": "a program of others",
    "wandb": "a program of others, and an account",
    ".": "the shell's",
}
#: Configurations that the reader makes or has; in their place stands the one of tests/tiny.py.
READERS_OWN = {"align.yaml", "build/small/align.yaml", "build/tiny/align.yaml", "build/xl/align.yaml"}
#: What the hub tells about the pipelines that configurations stand on: class, parts, resolution of latents.
TEXT_ENCODERS = ("text_encoder", "tokenizer")
HUB: dict[str, tuple[str, tuple[str, ...], int]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("StableDiffusionPipeline", (*TEXT_ENCODERS, "unet"), 64),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        (*TEXT_ENCODERS, "text_encoder_2", "tokenizer_2", "unet"),
        128,
    ),
    "PixArt-alpha/PixArt-XL-2-512x512": ("PixArtAlphaPipeline", (*TEXT_ENCODERS, "transformer"), 64),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        (*TEXT_ENCODERS, "text_encoder_2", "tokenizer_2", "transformer"),
        128,
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": ("Flux2KleinPipeline", (*TEXT_ENCODERS, "transformer"), 64),
    "black-forest-labs/FLUX.2-dev": ("Flux2Pipeline", (*TEXT_ENCODERS, "transformer"), 64),
    "Qwen/Qwen-Image": ("QwenImagePipeline", (*TEXT_ENCODERS, "transformer"), 128),
    "Tongyi-MAI/Z-Image": ("ZImagePipeline", (*TEXT_ENCODERS, "transformer"), 128),
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        (*(f"{part}{number}" for part in TEXT_ENCODERS for number in ("", "_2", "_3")), "transformer"),
        128,
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": ("SanaPipeline", (*TEXT_ENCODERS, "transformer"), 32),
}

SCALED = re.compile(r"(?P<loop>\w+): (?P<part>what is given|before|after)")


def of(language: str, where: Callable[[Block], bool] = lambda block: True) -> list[Any]:
    return [pytest.param(block, id=block.place) for block in pages.blocks(language) if where(block)]


def needs(block: Block) -> str | None:
    return block.title.removeprefix("Needs ") if block.title and block.title.startswith("Needs ") else None


@pytest.fixture
def as_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: files of the repository are there, and what is written stays out of it."""
    for name in ("examples", "tests", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(block: Block, scope: dict[str, Any]) -> None:
    # Newlines in front, so that a traceback shows the line of the page.
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), scope)


def test_every_block_is_of_a_language_that_is_looked_at() -> None:
    languages = {block.language for block in pages.blocks()}
    assert languages <= {"python", "bash", "yaml", *PROSE}, "list it here, with what is done about it"


def test_titles_are_known() -> None:
    """Titles of shell blocks are for the reader, and for the tests that run a page's commands."""
    for block in pages.blocks():
        if block.title is not None:
            assert block.language in ("python", "bash"), block.place
            known = needs(block) in NEEDS or (block.language == "bash" and block.title.startswith("Needs "))
            known = known or block.title == "Signature"  # test_reference.py
            assert known or SCALED.fullmatch(block.title), f"{block.place}: {block.title}"


# What torch says of `float(loss)` is the last that a newcomer should read.
@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
@pytest.mark.parametrize("block", of("python", lambda block: block.title is None))
def test_python_block(block: Block, as_in_the_root: Path) -> None:
    run_python(block, {"__name__": "__main__"})


@pytest.mark.parametrize("block", of("python", lambda block: needs(block) is not None))
def test_python_block_that_needs_more(block: Block, as_in_the_root: Path) -> None:
    if needs(block) == "a GPU" and torch.cuda.is_available():
        run_python(block, {"__name__": "__main__"})
        return
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffpp_fast"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{block.place}: {node.module} has no {name.name}"


# Loops of others, before and after (docs/embedding.md).


def loops() -> dict[str, dict[str, Block]]:
    found: dict[str, dict[str, Block]] = {}
    for block in pages.blocks("python"):
        title = SCALED.fullmatch(block.title or "")
        if title is not None:
            found.setdefault(title["loop"], {})[title["part"]] = block
    return found


def after_running(loop: str, part: str, around: Any = None) -> dict[str, Any]:
    """The names of the loop after what is given and one of its parts, on smaller tensors than the page's."""
    given = loops()[loop]["what is given"]
    scope: dict[str, Any] = {}
    sizes = re.compile(r"^batch, size = (\d+), (\d+)$", re.MULTILINE)
    assert sizes.search(given.code), given.place
    run_python(given._replace(code=sizes.sub("batch, size = 2, 16", given.code)), scope)
    if around is None:
        run_python(loops()[loop][part], scope)
    else:
        with around:
            run_python(loops()[loop][part], scope)
    return scope


@pytest.mark.parametrize("loop", loops())
def test_a_loop_gives_the_same_numbers_before_and_after(loop: str, backend: str) -> None:
    before, after = (after_running(loop, part) for part in ("before", "after"))
    compared = 0
    for name in {"generator", "fake"} & before.keys():
        for theirs, ours in zip(before[name].parameters(), after[name].parameters(), strict=True):
            assert (theirs.grad is None) == (ours.grad is None)
            if theirs.grad is not None:
                assert theirs.grad.norm() > 0.0
                assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()
                compared += 1
    for name in {"generator_loss", "fake_loss", "reward"} & before.keys() & after.keys():
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=0.0)
        compared += 1
    assert compared >= 3


class Arithmetic(Traffic):
    """Everything that runs besides convolutions, which are the stand-ins for networks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in func.overloadpacket.__name__:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's launches are counted in its interpreter")
def test_launches_of_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/embedding.md").read_text()
    on_page = {loop: counts for loop, *counts in re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)}
    counted = {}
    for loop in on_page:
        before, after = Arithmetic(), Arithmetic()
        after_running(loop, "before", before)
        with use_backend("triton"), triton_traffic(after, monkeypatch):
            after_running(loop, "after", after)
        counted[loop] = [str(before.launches), str(after.launches)]
    assert counted == on_page and len(counted) == 2


# Shell commands.


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The reader's own configuration."""
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tiny.settings()))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the hub, for what configurations ask of it."""

    def read_config(path: str, name: str) -> dict[str, Any]:
        base = "/".join(path.split("/")[:2])
        kind, parts, size = HUB[base]
        if name == "model_index.json":
            return {"_class_name": kind, **{part: ["library", "class"] for part in ("scheduler", "vae", *parts)}}
        return {"in_channels": 4, "sample_size": size}

    monkeypatch.setattr(base_pipeline, "read_config", read_config)


class Parsed(Exception):
    """A program has parsed its arguments: that was all that was asked of it."""


def subcommands() -> list[Any]:
    names = [each.name for each in pkgutil.iter_modules(diffpp_fast.cli.__path__, "diffpp_fast.cli.")]
    return [module for module in map(importlib.import_module, names) if hasattr(module, "add_parser")]


def check_ours(arguments: tuple[str, ...], project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`diffpp-fast ARGUMENTS` by its own parser; its configuration and overrides by the schema."""
    seen: list[argparse.Namespace] = []
    with monkeypatch.context() as patch:
        for command in subcommands():
            for name in [name for name in vars(command) if re.fullmatch(r"run(_\w+)?", name)]:
                patch.setattr(command, name, lambda arguments: seen.append(arguments) or 0)
        assert main(list(arguments)) == 0
    config = getattr(seen[0], "config", None)
    if config is not None:
        if str(config) not in READERS_OWN:
            assert (ROOT / config).is_file(), f"there is no {config}"
        load_config(project if str(config) in READERS_OWN else ROOT / config, getattr(seen[0], "overrides", ()))
    page = getattr(seen[0], "docs", None)
    assert page is None or (ROOT / page).is_file()


def check_pip(arguments: tuple[str, ...]) -> None:
    project = tomllib()["project"]
    known = {project["name"], ".", *project["optional-dependencies"]}
    (what,) = (word for word in arguments if not word.startswith("-") and word != "install")
    if what.startswith("dist/"):
        return  # a wheel of `make wheels`
    name, extras = re.fullmatch(r"([\w.-]+?)(?:\[([\w,]+)\])?", what).groups()
    assert name in known and set((extras or "").split(",")) <= known | {""}, what


def tomllib() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 reads no TOML")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def check_make(arguments: tuple[str, ...]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        variable, equals, value = word.partition("=")
        if equals:
            assert re.search(rf"\$\({variable}\)|^{variable} \?=", makefile, re.MULTILINE), word
            if value.startswith("--"):
                assert f'"{value.split()[0]}"' in (ROOT / "benchmarks/gpu_check.py").read_text(), word
        else:
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"no target {word}"


def check_python(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif arguments[:2] == ("-m", "pip"):
        check_pip(arguments[2:])
    elif arguments[0] != "-m" and len(arguments) == 1:
        assert (ROOT / arguments[0]).is_file()
    else:
        # To the point where it has parsed its arguments.
        def parse(self: argparse.ArgumentParser, argv: Any = None, *others: Any) -> Any:
            self.parse_known_args(argv, *others)[1] and self.error("unknown arguments")
            raise Parsed

        module = arguments[0] == "-m"
        monkeypatch.setattr(sys, "argv", ["", *arguments[1 + module :]])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed):
            if module:
                runpy.run_module(arguments[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def check_torchrun(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Check torchrun's own arguments; return those that are left to this package."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module and parsed.training_script == "diffpp_fast"
    return tuple(parsed.training_script_args)


def check(command: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = command.words
    arguments = tuple(rest)
    if program == "diffpp-fast":
        check_ours(arguments, project, monkeypatch)
    elif program == "torchrun":
        check_ours(check_torchrun(arguments), project, monkeypatch)
    elif program == "deepspeed":
        # Its own options are few; importing it takes longer than all the rest.
        ours = arguments.index("diffpp_fast")
        assert arguments[ours - 1] == "--module" and "--no_local_rank" in arguments
        check_ours(arguments[ours + 1 :], project, monkeypatch)
    elif program == "sbatch":
        (at,) = (number for number, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (ROOT / arguments[at]).is_file()
        check_ours(("train", *arguments[at + 1 :]), project, monkeypatch)
    elif program == "python":
        check_python(arguments, monkeypatch)
    elif program == "pip":
        flash = ("install", "ninja", "packaging", "psutil")
        assert arguments in {("install", "wandb"), flash} or check_pip(arguments) is None
    elif program == "make":
        check_make(arguments)
    else:
        assert program in OTHERS, f"nobody looks at {command.text}: list the program, or say how to check it"


@pytest.mark.parametrize("block", of("bash"))
def test_shell_block(block: Block, project: Path, hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(pages.commands(block))
    assert found, block.place
    for command in found:
        try:
            check(command, project, monkeypatch)
        except SystemExit as exit:
            raise AssertionError(f"{block.place}: {command.text}: its parser refuses it") from exit
        for word in command.words:
            if re.fullmatch(r"(examples|docs|tests|benchmarks)/[\w./-]+\.\w+", word):
                assert (ROOT / word).exists(), f"{block.place}: {word}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("diffpp-fast train align.yaml training.step=3", "training.step"),
        ("diffpp-fast train examples/configs/none.yaml", "there is no"),
        ("diffpp-fast sample --runs runs/x", "2"),
        ("make gpu-chekc", "no target"),
        ("python examples/emoji/dato.py", "is_file"),
        ('pip install "diffpp-fast[trian]"', "trian"),
        ("torchrun --nprocs 8 -m diffpp_fast train align.yaml", "2"),
        ("curl -O https://example.org", "nobody looks at"),
    ],
)
def test_a_wrong_command_is_found(
    line: str, message: str, project: Path, hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = pages.commands(Block("page", 1, "bash", None, line, ""))
    with pytest.raises((AssertionError, SystemExit, diffpp_fast.errors.UserError), match=re.escape(message)):
        check(command, project, monkeypatch)


# Configurations.


def configuration(fragment: dict[str, Any]) -> dict[str, Any]:
    """The whole configuration in which a fragment stands: sections by their keys, a reward's by its factory."""
    if fragment.keys() <= {"factory", "arguments"}:
        return {"rewards": {"optimised": {"scale": 1.0, **fragment}}}
    return fragment


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_block(block: Block, project: Path, hub: None) -> None:
    fragment = configuration(yaml.safe_load(block.code))
    if "base" in fragment.get("models", {}):
        own = tiny.settings()
        own["models"] = fragment["models"]
        project.write_text(yaml.safe_dump(own))
    else:
        path = project.with_name("fragment.yaml")
        path.write_text(yaml.safe_dump({"extends": project.name, **fragment}))
        project = path
    load_config(project)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_ready_configuration(path: Path, hub: None) -> None:
    assert load_config(path).training.steps > 0


def in_the_package(parts: list[str]) -> bool:
    """Whether a dotted name is a module of the package or something in one."""
    found: Any = diffpp_fast
    for part in parts:
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", pages.PAGES)
def test_keys_that_are_named_exist(page: str) -> None:
    known = set(known_keys())
    for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]\w*)+)(?:=[^`]*)?`", pages.without_blocks(page)):
        parts = name.split(".")
        if parts[0] in Config.model_fields:
            assert name in known or in_the_package(parts), f"{page}: there is no key {name}"


# Files and links.


@pytest.mark.parametrize("page", pages.PAGES)
def test_files_of_the_repository_that_are_named_exist(page: str) -> None:
    rooms = [path.name for path in (ROOT / "diffpp_fast").iterdir() if path.is_dir()]
    for name in re.findall(r"`([\w-]+/[\w./-]*\.\w+)`", pages.without_blocks(page)):
        first = name.split("/")[0]
        if first in rooms:
            assert (ROOT / "diffpp_fast" / name).exists(), f"{page}: there is no {name}"
        elif first in ("diffpp_fast", "tests", "docs", "csrc", "benchmarks", "examples"):
            assert (ROOT / name).exists(), f"{page}: there is no {name}"


@pytest.mark.parametrize("page", [page for page in pages.PAGES if not page.startswith("docs/")])
def test_links_lead_somewhere(page: str) -> None:
    """Those within docs/ are followed by mkdocs (test_site.py)."""
    for file, anchor in pages.links(page):
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), f"{page}: {file}"
        assert not anchor or anchor in pages.anchors(target), f"{page}: {file}#{anchor}"


# Pages as they are read: from top to bottom, on a machine that has nothing but the repository.


def steps(page: str) -> Iterator[Block]:
    yield from (block for block in pages.blocks() if block.page == page and block.language in ("python", "bash"))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/training.md", "docs/prompts.md", "docs/models.md"])
def test_a_page_as_it_is_read(page: str, as_in_the_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page != "docs/training.md":
        tiny.write(Path("build/tiny"))  # the page links to where this is done
    ran = 0
    for block in steps(page):
        if block.language == "python":
            saved = re.search(r"Save this\s+as `([^`]+)`:\s*$", block.before)
            if saved is not None:
                Path(saved[1]).write_text(block.code)
            elif needs(block) != "the downloads":
                run_python(block, {"__name__": "__main__"})
            continue
        for command in pages.commands(block):
            program, *arguments = command.words
            if program == "torchrun":  # here in one process
                program, arguments = "diffpp-fast", list(check_torchrun(tuple(arguments)))
            if program == "diffpp-fast":
                assert main(arguments) == 0, f"{block.place}: {command.text}"
                ran += 1
            elif arguments[0] == "-c":
                exec(arguments[1], {})
            else:
                assert "pip" in command.words, command.text
    assert ran >= 3
