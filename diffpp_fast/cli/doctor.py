"""`diffpp-fast doctor`."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Shows what this machine has: versions, devices, and which backend serves which operator, or why it does not.
"""
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "safetensors",
    "pydantic",
    "tensorboard",
    "deepspeed",
    "bitsandbytes",
    "flash-attn",
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="show versions, devices and backends", description=DESCRIPTION)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import platform

    import torch

    from diffpp_fast.kernels import dispatch
    from diffpp_fast.version import __version__

    print(f"diffpp-fast   {__version__}\npython        {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:<13} {_version(package)}")
    print(f"\ncpu           {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if not torch.cuda.is_available():
        print("cuda          no device that PyTorch can use")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}        {facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\nOperators on {device}, float32; requested backend: {dispatch.requested_backend()}\n")
    for row in dispatch.table(device):
        print(f"  {row.op:<16} {row.backend:<10} {'serves' if row.serves else f'no: {row.reason}'}")
    return 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
