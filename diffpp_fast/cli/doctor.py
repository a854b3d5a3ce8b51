"""`diffpp-fast doctor`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from diffpp_fast.cli.options import Commands, add_command
from diffpp_fast.terminal import say

if TYPE_CHECKING:
    import torch

DESCRIPTION = """\
Shows what this machine has: versions, devices, how the compiled kernels were built, and for every operator which
backend serves it, whether the backend computes the right thing on small tensors, or why it does not serve. The exit
code is 1 if a backend that serves is wrong.
"""
#: Packages and the extra that brings each.
PACKAGES = {
    "torch": "",
    "triton": "gpu",
    "numpy": "",
    "diffusers": "train",
    "transformers": "train",
    "safetensors": "train",
    "pydantic": "train",
    "tensorboard": "train",
    "deepspeed": "distributed",
    "bitsandbytes": "gpu",
    "peft": "lora",
    "wandb": "wandb",
    "torchmetrics": "evaluate",
    "flash-attn": "flash",
    "xformers": "xformers",
}


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    add_command(commands, "doctor", run, help="show versions, devices and backends", description=DESCRIPTION)


def run(arguments: argparse.Namespace) -> int:
    import platform

    import torch

    from diffpp_fast.provenance import package_version
    from diffpp_fast.version import __version__

    say(f"diffpp-fast   {__version__}\npython        {platform.python_version()} on {platform.platform()}")
    for package, extra in PACKAGES.items():
        say(f"{package:<13} {package_version(package) or f'not installed (extra {extra})'}")
    from diffpp_fast.rewards.factories import FACTORIES

    say(f"\nrewards       {', '.join(FACTORIES)}")
    say(f"cpu           {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if not torch.cuda.is_available():
        say("cuda          no device that PyTorch can use")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        say(f"cuda:{index}        {facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    _print_build()
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    wrong = [failure for device in devices for failure in _print_operators(device)]
    for failure in wrong:
        say(f"\nWRONG: {failure}")
    return 1 if wrong else 0


def _print_build() -> None:
    from diffpp_fast import native

    reason = native.unavailable()
    say(f"\nlibrary       {native.LIBRARY if reason is None else f'none: {reason}'}")
    for name, value in native.facts().items():
        say(f"{name:<13} {value}")


def _print_operators(device: torch.device) -> list[str]:
    """Print a line per operator and a column per backend, the reasons below; return the failures of self-tests."""
    from diffpp_fast import backends, selftest

    say(f"\nOperators on {device}, float32; requested backend: {backends.requested_backend()}\n")
    width = max(map(len, backends.OPS))
    say(f"  {'operator':<{width}} {'default':<14}" + "".join(f" {backend:<10}" for backend in backends.PREFERENCE))
    rows = {(row.op, row.backend): row.reason for row in backends.table(device)}
    notes: dict[str, int] = {}
    failures = []
    for op in backends.OPS:
        cells = []
        for backend in backends.PREFERENCE:
            reason = rows[op, backend]
            if reason is not None:
                cells.append(f"no ({notes.setdefault(f'{backend}: {reason}', len(notes) + 1)})")
                continue
            failure = selftest.failure(op, backend, device)
            cells.append("right" if failure is None else "WRONG")
            if failure is not None:
                failures.append(f"{backend} on {device}: {failure}")
        # For few elements, and for many.
        default = " | ".join(
            dict.fromkeys(backends.default_backend(op, device, small=s) or "none" for s in (True, False))
        )
        say(f"  {op:<{width}} {default:<14}" + "".join(f" {cell:<10}" for cell in cells))
    if device.type == "cuda":
        say(f"\n  a | b: a for up to {backends.SMALL} elements, which take the host longer than the GPU, else b")
    print()
    for note, number in notes.items():
        say(f"  ({number}) {note}")
    return failures
