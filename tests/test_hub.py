"""The package for Hugging Face's kernels (csrc/hub): its files, and copies of it beside the one that it is made of."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import torch
from torch import Tensor, nn

from diffpp_fast import Noise, ops, selftest, use_backend
from diffpp_fast.availability import INTERPRETED
from diffpp_fast.backends import OPS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def make(folder: Path, name: str, *options: str) -> Path:
    command = [sys.executable, str(ROOT / "csrc/hub/make.py"), "--into", str(folder), "--name", name, *options]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def load(variant: Path) -> ModuleType:
    """Import a variant as `kernels` does: by the unique name in its metadata."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hub") / "kernels", "diffpp-fast", "--compile", "none")


@pytest.fixture(scope="module")
def package(folder: Path) -> Iterator[ModuleType]:
    yield from loaded(folder / "build/torch-cpu")


@pytest.fixture(scope="module")
def other(folder: Path) -> Iterator[ModuleType]:
    yield from loaded(make(folder.with_name("other"), "other-name", "--compile", "none") / "build/torch-cpu")


def loaded(variant: Path) -> Iterator[ModuleType]:
    module = load(variant)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == module.__name__]:
        del sys.modules[name]


def run(package: Any, call: selftest.Call) -> tuple[Tensor, ...]:
    """The same call by a copy's operator, forward and backward."""
    arguments = {
        name: package.Noise(value.seed, value.samples, value.stream) if isinstance(value, Noise) else value
        for name, value in call.fresh().arguments.items()
    }
    return selftest.step(getattr(package, call.op), arguments, call.wrt, call.outer)


@pytest.mark.parametrize("op", [op for op in OPS if op != "philox"])
def test_copies_compute_what_the_package_does(op: str, package: ModuleType, other: ModuleType) -> None:
    options = selftest.CHECKED.get(op, ({},))[0]
    call = selftest.make(op, selftest.SHAPES.get(op, selftest.SHAPE), device=CPU, **options)
    for backend in ("reference", "triton") if INTERPRETED else ("reference",):
        with use_backend(backend), package.use_backend(backend), other.use_backend(backend):
            expected = call.fresh().run()
            # The interpreter is slow.
            for copy in (package, other) if backend == "reference" else (other,):
                assert all(map(torch.equal, run(copy, call), expected))


def test_copies_choose_backends_for_themselves(
    package: ModuleType, other: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 6)
    with package.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="geglu: backend 'cuda' can't serve"):
            package.geglu(x)
        assert torch.allclose(other.geglu(x), ops.geglu(x), atol=1e-6)
    with pytest.raises(RuntimeError, match="this variant of the package is pure Python"), package.use_backend("cpu"):
        package.geglu(x)
    # The environment speaks to all of them, before the first call.
    monkeypatch.setenv("DIFFPP_FAST_BACKEND", "cuda")
    for copy in (package, other):
        backends = importlib.import_module(f"{copy.__name__}.backends")
        backends._from_environment.cache_clear()
        assert backends.requested_backend() == "cuda"
        backends._from_environment.cache_clear()


def test_every_operator_is_offered(package: ModuleType) -> None:
    assert set(ops.__all__) <= set(package.__all__) and "layers" in package.__all__
    assert all(hasattr(package, name) for name in package.__all__)


def layers(package: ModuleType) -> dict[str, Any]:
    found = inspect.getmembers(package.layers, inspect.isclass)
    return {name: layer for name, layer in found if layer.__module__ == package.layers.__name__}


def test_layers_are_pure(package: ModuleType) -> None:
    """Neither a constructor nor members of their own, which `kernels` refuses; two say what a layer can do."""
    known = {name for name, _ in inspect.getmembers(nn.Module)}
    assert len(layers(package)) == 8
    for layer in layers(package).values():
        assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
        assert {name for name, _ in inspect.getmembers(layer)} - known == {"has_backward", "can_torch_compile"}
        assert layer.has_backward and layer.can_torch_compile


