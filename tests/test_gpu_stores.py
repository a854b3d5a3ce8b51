"""The machine code of csrc's kernels in the compiled library: stores of 16 bytes, instructions of drawn noise."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

import pytest

from benchmarks import gpu_build
from benchmarks.backends import native
from diffpp_fast.errors import ConfigurationError

ARCH = 90
#: A kernel of bfloat16 whose threads move packs of 8 (`enum class Access`): stored noise or none, and drawn.
PACKED = re.compile(r"13__nv_bfloat16.*AccessE[12]E")
#: By kernel, the instructions an element of the loop that draws.
DRAWN = {"cuda.noise.normal": 30, "cuda.add_noise.forward": 34, "cuda.denoising_loss.forward": 42}


def test_packs_are_stored_at_once_and_noise_takes_few_instructions() -> None:
    """The compiler splits a plain assignment of 16 bytes in four where it has computed the words one by one."""
    try:
        kernels = [each.kernel for each in gpu_build.dump(native.LIBRARY) if each.arch == ARCH]
        command = [gpu_build.cuobjdump(), "-sass", "-arch", f"sm_{ARCH}", str(native.LIBRARY)]
    except ConfigurationError as error:
        pytest.skip(str(error))
    wanted = [kernel for kernel in kernels if PACKED.search(kernel)]
    if not kernels:
        pytest.skip("the library was compiled without nvcc")
    text = subprocess.run([*command, "-fun", ",".join(wanted)], capture_output=True, text=True, check=True).stdout
    drawn = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        mangled, _, body = part.partition("\n")
        name = gpu_build.kernel_name(mangled.strip())
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", body)
        code = [(int(at, 16), instruction) for at, instruction in lines]
        stores = Counter(instruction.split()[0] for _, instruction in code if instruction.startswith("STG"))
        assert stores["STG.E.128"] > 0 and stores["STG.E.U16"] == 0, (name, stores)
        if "AccessE2E" in mangled:
            drawn[name] = innermost(code)
    assert drawn.keys() >= DRAWN.keys()
    assert all(drawn[name] <= most for name, most in DRAWN.items()), drawn


def innermost(code: list[tuple[int, str]]) -> float:
    """Return how many instructions an element takes in the shortest loop that stores packs of 8."""
    store = next(at for at, instruction in code if instruction.startswith("STG.E.128"))
    jumps = [
        (int(match[1], 16), at)
        for at, instruction in code
        if (match := re.search(r"^BRA.* 0x([0-9a-f]+)", instruction))
    ]
    begin, end = min(((to, at) for to, at in jumps if to <= store <= at), key=lambda loop: loop[1] - loop[0])
    loop = [instruction for at, instruction in code if begin <= at <= end]
    return len(loop) / (8 * sum(instruction.startswith("STG.E.128") for instruction in loop))
