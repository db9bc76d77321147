"""MQTT brokers for tests: mosquitto (MQTT 5 and 3.1.1), and nats-server's own listener (3.1.1); and a paho publisher.

paho is an independent implementation: what our codec and it agree on is MQTT.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest
from paho.mqtt.client import Client, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.process import ManagedProcess

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
NEEDS_MOSQUITTO = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
LIMIT_S = 30.0

MOSQUITTO_CONF = """
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {folder}/
autosave_interval 1800
max_queued_messages 0
max_inflight_messages {inflight}
log_type error
log_type warning
"""


class Broker(Protocol):
    """One broker, and what a client has to know of it."""

    port: int
    username: str
    password: str
    version: str

    @property
    def url(self) -> str: ...
    def start(self) -> None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(kw_only=True)
class Mosquitto:
    """With persistence, and nothing dropped of what is queued."""

    folder: Path
    inflight: int = 200
    extra_conf: str = ""
    version: str = "5"
    username: str = ""
    password: str = ""
    port: int = field(default_factory=ports.free_port)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        conf = self.folder / "mosquitto.conf"
        text = MOSQUITTO_CONF.format(port=self.port, folder=self.folder, inflight=self.inflight)
        # Started as root it would become the user `mosquitto`, who cannot write here.
        conf.write_text(f"{text}user root\n{self.extra_conf}", encoding="utf-8")
        self.process = ManagedProcess(
            "mosquitto",
            [MOSQUITTO or "mosquitto", "-c", str(conf)],
            log_path=self.folder / "mosquitto.log",
            ready=lambda: listens(self.port),
            working_directory=self.folder,
        )

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process.start()

    def stop(self) -> None:
        """In order: what is queued is written down."""
        self.process.stop(10.0)

    def kill(self) -> None:
        self.process.kill()


@dataclass(kw_only=True)
class NatsBroker:
    """A nats-server of its own with a listener for MQTT."""

    folder: Path
    version: str = "3.1.1"
    username: str = "pulse"
    password: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    port: int = field(default_factory=ports.free_port)

    def __post_init__(self) -> None:
        self.server = NatsServer(
            self.folder,
            port=ports.free_port(),
            monitor_port=ports.free_port(),
            user=self.username,
            password=self.password,
            # What it has sent to a connection that broke comes again only after this; the default is 30 s.
            extra_conf=f'mqtt {{ listen: "127.0.0.1:{self.port}", ack_wait: "2s" }}',
        )

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        self.server.kill()


def listens(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False


class Publisher:
    """A device as paho makes it; `said` waits until all PUBACKs are there."""

    def __init__(self, broker: Broker, client_id: str) -> None:
        version = MQTTProtocolVersion.MQTTv5 if broker.version == "5" else MQTTProtocolVersion.MQTTv311
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version)
        self._client.max_inflight_messages_set(0)
        if broker.username:
            self._client.username_pw_set(broker.username, broker.password)
        self._broker = broker
        self._sent: list[MQTTMessageInfo] = []

    def say(self, topic: str, payload: bytes | str, *, qos: int = 1, retain: bool = False) -> None:
        """Publish; returns at once."""
        self._sent.append(self._client.publish(topic, payload, qos=qos, retain=retain))

    def said(self) -> None:
        """Returns once the broker has acknowledged all."""
        for each in self._sent:
            each.wait_for_publish(LIMIT_S)
            assert each.is_published()
        self._sent.clear()

    @contextlib.contextmanager
    def connected(self) -> Iterator[Publisher]:
        self._client.connect("127.0.0.1", self._broker.port)
        self._client.loop_start()
        try:
            yield self
            self.said()
        finally:
            self._client.disconnect()
            self._client.loop_stop()


def publish(broker: Broker, messages: Sequence[tuple[str, bytes | str]], *, client_id: str = "device") -> None:
    """Publish all of `(topic, payload)` at QoS 1, and return when the broker has them."""
    with Publisher(broker, client_id).connected() as publisher:
        for topic, payload in messages:
            publisher.say(topic, payload)
