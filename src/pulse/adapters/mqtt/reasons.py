"""What a broker says when it refuses or hangs up, as an Outage: whatever the reason, it is tried again.

A wrong password too: a broker may ask for it elsewhere, and an operator may mend it there, while nobody restarts us.
Sources: MQTT 3.1.1, table 3.1; MQTT 5.0, table 2.6.
"""

from __future__ import annotations

from pulse.adapters.mqtt.packets import Connack, Disconnect
from pulse.domain.errors import Outage

SYSTEM = "mqtt"
CREDENTIALS = "see mqtt_username and mqtt_password, and the broker's own list of users"
TAKEN_OVER = "another bridge connected with the same mqtt_client_id: each needs one of its own"

TEXTS = {
    0x00: "normal disconnection",
    0x01: "unacceptable protocol version",
    0x02: "client identifier rejected",
    0x03: "server unavailable",
    0x04: "bad user name or password",
    0x05: "not authorized",
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8D: "keep alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter invalid",
    0x93: "receive maximum exceeded",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA2: "wildcard subscriptions not supported",
}
HINTS = dict.fromkeys((0x04, 0x05, 0x86, 0x87), CREDENTIALS) | {0x8E: TAKEN_OVER}


def refusal_of(said: Connack | Disconnect) -> Outage:
    """Why the broker lets us not in, or hangs up."""
    verb = "refuses us" if isinstance(said, Connack) else "hung up"
    return Outage(SYSTEM, f"the broker {verb}: {said.reason or text_of(said.code)}", hint=HINTS.get(said.code, ""))


def subscription_failure(topic_filter: str, code: int) -> Outage:
    """Why a subscription is not what was asked for, QoS 1."""
    why = "at QoS 0, without acknowledgement" if code == 0 else f"not: {text_of(code)}"
    return Outage(SYSTEM, f"the broker grants {topic_filter} {why}", hint=HINTS.get(code, ""))


def text_of(code: int) -> str:
    """A reason code in words."""
    return TEXTS.get(code, f"reason code 0x{code:02x}")
