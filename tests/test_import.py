"""The cost of `import diffpp_fast`, and what it offers."""

import subprocess
import sys

import pytest

import diffpp_fast
from diffpp_fast.version import __version__

#: What torch loads for itself when it compiles; nobody who only calls operators should wait for it.
COMPILER = ("torch._dynamo", "torch._inductor", "triton", "sympy")
HEAVY = ("diffusers", "transformers", "deepspeed", "bitsandbytes")


def test_import_pays_for_torch_alone() -> None:
    code = f"import sys, diffpp_fast; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


def loaded_by(package: str) -> set[str]:
    """The modules in a fresh process that has imported `package`."""
    code = f"import sys, {package}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_import_adds_to_torch_little_but_its_own_modules() -> None:
    """A call loads a compiler where it needs one, and so may torch; the import does not."""
    before, after = loaded_by("torch"), loaded_by("diffpp_fast")
    added = {name for name in after - before if name.partition(".")[0] != "diffpp_fast"}
    assert not {name for name in added if name.startswith(COMPILER)}
    assert len(added) <= 10, sorted(added)


def test_an_old_torch_is_refused_in_a_sentence() -> None:
    code = "import torch; torch.__version__ = '2.9.1+cu128'; import diffpp_fast"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    *_, said = done.stderr.strip().splitlines()
    assert said == (
        "ImportError: diffpp_fast needs torch 2.11 or newer, here is 2.9.1+cu128: pip install 'torch>=2.11'"
    )


def test_names() -> None:
    assert diffpp_fast.__version__ == __version__ == "0.1.0"
    assert set(diffpp_fast.__all__) <= set(dir(diffpp_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffpp_fast.nothing  # noqa: B018
