"""An MQTT 3.1.1 client that is none of ours (paho), made plain for tests: connect, publish, subscribe, and wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

HOST = "127.0.0.1"
WAIT_S_MAX = 45.0
GRANTED_MAX = 2


@dataclass(kw_only=True)
class Heard:
    """What a client has been told so far."""

    connected: list[int] = field(default_factory=list)
    """The return code of each CONNACK; 0 is yes."""
    disconnected: int = 0
    granted: dict[int, int] = field(default_factory=dict)
    """The first code of each SUBACK, by packet id; from 128 on it is a refusal."""
    confirmed: set[int] = field(default_factory=set)
    messages: list[tuple[str, bytes]] = field(default_factory=list)


class Device:
    """A client whose network runs in a thread of its own."""

    def __init__(self, *, port: int, user: str = "", token: str = "", client_id: str = "", clean: bool = True) -> None:
        self.heard = Heard()
        self._changed = threading.Condition()
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id or user, clean_session=clean, reconnect_on_failure=False
        )
        if user or token:
            self.client.username_pw_set(user, token or None)
        self._port = port
        self.client.on_connect = lambda _c, _u, _f, code, _p: self._note(
            lambda: self.heard.connected.append(code.value)
        )
        self.client.on_disconnect = lambda *_: self._note(self._count_disconnect)
        self.client.on_subscribe = lambda _c, _u, mid, codes, _p: self._note(
            lambda: self.heard.granted.update({mid: codes[0].value})
        )
        self.client.on_publish = lambda _c, _u, mid, _r, _p: self._note(lambda: self.heard.confirmed.add(mid))
        self.client.on_message = lambda _c, _u, message: self._note(
            lambda: self.heard.messages.append((message.topic, bytes(message.payload)))
        )

    def connect(self) -> bool:
        """Connect; whether the broker says yes."""
        self.client.connect(HOST, self._port, keepalive=30)
        self.client.loop_start()
        self.wait(lambda: bool(self.heard.connected) or self.heard.disconnected > 0, "an answer to CONNECT")
        return bool(self.heard.connected) and self.heard.connected[-1] == 0

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1 and wait for the PUBACK."""
        mid = self.client.publish(topic, payload, qos=1, retain=retain).mid
        self.wait(lambda: mid in self.heard.confirmed, f"the PUBACK of {topic}")

    def subscribe(self, topic: str) -> bool:
        """Subscribe at QoS 1; whether the broker grants it."""
        _, mid = self.client.subscribe(topic, qos=1)
        assert mid is not None
        self.wait(lambda: mid in self.heard.granted, f"the SUBACK of {topic}")
        return self.heard.granted[mid] <= GRANTED_MAX

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Return once `condition` holds; fail, saying `what`, where it does not in time."""
        deadline = time.monotonic() + WAIT_S_MAX
        with self._changed:
            while not condition():
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"not within {WAIT_S_MAX} s: {what}"
                self._changed.wait(left_s)

    def end(self, *, abruptly: bool = False) -> None:
        """Disconnect; `abruptly` as a device does that loses its network, so that its will is published."""
        if abruptly:
            sock: Any = self.client.socket()
            if sock is not None:
                sock.close()
        else:
            self.client.disconnect()
        self.client.loop_stop()

    def _count_disconnect(self) -> None:
        self.heard.disconnected += 1

    def _note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


@contextmanager
def device(*, port: int, user: str = "", token: str = "", client_id: str = "", clean: bool = True) -> Iterator[Device]:
    """A device that is not connected yet; it is gone at the end."""
    made = Device(port=port, user=user, token=token, client_id=client_id, clean=clean)
    try:
        yield made
    finally:
        made.end()
