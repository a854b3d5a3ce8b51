"""What `import diffpp_fast` costs and offers."""

import subprocess
import sys

import pytest

import diffpp_fast
from diffpp_fast.version import __version__

HEAVY = ("diffusers", "transformers", "deepspeed", "bitsandbytes")


def test_import_pays_for_torch_alone() -> None:
    code = f"import sys, diffpp_fast; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


def test_names() -> None:
    assert diffpp_fast.__version__ == __version__ == "0.1.0"
    assert set(diffpp_fast.__all__) <= set(dir(diffpp_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffpp_fast.nothing  # noqa: B018
