"""Fleet commands: one request, a command for each of many devices."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from pulse.domain.command import State
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN

DEVICES_MAX = 1000
"""Devices that a filter may name one by one."""
ATTRIBUTES_MAX = 16

DeviceId = Annotated[str, Meta(pattern=rf"^{ID_PATTERN}\Z")]
Attribute = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00]*\Z")]
Scalar = str | int | float | bool


class Filter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which devices: `all` of the tenant, or those that everything else that is given holds for.

    `prefix` is how their id begins, `attributes` what their attributes have, at the least.
    """

    all: bool = False
    devices: Annotated[tuple[DeviceId, ...], Meta(max_length=DEVICES_MAX)] = ()
    prefix: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,64}\Z")] = ""
    attributes: Annotated[Mapping[Attribute, Scalar], Meta(max_length=ATTRIBUTES_MAX)] = {}

    def check(self) -> None:
        """Raise Refusal where it names nothing, or all and something besides."""
        narrow = bool(self.devices or self.prefix or self.attributes)
        if self.all and narrow:
            raise Refusal(Reason.INVALID_REQUEST, "all goes with nothing else", field="filter.all")
        if not self.all and not narrow:
            raise Refusal(Reason.INVALID_REQUEST, "one of all, devices, prefix, attributes is needed", field="filter")
        nul = [name for name, value in self.attributes.items() if isinstance(value, str) and "\x00" in value]
        if nul:
            raise Refusal(Reason.INVALID_REQUEST, "no attribute has U+0000", field=f"filter.attributes.{nul[0]}")


class Stage(StrEnum):
    """How far the making of a fleet's commands has come."""

    EXPANDING = "expanding"
    EXPANDED = "expanded"
    CANCELLING = "cancelling"
    """No more are made, and those that are open are being ended."""
    CANCELLED = "cancelled"


class NewFleet(msgspec.Struct, frozen=True, kw_only=True):
    """A command for each device that `filter` holds for; the rest as NewCommand has it."""

    tenant_id: str
    name: str
    payload: bytes
    ttl_ms: int
    timeout_ms: int
    filter: Filter
    idempotency_key: str | None = None


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet command as it stands; times in ms since the epoch.

    `devices` is how many commands were made until now, `counts` how many of them are in each state that one is in.
    """

    tenant_id: str
    fleet_id: str
    name: str
    payload: bytes
    filter: Filter
    stage: Stage
    created_ms: int
    expires_ms: int
    timeout_ms: int
    created_by: str
    devices: int
    counts: Mapping[State, int]


class Lot(NamedTuple):
    """What one transaction has done for a fleet: commands that it made, or ended."""

    made: int
    cancelled: int
