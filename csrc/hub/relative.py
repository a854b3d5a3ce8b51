"""Copies the operators' Python files into a package of any name: absolute imports become relative ones.

A file that would still ask for `diffpp_fast`, or for a library beside torch and Triton, is refused.
"""

import ast
import re
import sys
from pathlib import Path

PACKAGE = "diffpp_fast"
#: What the package offers; all that they import follows them.
ROOTS = ("ops", "noise", "schedule")
#: Written for the package anew.
REPLACED = ("library",)
LIBRARIES = {*sys.stdlib_module_names, "torch", "triton", PACKAGE}


def copied(package):
    """Return the files to copy, by their paths in the package folder, with what they then hold."""
    modules = {name_of(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}
    waiting = [name for name in modules if name.split(".")[0] in ROOTS]
    files = {}
    while waiting:
        module = waiting.pop()
        path = modules[module].relative_to(package)
        if module in REPLACED or path in files:
            continue
        files[path], needed = rewritten(modules[module].read_text(encoding="utf-8"), path, modules)
        waiting += needed
    return files


def name_of(path):
    """`ops/geglu.py` is "ops.geglu", `ops/__init__.py` is "ops", and the package itself is ""."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rewritten(source, path, modules):
    """Return a file with relative imports, and the modules that it imports."""
    lines = source.splitlines(keepends=True)
    needed = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module.split(".")[0] != PACKAGE:
            continue
        module = node.module.removeprefix(PACKAGE).removeprefix(".")
        inside = [f"{module}.{alias.name}".removeprefix(".") for alias in node.names]
        found = {name for name in inside if name in modules} or {module}
        if "" in found or not found <= modules.keys():
            raise SystemExit(f"{path}:{node.lineno}: only modules of {PACKAGE} can be imported from it")
        needed |= found
        line, statement = lines[node.lineno - 1], f"from {node.module} import"
        if not line[node.col_offset :].startswith(statement):
            raise SystemExit(f"{path}:{node.lineno}: can't be rewritten: {line.strip()}")
        lines[node.lineno - 1] = line.replace(statement, f"from {relative(module, path)} import", 1)
    result = "".join(lines)
    check(result, path)
    return result, needed


def relative(module, path):
    """Return a module's name, as the file at `path` asks for it: "..checks"."""
    here, there = list(path.parent.parts), module.split(".") if module else []
    shared = 0
    while shared < min(len(here), len(there)) and here[shared] == there[shared]:
        shared += 1
    return "." * (1 + len(here) - shared) + ".".join(there[shared:])


def check(source, path):
    """Refuse what would not be found in a package of another name, also where a string names it."""
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {node.module.split(".")[0]}
        else:
            names = set()
        if names - LIBRARIES or PACKAGE in names:
            raise SystemExit(f"{path}:{node.lineno}: imports {', '.join(sorted(names))}")
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        text = node.value if isinstance(node, ast.Constant) and id(node) not in said else None
        if name == PACKAGE or (isinstance(text, str) and re.search(rf"\b{PACKAGE}(\.|::|$)", text)):
            raise SystemExit(f"{path}:{node.lineno}: names {PACKAGE}")


def write(files, folder):
    """Write files by their paths."""
    for path, text in files.items():
        place = Path(folder, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
