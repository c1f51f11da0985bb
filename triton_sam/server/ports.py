"""Addresses and ports to listen on."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from ..errors import EmbeddedServerError
from .diagnosis import port_in_use

_LISTENING = "0A"


def choose_ports(host: str, requested: tuple[int, int, int]) -> tuple[int, int, int]:
    """``requested`` with each 0 replaced by a free port.

    Raises :class:`PortInUseError` when one is taken, and :class:`EmbeddedServerError` when the
    address is not one of this machine.
    """
    with ExitStack() as sockets:
        # All at once, so that no port is chosen twice.
        ports = [sockets.enter_context(_listen(host, port)).getsockname()[1] for port in requested]
    return ports[0], ports[1], ports[2]


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Connections of an earlier server that are still closing do not keep the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
    except (OSError, OverflowError) as error:
        listener.close()
        raise _port_error(host, port, error) from error
    return listener


def _port_error(host: str, port: int, error: Exception) -> EmbeddedServerError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return port_in_use(port)
    return EmbeddedServerError(f"The server cannot listen on {host}:{port}: {error}.")


def resolve(host: str) -> str:
    """The IPv4 address of ``host``: the server takes no names.

    Raises :class:`EmbeddedServerError` when there is none.
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise EmbeddedServerError(
            f"The server cannot listen on {host!r}: {error}. Give an IPv4 address of this machine, "
            "such as 127.0.0.1, or 0.0.0.0 for all of them."
        ) from error


def reachable(host: str) -> str:
    """The address at which a client on this machine reaches a server that listens on ``host``."""
    return "127.0.0.1" if host == "0.0.0.0" else host


def listening_ports(pid: int | None) -> set[int]:
    """The TCP ports on which the process ``pid`` listens; none when it is gone."""
    owned = set()
    # The process may end, or close a descriptor, meanwhile.
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            owned.add(str(descriptor.readlink()))
    return {port for port, inode in _listeners() if f"socket:[{inode}]" in owned}


def _listeners() -> Iterator[tuple[int, str]]:
    """Port and inode of every listening socket."""
    # gRPC opens sockets for both protocols, also when the address is of IPv4.
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == _LISTENING:
                yield int(fields[1].rpartition(":")[2], 16), fields[9]
