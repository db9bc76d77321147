"""A fleet of devices that does not exist: what each of them would say at a given moment.

    thermostat    temperature that drifts around a set point, humidity, heating on or off, mode
    meter         voltage, power over a daily cycle, energy that only grows, relay, tariff
    door          open or closed, how often it was opened, battery, radio

A reading is a pure function of seed, device and time: nothing is remembered from one to the next, so any number of
devices costs no memory. Chance is a hash of those numbers (splitmix64), drift is value noise between its points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pulse.domain.telemetry import Metrics

DAY_S = 86_400
DEVICES_MAX = 100_000
KINDS = ("thermostat", "meter", "thermostat", "door", "meter", "thermostat")
"""The kind of a device is that of its number modulo six, whatever the seed: the same ids in every run."""
SITE_SIZE = 25
"""Devices of one building."""
BATTERY_S = 400 * DAY_S
INSTALLED_S = 1_700_000_000
"""When the fleet was installed (November 2023), since when its counters count."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """`size` devices, numbered from 0, of the character that `seed` gives them."""

    size: int
    seed: int

    def device_id(self, number: int) -> str:
        """Like `thermostat-00001`."""
        return f"{kind_of(number)}-{number + 1:05}"

    def device_ids(self) -> list[str]:
        """By number."""
        return [self.device_id(number) for number in range(self.size)]

    def telemetry(self, number: int, *, seq: int, ts_ms: int) -> bytes:
        """The payload that device `number` sends at `ts_ms` (since the epoch) as its message `seq`."""
        metrics = READINGS[kind_of(number)](Character(seed=self.seed, number=number), ts_ms / 1000)
        site = f"building-{number // SITE_SIZE + 1}"
        return msgspec.json.encode({"ts": ts_ms, "seq": seq, "site_id": site, "metrics": metrics})

    def heartbeat(self, *, seq: int, ts_ms: int) -> bytes:
        """The payload of a heartbeat."""
        return msgspec.json.encode({"ts": ts_ms, "seq": seq})

    def chosen(self, message: int, *, fraction: float, purpose: int) -> bool:
        """Whether `message` is one of the `fraction` that chance picks for `purpose`."""
        return fraction > 0 and chance(self.seed, purpose, message) < fraction


class Message(msgspec.Struct, frozen=True, gc=False):
    """What a device sends: `kind` is `telemetry` or `heartbeat`, `key` the same for each try of it."""

    device_id: str
    token: str
    kind: str
    body: bytes
    key: str


class Character(msgspec.Struct, frozen=True, gc=False):
    """What makes a device itself: its own chance, the same at every reading."""

    seed: int
    number: int

    def between(self, low: float, high: float, *, channel: int) -> float:
        """A trait of this device, for ever the same."""
        return low + (high - low) * chance(self.seed, self.number, channel << 40)

    def drift(self, at_s: float, *, period_s: float, channel: int) -> float:
        """From -1 to 1, moving smoothly: another value every `period_s`."""
        step, part = divmod(at_s / period_s, 1.0)
        key = (channel << 40) + int(step)
        before, after = chance(self.seed, self.number, key), chance(self.seed, self.number, key + 1)
        return 2 * (before + (after - before) * part * part * (3 - 2 * part)) - 1

    def noise(self, at_s: float, *, channel: int) -> float:
        """From -1 to 1, another value every millisecond."""
        return 2 * chance(self.seed, self.number, (channel << 44) + int(at_s * 1000)) - 1


COMMANDS, DELTA = "commands", "shadow/update/delta"
"""What a device that takes part in more than telemetry listens to."""


def reply(topic: str, body: bytes) -> list[tuple[str, bytes]]:
    """What an obedient device says to what it hears, as kinds and payloads: it does what it is told, and succeeds."""
    heard = msgspec.json.decode(body)
    if topic == DELTA:
        return [("shadow/reported", msgspec.json.encode({"state": {"reported": heard["state"]}}))]
    told = {"commandId": heard["commandId"]}
    return [
        ("commands/ack", msgspec.json.encode(told | {"state": "acknowledged"})),
        ("commands/ack", msgspec.json.encode(told | {"state": "succeeded"})),
    ]


def kind_of(number: int) -> str:
    """Thermostat, meter or door."""
    return KINDS[number % len(KINDS)]


def chance(seed: int, first: int, second: int) -> float:
    """A number in [0, 1) that looks random and is the same for the same arguments (splitmix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + first * 0xD1B54A32D192ED03 + second * 0xA0761D6478BD642F) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)


def _daylight(at_s: float) -> float:
    """0 at midnight UTC, 1 at noon."""
    return 0.5 - 0.5 * math.cos(2 * math.pi * (at_s % DAY_S) / DAY_S)


def _thermostat(device: Character, at_s: float) -> Metrics:
    comfort = _daylight(at_s) > 0.25
    set_point = round(device.between(19.0, 22.5, channel=1) * 2) / 2 - (0 if comfort else 2.5)
    drift = 1.2 * device.drift(at_s, period_s=900, channel=2) + 0.05 * device.noise(at_s, channel=3)
    temperature = set_point + 0.6 * (_daylight(at_s) - 0.5) + drift
    return {
        "temperature": round(temperature, 2),
        "set_point": set_point,
        "humidity": round(device.between(35, 55, channel=4) + 6 * device.drift(at_s, period_s=3600, channel=5), 1),
        "heating": temperature < set_point,
        "mode": "comfort" if comfort else "eco",
    }


def _meter(device: Character, at_s: float) -> Metrics:
    mean_w = device.between(250, 4000, channel=1)
    swing = 0.55 + 0.9 * _daylight(at_s) + 0.35 * device.drift(at_s, period_s=300, channel=2)
    power_w = mean_w * swing * (1 + 0.01 * device.noise(at_s, channel=3))
    voltage = 230 + 4 * device.drift(at_s, period_s=600, channel=4) + 0.2 * device.noise(at_s, channel=5)
    return {
        "voltage": round(voltage, 1),
        "power_w": round(power_w, 1),
        "current_a": round(power_w / voltage, 3),
        "energy_kwh": round(mean_w * max(0.0, at_s - INSTALLED_S) / 3_600_000, 3),
        "relay_closed": True,
        "tariff": "day" if _daylight(at_s) > 0.3 else "night",
    }


def _door(device: Character, at_s: float) -> Metrics:
    visit_s = device.between(120, 900, channel=1)
    visit, part = divmod(at_s / visit_s, 1.0)
    battery_used = (at_s / BATTERY_S + device.between(0, 1, channel=2)) % 1.0
    is_open = part < 0.1 and chance(device.seed, device.number, int(visit)) < 0.1 + 0.8 * _daylight(at_s)
    return {
        "open": is_open,
        "state": "open" if is_open else "closed",
        "openings": max(0, int(visit - INSTALLED_S // visit_s)),
        "battery_v": round(3.6 - 0.6 * battery_used, 3),
        "rssi_dbm": round(-60 + 12 * device.drift(at_s, period_s=120, channel=3)),
    }


READINGS: dict[str, Callable[[Character, float], Metrics]] = {
    "thermostat": _thermostat,
    "meter": _meter,
    "door": _door,
}
