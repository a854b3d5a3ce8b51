"""Who may import whom: the floors of docs/architecture.md, read off the import statements."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffpp_fast"
FLOORS = {
    "errors": 0,
    "hub_files": 0,
    "install": 0,
    "library": 0,
    "availability": 0.05,
    "transforms": 0,
    "plain": 0.1,
    "backends": 0.1,
    "philox": 0.2,
    "prediction": 0.3,
    "native": 0.4,
    "provenance": 0,
    "rendezvous": 0,
    "noise": 1,
    "precision": 1,
    "selftest": 3,
    "schedule": 1,
    "spreadsheet": 0,
    "tensor_files": 1,
    "terminal": 0,
    "user_paths": 1,
    "ops": 2,
    "networks": 3,
    "rewards": 3,
    "methods": 4,
    "training": 5,
    "evaluation": 6,
    "report": 6,
    "cli": 7,
}
HEAVY = {"diffusers", "transformers", "deepspeed", "bitsandbytes", "pydantic", "yaml", "rich", "safetensors", "PIL"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in FLOORS)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_its_own_and_lower_floors(path: Path) -> None:
    room = room_of(path)
    for name in imported(ast.parse(path.read_text())):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == "diffpp_fast" and other in FLOORS and other != room:
            assert FLOORS[other] < FLOORS[room], f"{room} imports {other}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=lambda path: path.name)
def test_no_method_imports_another(path: Path) -> None:
    """Shared parts have files of their own; names.py and the room's door know all methods."""
    shared = {
        "base",
        "dropout",
        "guidance",
        "integral_kl",
        "method",
        "outputs",
        "passes",
        "reward_term",
        "regularizers",
        "through_networks",
        "times",
    }
    own = {
        name.split(".")[2] for name in imported(ast.parse(path.read_text())) if name.startswith("diffpp_fast.methods.")
    }
    assert path.stem in ("__init__", "names") or own <= shared


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_below_training_heavy_packages_are_imported_inside_functions(path: Path) -> None:
    if FLOORS[room_of(path)] >= FLOORS["training"] and room_of(path) != "cli":
        return
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {name.partition(".")[0] for node in top for name in imported(node)}
    assert not roots & HEAVY
