from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import pytest

from pulse.adapters.embedded.ports import NeededPort, check_ports, free_port
from pulse.domain.errors import ConfigurationError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        yield listener


def needed(number: int, purpose: str = "NATS", setting: str = "embedded_nats_port") -> NeededPort:
    return NeededPort(purpose=purpose, number=number, setting=setting)


def test_free_ports_are_fine() -> None:
    check_ports([needed(free_port())])


def test_a_taken_port_says_which_for_what_by_whom_and_what_changes_it(listener: socket.socket) -> None:
    number = listener.getsockname()[1]
    with pytest.raises(ConfigurationError) as refused:
        check_ports([needed(number)])
    owner = psutil.Process().name()
    assert refused.value.message == f"port {number} for NATS is taken by {owner} (pid {os.getpid()})"
    assert "`pulse --set embedded_nats_port=… up`" in refused.value.hint


def test_every_trouble_is_told_at_once(listener: socket.socket) -> None:
    number = listener.getsockname()[1]
    other = free_port()
    ports = [needed(number), needed(other, "PostgreSQL", "a"), needed(other, "the gateway", "gateway_port")]
    with pytest.raises(ConfigurationError) as refused:
        check_ports(ports)
    assert f"port {number} for NATS" in refused.value.message
    assert f"port {other} for the gateway is also that of PostgreSQL" in refused.value.message
    assert "gateway_port" in refused.value.hint


def test_a_listener_on_all_addresses_takes_loopback_too() -> None:
    with (
        socket.create_server(("0.0.0.0", free_port())) as everywhere,  # noqa: S104 - that is the case
        pytest.raises(ConfigurationError, match="is taken"),
    ):
        check_ports([needed(everywhere.getsockname()[1])])


def test_the_owner_is_left_out_where_the_system_does_not_tell(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(**_: str) -> list[object]:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", deny)
    with pytest.raises(ConfigurationError, match=r"is taken \("):
        check_ports([needed(listener.getsockname()[1])])


def test_an_address_that_is_not_ours_is_told() -> None:
    port = NeededPort(purpose="the gateway", number=free_port(), setting="gateway_port", host="192.0.2.1")
    with pytest.raises(ConfigurationError, match=r"on 192\.0\.2\.1 cannot be had"):
        check_ports([port])
