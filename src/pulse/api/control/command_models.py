"""The bodies about commands: what a sender may ask of one device or of many, and what the answers look like."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from pulse.api.control.models import Answer, Id, Request
from pulse.domain.command import State
from pulse.domain.command_requests import NAME_PATTERN, SECONDS_MIN
from pulse.domain.fleet import ATTRIBUTES_MAX, DEVICES_MAX, Stage
from pulse.domain.labels import ATTRIBUTE_NAME_LENGTH_MAX

AttributeName = Annotated[str, Field(min_length=1, max_length=ATTRIBUTE_NAME_LENGTH_MAX)]
Seconds = Annotated[float, Field(ge=SECONDS_MIN)]


class NewCommand(Request):
    """A command to one device; what is null is as the settings have it.

    `payload` is any JSON. The command is sent for `ttl_s` to a device that does not answer; one that has acknowledged
    it has `timeout_s` for its result. Of the `ordered` ones of a device and name only the oldest open one is sent.
    """

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$", examples=["reboot"])]
    payload: Annotated[Any, Field(default_factory=dict, examples=[{"delay_s": 5}])]
    ttl_s: Seconds | None = None
    timeout_s: Seconds | None = None
    ordered: bool = False


class Wanted(Request):
    """Which devices: `all` of the tenant, or those that everything else that is given holds for.

    `prefix` is how their id begins, `attributes` what their attributes have, at the least.
    """

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": [what]} for what in ("all", "devices", "prefix", "attributes")]}
    )

    all: bool = False
    devices: Annotated[list[Id], Field(default_factory=list, max_length=DEVICES_MAX)]
    prefix: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{0,64}$")] = ""
    attributes: Annotated[
        dict[AttributeName, str | bool | int | float], Field(default_factory=dict, max_length=ATTRIBUTES_MAX)
    ]


class NewFleetCommand(Request):
    """The same command to many devices, as NewCommand has it; never ordered."""

    filter: Annotated[Wanted, Field(examples=[{"attributes": {"site": "north"}}])]
    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$", examples=["reboot"])]
    payload: Annotated[Any, Field(default_factory=dict, examples=[{"delay_s": 5}])]
    ttl_s: Seconds | None = None
    timeout_s: Seconds | None = None


class Command(Answer):
    """A command: `due_at` is when time moves it, `sent_at` when it last left for its device, `sends` how often it has.

    One that is `held` waits for an older ordered one. `created_by` is whose key it was.
    """

    command_id: str
    device_id: str
    fleet_id: str | None
    name: str
    payload: Any
    state: State
    ordered: bool
    held: bool
    created_at: datetime
    created_by: str
    expires_at: datetime
    timeout_s: float
    due_at: datetime | None
    sent_at: datetime | None
    sends: int
    result: Any
    error: str | None


class Move(Answer):
    """A command came into `state`; `who` is `device`, `pulse`, or whose key it was."""

    state: State
    at: datetime
    who: str


class CommandWithMoves(Command):
    """A command, and which states it came into, the first one first."""

    moves: list[Move]


class CommandPage(Answer):
    """Commands, the newest first; `next` is the `before` of the next page, null where there is none."""

    commands: list[Command]
    next: str | None


class FleetCommand(Answer):
    """A command to many devices: `devices` is how many have theirs by now, `counts` how many of them are in each state.

    Its `stage` is `expanding` until every device has its command, then `expanded`; or it was `cancelled`.
    """

    fleet_id: str
    name: str
    payload: Any
    filter: Wanted
    stage: Stage
    devices: int
    counts: dict[State, int]
    created_at: datetime
    created_by: str
    expires_at: datetime
    timeout_s: float


class FleetCommandPage(Answer):
    """Fleet commands, the newest first; `next` is the `before` of the next page, null where there is none."""

    fleet_commands: list[FleetCommand]
    next: str | None
