"""Ports: which of those that we need are taken, by whom, and which setting moves us away."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import random
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from pulse.domain.errors import ConfigurationError

UNCLAIMED_PORTS = range(15_000, 32_000, 16)
"""Below the range that systems give to outgoing connections (Linux 32768, IANA 49152): what is free here stays free.

Each has 15 behind it, for who needs some in a row.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeededPort:
    """A port that we are about to listen on; `purpose` says what for, `setting` is the name that changes it."""

    purpose: str
    number: int
    setting: str
    host: str = "127.0.0.1"


def check_ports(ports: Iterable[NeededPort]) -> None:
    """Refuse before anything is started, all troubles at once.

    Raises ConfigurationError that names each port that is taken (and by which process, where the system tells), asked
    for twice, or not ours to have, and the setting that changes it.
    """
    troubles: list[str] = []
    settings: dict[str, None] = {}
    seen: dict[int, NeededPort] = {}
    for port in ports:
        trouble = f"is also that of {seen[port.number].purpose}" if port.number in seen else _trouble(port)
        seen.setdefault(port.number, port)
        if trouble:
            troubles.append(f"port {port.number} for {port.purpose} {trouble}")
            settings[f"--set {port.setting}=…"] = None
    if troubles:
        raise ConfigurationError(
            "; ".join(troubles), hint=f"stop what has it, or choose another: `pulse {' '.join(settings)} up`"
        )


def free_port() -> int:
    """A port on loopback that nobody listens on now; it comes again only after all others, so it may be used later."""
    for number in itertools.islice(_in_turn(UNCLAIMED_PORTS), len(UNCLAIMED_PORTS)):
        if _bind_error(NeededPort(purpose="", number=number, setting="")) is None:
            return number
    raise ConfigurationError("no free port was found on 127.0.0.1")


@functools.cache
def _in_turn(numbers: range) -> Iterator[int]:
    return itertools.cycle(random.sample(numbers, len(numbers)))


def _trouble(port: NeededPort) -> str:
    error = _bind_error(port)
    if error is None:
        return ""
    if error.errno == errno.EADDRINUSE:
        return f"is taken{_owner_of(port.number)}"
    return f"on {port.host} cannot be had: {error.strerror}"


def _bind_error(port: NeededPort) -> OSError | None:
    family = socket.AF_INET6 if ":" in port.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a connection of the past that is in TIME_WAIT is no obstacle, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host, port.number))
        except OSError as error:
            return error
    return None


def _owner_of(number: int) -> str:
    """` by NAME (pid N)`, or nothing where the system does not tell us."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address and address.port == number and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