class Attributes(nn.Module):
    """A module that a layer's forward can be given to."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def layer_cases() -> dict[str, tuple[nn.Module, tuple[Tensor, ...], Any]]:
    """By layer: a module, arguments, and what they give in the package or in torch."""
    group_norm, layer_norm, project = nn.GroupNorm(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 24)
    pixels, tokens, more, rows = (
        torch.randn(2, 8, 3, 3),
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 8),
        torch.randn(3, 2, 8),
    )
    rms, heads, angles = nn.RMSNorm(8), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 8)

    def ada(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]

    def zero(x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = project(nn.functional.silu(emb)).chunk(3, dim=1)
        return ada(x, scale, shift), gate

    def residual(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + gate[:, None] * branch
        return hidden, ada(hidden, scale, shift)

    def gate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * nn.functional.gelu(b)

    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = rms(x)
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        return y * cos[:, None] + torch.stack((-b, a), dim=-1).flatten(-2) * sin[:, None]

    return {
        "GroupNorm": (group_norm, (pixels,), group_norm.forward),
        "GroupNormSiLU": (group_norm, (pixels,), lambda x: nn.functional.silu(group_norm(x))),
        "GEGLU": (Attributes(proj=project), (tokens,), lambda x: gate(project(x))),
        "GEGLUGate": (nn.Module(), (tokens,), gate),
        "AdaLayerNorm": (Attributes(eps=1e-5), (tokens, *rows[:2]), ada),
        "AdaLayerNormZeroSingle": (
            Attributes(silu=nn.SiLU(), linear=project, norm=layer_norm),
            (tokens, rows[0]),
            zero,
        ),
        "GatedResidualNorm": (Attributes(eps=1e-5), (tokens, more, *rows), residual),
        "RMSNormRoPE": (rms, (heads, *angles), rope),
    }


def outputs_and_gradients(function: Any, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weighted = sum((output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(weighted, leaves)]


@pytest.mark.parametrize("name", layer_cases())
def test_layer(name: str, package: ModuleType) -> None:
    """A layer's forward in another module: as torch computes it, and compiled into one graph."""
    module, arguments, expected = layer_cases()[name]
    wanted = outputs_and_gradients(expected, arguments)
    module.forward = layers(package)[name].forward.__get__(module)  # as `kernelize` does
    torch._dynamo.reset()
    with package.use_backend("reference"):
        for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            for actual, value in zip(outputs_and_gradients(function, arguments), wanted, strict=True):
                torch.testing.assert_close(actual, value)


# The files.


