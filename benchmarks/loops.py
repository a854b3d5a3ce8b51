"""Times the blocks of docs/embedding.md, before and after, in turns: time, and what autograd keeps.

    python -m benchmarks loops --threads 1

The blocks are those of the page, at the sizes that stand there. Networks are stand-ins of one convolution, so that the
times show the arithmetic around them; the autoencoder of the last one is small, but a true one.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch

PAGE = Path(__file__).parent.parent / "docs/embedding.md"
NAMES = ("DMD", "SiD", "ReFL")


def block(name: str, part: str) -> CodeType:
    found = re.search(
        rf'^```python title="{name}: {part}"\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return compile(found[1], f"{name}: {part}", "exec")


def seconds(code: CodeType, given: dict[str, Any]) -> float:
    scope = dict(given)
    start = time.perf_counter()
    exec(code, scope)
    return time.perf_counter() - start


def kept(code: CodeType, given: dict[str, Any]) -> int:
    """Bytes of all storages that autograd saves, without those of parameters."""
    modules = [value for value in given.values() if isinstance(value, torch.nn.Module)]
    parameters = {parameter.data_ptr() for module in modules for parameter in module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # alive to the end: no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        exec(code, dict(given))
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200, help="in which both are timed by turns (200)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print("| loop | before ms | after ms | faster | kept before MiB | after MiB |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in NAMES:
        given: dict[str, Any] = {}
        exec(block(name, "what is given"), given)
        codes = [block(name, part) for part in ("before", "after")]
        times: list[list[float]] = [[], []]
        for turn in range(arguments.rounds + 3):
            for which in (0, 1) if turn % 2 else (1, 0):
                times[which].append(seconds(codes[which], given))
        before, after = (1e3 * statistics.median(each[3:]) for each in times)
        ratio = statistics.median(b / a for b, a in zip(times[0][3:], times[1][3:], strict=True))
        memory = " | ".join(f"{kept(code, given) / 2**20:.1f}" for code in codes)
        print(f"| {name} | {before:.2f} | {after:.2f} | {ratio:.2f} x | {memory} |")
    return 0
