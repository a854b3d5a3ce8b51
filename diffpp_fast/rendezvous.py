"""The rendezvous `diffpp_fast` of torchrun: its own c10d, on connections that end where a machine is cut off.

The launcher asks a store on the first machine all the time. Where no answer can come, c10d's call hangs until the
kernel gives the connection up (`net.ipv4.tcp_retries2`). Linux has a limit for each connection.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

#: Seconds without an answer, as `distributed.peer_timeout` by default; `--rdzv-conf peer_timeout=SECONDS` sets others.
LIMIT = 120
NAME = "diffpp_fast"


def register() -> Callable[[Any], Any]:
    """Return what makes the rendezvous, for the entry point by which torchrun finds it."""
    return make_rendezvous


def make_rendezvous(parameters: Any) -> Any:
    """Return torchrun's handler. Raises ValueError for a limit that is no whole number above 0."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    class Named(C10dRendezvousBackend):
        @property
        def name(self) -> str:
            return NAME

    limit = parameters.get_as_int("peer_timeout", LIMIT)
    if limit is None or limit <= 0:
        raise ValueError(f"--rdzv-conf peer_timeout={limit}: it is a number of seconds above 0")
    before = set(_connections())
    _, store = create_backend(parameters)
    for number in set(_connections()) - before:
        _bound(number, limit)
    return create_handler(store, Named(store, parameters.run_id), parameters)


def _connections() -> Iterator[int]:
    """The file descriptors of this process's TCP sockets."""
    if sys.platform != "linux":
        return
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                yield int(name)


def _bound(number: int, seconds: int) -> None:
    with socket.socket(fileno=os.dup(number)) as connection:
        if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)
