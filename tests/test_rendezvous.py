"""The package's rendezvous of torchrun: found by it, and with a limit on its connections."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from diffpp_fast import rendezvous

ROOT = Path(__file__).parents[1]
#: As pyproject.toml has it.
ENTRY = '"torchrun.handlers"]\ndiffpp_fast = "diffpp_fast.rendezvous:register"\n'


def write_plugin(folder: Path) -> Path:
    """Write the package's entry point as an installation does; return the folder, for the path."""
    metadata = folder / "diffpp_fast_entry-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: diffpp-fast-entry\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[torchrun.handlers]\ndiffpp_fast = diffpp_fast.rendezvous:register\n")
    return folder


def parameters(port: int, **more: str) -> RendezvousParameters:
    return RendezvousParameters(rendezvous.NAME, f"127.0.0.1:{port}", "job", 1, 1, is_host="1", **more)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_its_own_connections_have_a_limit(port: int) -> None:
    def limits() -> list[int]:
        found = []
        for number in rendezvous._connections():
            with socket.socket(fileno=os.dup(number)) as each:
                if each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM:
                    found.append(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        return found

    with socket.socket() as other:
        handler = rendezvous.make_rendezvous(parameters(port, peer_timeout="7"))
        assert handler.get_backend() == rendezvous.NAME
        assert limits().count(7000) >= 1 and other.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert handler.next_rendezvous().world_size == 1
    assert handler.shutdown()


def test_a_limit_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="peer_timeout=0: it is a number of seconds above 0"):
        rendezvous.make_rendezvous(parameters(port, peer_timeout="0"))


@pytest.mark.slow
def test_torchrun_finds_it(tmp_path: Path) -> None:
    assert ENTRY in (ROOT / "pyproject.toml").read_text()
    (tmp_path / "worker.py").write_text("import os; print('rank', os.environ['RANK'])")
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "diffpp_fast", "--rdzv-endpoint"]
    path = os.pathsep.join([str(write_plugin(tmp_path / "plugin")), str(ROOT)])
    done = subprocess.run(
        [*command, "127.0.0.1:0", str(tmp_path / "worker.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "rank 0" in done.stdout, done.stderr
