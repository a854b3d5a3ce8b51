"""The cases of the GPU gate reach every kernel and every choice that host code makes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_gate
import pytest
import torch
from gpu_gate import Checks, judge

from benchmarks import variants
from diffpp_fast import backends
from diffpp_fast.ops import triton

#: A step within a function: from one line to the next, None where it returns.
Step = tuple[int, int | None]
#: The operators whose cases reach what files hold that are not of one operator.
SHARED = {
    "gap": ("denoising_loss", "score_gap", "sid_loss", "sim_loss"),
    "gap_loss": ("sid_loss", "sim_loss"),
    "layout": ("add_noise", "score_gap"),
    "modulated_norm": ("ada_layer_norm", "gated_residual_norm"),
}
FILES = [path for path in sorted(Path(triton.__file__).parent.glob("*.py")) if path.stem in (*backends.OPS, *SHARED)]


@contextmanager
def traced(path: Path) -> Iterator[set[Step]]:
    """Collects the steps of a file's functions within the block."""
    steps: set[Step] = set()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != str(path):
            return None
        before = frame.f_lineno

        def follow(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            if event in ("line", "return"):
                after = frame.f_lineno if event == "line" else None
                steps.add((before, after))
                before = frame.f_lineno
            return follow

        return follow

    outer = sys.gettrace()
    sys.settrace(enter)
    try:
        yield steps
    finally:
        sys.settrace(outer)


def missed(source: str, steps: set[Step]) -> list[str]:
    """List what of a file's host code was not run: launches, and the sides of conditions that end in no error."""
    found = []
    for node in ast.walk(ast.Module(list(host_functions(ast.parse(source))), [])):
        lines = range(getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) + 1)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            if not any(line in lines for line, _ in steps):
                found.append(f"line {node.lineno}: {ast.unparse(node.func.value)} is not launched")
        elif isinstance(node, ast.If) and not isinstance(node.body[-1], ast.Raise):
            test = range(node.lineno, node.test.end_lineno + 1)  # type: ignore[operator]
            body = range(node.body[0].lineno, node.body[-1].end_lineno + 1)  # type: ignore[operator]
            after = {end in body for begin, end in steps if begin in test and end not in test}
            found += [
                f"line {node.lineno}: `{ast.unparse(node.test)}` is never {side}"
                for side in (True, False)
                if side not in after
            ]
    return found


def host_functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods, but for those that Triton compiles."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(each) for each in node.decorator_list):
            yield node


def kernels_launched(source: str) -> set[str]:
    """The kernels that a file launches."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {func.value.id for func in calls if isinstance(func, ast.Subscript) and isinstance(func.value, ast.Name)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_argument_has_the_name_of_an_option_of_triton(path: Path) -> None:
    # Triton refuses them where it launches, and neither its interpreter nor torch.compile does.
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {word.arg for node in calls if isinstance(node.func, ast.Subscript) for word in node.keywords}
    assert not names & {"device", "device_type", "stream"}


def test_the_reader_of_host_code_sees_what_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "host.py"
    path.write_text(
        "def forward(x, large):\n"
        "    if large:\n"
        "        return _chunks[1](x)\n"
        "    if x > 9:\n"
        "        raise ValueError\n"
        "    return _whole[1](x)\n"
    )
    names: dict[str, Any] = {"_whole": {1: abs}, "_chunks": {1: abs}}
    exec(compile(path.read_text(), str(path), "exec"), names)
    with traced(path) as steps:
        names["forward"](1, False)
    assert missed(path.read_text(), steps) == ["line 2: `large` is never True", "line 3: _chunks is not launched"]
    assert kernels_launched(path.read_text()) == {"_whole", "_chunks"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check launches them")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_path_to_a_launch_of_triton_is_a_case(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    def once(variant: variants.Variant, device: torch.device, graph: bool) -> None:
        variants.make(variant, device).run()

    monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **options: None)
    monkeypatch.setattr(gpu_gate, "failure", once)
    with traced(path) as steps:
        for op in SHARED.get(path.stem, (path.stem,)):
            assert judge(op, "triton", Checks(torch.device("cpu"), graphs=False, compiler=None), 0.0).wrong == []
    assert missed(path.read_text(), steps) == []
