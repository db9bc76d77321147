"""Where the broker is, who we are there, and how a connection to it begins."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

import msgspec
import structlog

from pulse.adapters.mqtt.connection import Connection, Receiver, UnsupportedVersion
from pulse.adapters.mqtt.packets import Version, encode_connect
from pulse.adapters.mqtt.reasons import SYSTEM
from pulse.domain.errors import ConfigurationError, Outage

log = structlog.get_logger()

OPEN_S_MAX = 10.0
"""From the first packet of TCP to the SUBACK."""
PORTS = {"mqtt": 1883, "mqtts": 8883}
NAMES = {Version.V3_1_1: "3.1.1", Version.V5: "5"}
VERSIONS = {"3.1.1": (Version.V3_1_1,), "5": (Version.V5,), "auto": (Version.V5, Version.V3_1_1)}


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Who we are at a broker, and how: the settings whose names begin with `mqtt_`."""

    mqtt_url: str
    mqtt_username: str
    mqtt_password: str
    mqtt_client_id: str
    mqtt_version: Literal["auto", "5", "3.1.1"]
    mqtt_share_group: str
    mqtt_receive_max: int
    mqtt_session_expiry_s: int
    mqtt_keep_alive_s: int
    mqtt_ca_file: str
    mqtt_cert_file: str
    mqtt_key_file: str


class MqttBroker:
    """Opens connections to one broker, that subscribe to `filters`.

    Raises ConfigurationError where the URL is none, or a file of certificates cannot be read.
    """

    def __init__(self, account: Account, *, filters: Sequence[str]) -> None:
        self._account = account
        self._host, self._port, self._tls = address_of(account)
        self._filters = filters
        self._shared = [f"$share/{account.mqtt_share_group}/{each}" for each in filters]
        self._versions = VERSIONS[account.mqtt_version]

    async def connect(self, receiver: Receiver) -> Connection:
        """A connection that is subscribed; its messages go to `receiver`, and may come before this returns.

        Raises Outage where the broker is away or refuses us.
        """
        for version in self._versions:
            try:
                connection = await self._open(receiver, version)
            except UnsupportedVersion:
                continue
            self._versions = (version,)
            return connection
        raise Outage(SYSTEM, f"the broker does not speak MQTT {self._account.mqtt_version}", hint="see mqtt_version")

    async def _open(self, receiver: Receiver, version: Version) -> Connection:
        account = self._account
        connect = encode_connect(
            version=version,
            client_id=account.mqtt_client_id,
            keep_alive_s=account.mqtt_keep_alive_s,
            username=account.mqtt_username,
            password=account.mqtt_password,
            session_expiry_s=account.mqtt_session_expiry_s,
            receive_max=account.mqtt_receive_max,
        )
        connection = Connection(receiver, version=version, keep_alive_s=account.mqtt_keep_alive_s)
        try:
            async with asyncio.timeout(OPEN_S_MAX):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection, self._host, self._port, ssl=self._tls
                )
                await connection.handshake(connect, self._filters, self._shared)
        except TimeoutError as error:
            connection.abort("it took too long to open")
            raise Outage(SYSTEM, f"the broker did not answer within {OPEN_S_MAX:g} s") from error
        except OSError as error:
            raise Outage(SYSTEM, f"no connection to the broker: {error.strerror or error}") from error
        except BaseException:
            connection.abort("it was not opened")
            raise
        log.info("connected to the broker", version=NAMES[version])
        return connection


def address_of(account: Account) -> tuple[str, int, ssl.SSLContext | None]:
    """Host and port of the broker, and with whose certificates it is spoken to; raises as MqttBroker does."""
    try:
        url = urlsplit(account.mqtt_url)
        host, port = url.hostname, url.port or PORTS[url.scheme]
    except (ValueError, KeyError) as error:
        raise ConfigurationError(f"mqtt_url is no URL of a broker: {error}") from error
    if not host or url.username or url.path.strip("/"):
        raise ConfigurationError(
            "mqtt_url has to be mqtt://host:port or mqtts://host:port", hint="the user goes to mqtt_username"
        )
    if url.scheme == "mqtt":
        return host, port, None
    try:
        tls = ssl.create_default_context(cafile=account.mqtt_ca_file or None)
        if account.mqtt_cert_file:
            tls.load_cert_chain(account.mqtt_cert_file, account.mqtt_key_file or None)
    except OSError as error:
        raise ConfigurationError(f"the certificates of the bridge cannot be read: {error}") from error
    return host, port, tls