@pytest.mark.parametrize("variant", ["torch-cpu", "torch-cuda"])
def test_metadata(variant: str, folder: Path) -> None:
    place = folder / "build" / variant
    metadata = json.loads((place / "metadata.json").read_text())
    assert metadata["name"] == "diffpp-fast" and metadata["backend"] == {"type": variant.removeprefix("torch-")}
    assert metadata["id"].isidentifier() and metadata["license"] == "Apache-2.0" and metadata["python-depends"] == []
    files = {
        str(path.relative_to(place)): path for path in place.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    del files["metadata.json"]
    digests = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
    assert metadata["digest"]["files"] == {name: base64.b64encode(value).decode() for name, value in digests.items()}
    assert f"torch.ops.{metadata['id']}\n" in (place / "_ops.py").read_text()


def test_another_content_has_another_namespace(folder: Path, package: ModuleType, other: ModuleType) -> None:
    assert re.fullmatch("_diffpp_fast_cpu_[0-9a-f]{7}", package.__name__)
    assert re.fullmatch("_other_name_cpu_[0-9a-f]{7}", other.__name__)
    assert package.__name__[-7:] != other.__name__[-7:]


def test_imports_are_relative_or_of_torch(folder: Path) -> None:
    for path in (folder / "torch-ext/diffpp_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {"torch", "triton", *sys.stdlib_module_names}, f"{path}: {roots}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import diffpp_fast.noise\n", "imports diffpp_fast"),
        ("from diffpp_fast import methods\n", "only modules of diffpp_fast"),
        ("from diffpp_fast.noise import (Noise)\nimport numpy\n", "imports numpy"),
        ("from  diffpp_fast.noise import Noise\n", "can't be rewritten"),
        ("def f():\n    return resolve('diffpp_fast.noise')\n", "names diffpp_fast"),
        ("import torch\nop = torch.ops.diffpp_fast.geglu\n", "names diffpp_fast"),
        ("fake(f'diffpp_fast::{name}')\n", "names diffpp_fast"),
    ],
)
def test_what_can_not_be_rewritten_is_refused(source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relative = by_path(ROOT / "csrc/hub/relative.py")
    known = {"noise": Path("noise.py"), "ops": Path("ops/__init__.py")}
    with pytest.raises(SystemExit, match=said):
        relative.rewritten(source, Path("ops/new.py"), known)


def test_rewriting() -> None:
    relative = by_path(ROOT / "csrc/hub/relative.py")
    known = dict.fromkeys(("noise", "ops", "ops.checks", "ops.triton", "ops.triton.gap"), Path("x.py"))
    source = '"""Of diffpp_fast::geglu."""\nfrom diffpp_fast import noise\nfrom diffpp_fast.ops import checks\n'
    source += "def f():\n    from diffpp_fast.ops.triton.gap import (\n        load,\n    )\n"
    text, needed = relative.rewritten(source, Path("ops/triton/new.py"), known)
    assert [line for line in text.splitlines() if "import" in line] == [
        "from ... import noise",
        "from .. import checks",
        "    from .gap import (",
    ]
    assert needed == {"noise", "ops.checks", "ops.triton.gap"}


def by_path(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"hub_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_description_has_every_source_once_for_each_backend(folder: Path) -> None:
    described = tomllib.loads((folder / "build.toml").read_text())
    assert described["general"]["edition"] == 5 and described["torch"]["stable-abi"] == {"cpu": "2.11", "cuda": "2.11"}
    suffixes = {"cpu": {".cpp"}, "cuda": {".cpp", ".cu"}}
    for backend, compiled in suffixes.items():
        kernels = [kernel for kernel in described["kernel"].values() if kernel["backend"] == backend]
        sources = sorted(source for kernel in kernels for source in kernel["src"])
        written = (path for path in (folder / "csrc").rglob("*") if path.suffix in compiled)
        assert sources == sorted(str(path.relative_to(folder)) for path in written)
    headers = {str(path.relative_to(folder)) for path in (folder / "csrc").rglob("*.*h")}
    assert headers == {name for name in described["torch"]["src"] if name.startswith("csrc")}


def test_sources_leave_the_namespace_open(folder: Path) -> None:
    code = [path.read_text() for path in (folder / "csrc").rglob("*") if path.is_file()]
    registered = [name for text in code for name in re.findall(r"STABLE_TORCH_LIBRARY(?:_\w+)?\((\w+)", text)]
    assert set(registered) == {"TORCH_EXTENSION_NAME"} and len(registered) > len(OPS)


def test_the_card(folder: Path, package: ModuleType) -> None:
    card = (folder / "CARD.md").read_text()
    assert card == (folder / "README.md").read_text() and card.startswith(
        "---\nlibrary_name: kernels\nlicense: apache-2.0\n"
    )
    said = set(re.findall(r"`(\w+)`", card))
    assert set(package.__all__) - {"layers"} <= said | {"use_backend"} and set(layers(package)) <= said
    _, usage = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(usage, {"kernel": package})


def test_a_folder_of_something_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make(tmp_path, "diffpp-fast", "--compile", "none")
    assert b"holds something else" in refused.value.stderr and (tmp_path / "mine").exists()


@pytest.mark.parametrize(("into", "name", "said"), [("k", "../x", "lower-case letters"), ("file", "x", "it is a file")])
def test_a_name_or_place_that_is_none_is_refused(tmp_path: Path, into: str, name: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make(tmp_path / into, name, "--compile", "none")
    assert said in refused.value.stderr.decode() and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    """The library under another name, beside the package's own: a process that imports both."""
    folder = make(tmp_path / "kernels", "other-name", "--compile", "cpu")
    (variant,) = folder.glob("build/torch-stable-abi*")
    script = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import torch
from pathlib import Path
from test_hub import CPU, OPS, load, run, selftest, use_backend
package = load(Path({str(variant)!r}))
for op in OPS[1:]:
    for options in selftest.CHECKED.get(op, ({{}},)):
        call = selftest.make(op, selftest.SHAPES.get(op, selftest.SHAPE), device=CPU, **options)
        with use_backend("cpu"), package.use_backend("cpu"):
            assert all(map(torch.equal, run(package, call), call.fresh().run())), op
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})
