"""Two machines of a test's own: network namespaces with names of their own, joined by a pair of virtual cables.

What runs in them finds each other over the link alone, and the link can be cut.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest

INTERFACE = "eth0"
PORT = 29500


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        name: that programs in it take for the machine's.
        space: the namespace's name on this machine.
        address: of its end of the link.
    """

    name: str
    space: str
    address: str

    def start(self, command: Sequence[str], extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command there, in a session of its own; its output goes into a pipe."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        variables = {name: text for name, text in processes.environments(1)[0].items() if name not in LAUNCH}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.space, *named, *command],
            env={**variables, "GLOO_SOCKET_IFNAME": INTERFACE, **(extra or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def torchrun(
        self,
        first: Host,
        *arguments: str,
        nodes: str = "2",
        restarts: int = 0,
        limit: float | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start one process there under torchrun, which meets the other's at the first host.

        With a `limit` torchrun waits no longer for the first host, by the package's own rendezvous.
        """
        backend, conf = ("c10d", "") if limit is None else ("diffpp_fast", f",peer_timeout={limit:g}")
        return self.start(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1",
                "--rdzv-backend", backend, "--rdzv-id", "hosts", "--rdzv-endpoint", f"{first.address}:{PORT}",
                "--rdzv-conf", f"is_host={int(self == first)},last_call_timeout=2{conf}",
                "--local-addr", self.address, "--max-restarts", str(restarts), *arguments,
            ],
            extra,
        )  # fmt: skip

    def link(self, state: str) -> None:
        """Put this end of the link "down" or "up"."""
        _ip("-n", self.space, "link", "set", INTERFACE, state)

    def bytes_sent(self) -> int:
        """Return the bytes that have gone over the link from here, headers included."""
        counted = _ip("netns", "exec", self.space, "cat", "/proc/net/dev")
        (line,) = (line for line in counted.splitlines() if line.strip().startswith(f"{INTERFACE}:"))
        return int(line.split(":")[1].split()[8])


LAUNCH = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Return two hosts that reach each other alone; skips the test where the kernel refuses them."""
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            pytest.skip(f"two hosts need the program {program} (iproute2, util-linux, hostname)")
    mark = f"dpp{os.getpid() % 100_000}"
    hosts = tuple(Host(f"host-{end}", f"{mark}{end}", f"10.77.0.{number}") for number, end in ((1, "a"), (2, "b")))
    try:
        try:
            for host in hosts:
                _ip("netns", "add", host.space)
                _ip("-n", host.space, "link", "set", "lo", "up")
            one, other = hosts
            _ip("link", "add", INTERFACE, "netns", one.space, "type", "veth", "peer", INTERFACE, "netns", other.space)
            for host in hosts:
                _ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", INTERFACE)
                host.link("up")
        except subprocess.CalledProcessError as refused:
            pytest.skip(f"the kernel makes no network namespaces for this user: {refused.stderr.strip()}")
        yield one, other
    finally:
        for host in hosts:
            # Whatever is still in there, also what was stopped.
            inside = subprocess.run(["ip", "netns", "pids", host.space], capture_output=True, text=True, check=False)
            for pid in inside.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", host.space], capture_output=True, check=False)


def worker_of(launcher: subprocess.Popen[str]) -> int:
    """Return the process that a host's torchrun has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (worker,) = (int(child) for child in children)
    return worker


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
