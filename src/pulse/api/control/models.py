"""The bodies of the control API: what a sender may say, and what the answers look like.

A request is checked strictly and may name nothing that is not here; ids, names and attributes are checked by `domain`,
of which the OpenAPI document tells by `json_schema_extra`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from pulse.domain.identity import ID_PATTERN
from pulse.domain.labels import (
    ATTRIBUTE_LENGTH_MAX,
    ATTRIBUTE_NAME_LENGTH_MAX,
    ATTRIBUTES_MAX,
    NAME_LENGTH_MAX,
)
from pulse.domain.limits import BURST_MAX, PER_S_MAX, PER_S_MIN
from pulse.domain.presence import Presence

OVERLAP_S_DEFAULT = 86_400
OVERLAP_S_MAX = 30 * 86_400
KEY_LIFE_S_MAX = 10 * 366 * 86_400

Id = Annotated[str, Field(pattern=f"^{ID_PATTERN}$", examples=["acme"])]
TEXT_PATTERN = r"^[^\u0000-\u001f\u007f-\u009f]*$"
"""Of what `domain.labels` takes as a text."""
_TEXT: dict[str, JsonValue] = {"type": "string", "maxLength": ATTRIBUTE_LENGTH_MAX, "pattern": TEXT_PATTERN}
_INTEGER: dict[str, JsonValue] = {"type": "integer", "format": "int64"}
_FRACTION: dict[str, JsonValue] = {"type": "number", "not": {"type": "integer"}}
_VALUES: list[JsonValue] = [_TEXT, _INTEGER, _FRACTION, {"type": "boolean"}]
_NAMES: dict[str, JsonValue] = {"minLength": 1, "maxLength": ATTRIBUTE_NAME_LENGTH_MAX, "pattern": TEXT_PATTERN}


def _attributes(*values: JsonValue) -> dict[str, JsonValue]:
    """What the OpenAPI document says of attributes that have such values."""
    return {
        "maxProperties": ATTRIBUTES_MAX,
        "propertyNames": _NAMES,
        "additionalProperties": {"anyOf": [*_VALUES, *values]},
    }


def _whole(value: object) -> object:
    """JSON has one kind of number: 401.0 is a whole one too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Name = Annotated[str, Field(max_length=NAME_LENGTH_MAX, json_schema_extra={"pattern": TEXT_PATTERN})]
Attributes = dict[str, Any]
NewAttributes = Annotated[Attributes, Field(json_schema_extra=_attributes())]
PatchedAttributes = Annotated[Attributes, Field(json_schema_extra=_attributes({"type": "null"}))]
WHOLE = BeforeValidator(_whole)
"""Beside an int and its bounds, which it has to follow: the document would lose them."""


class Request(BaseModel):
    """A body that somebody sends."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Answer(BaseModel):
    """A body that we send."""

    model_config = ConfigDict(frozen=True)


class NewTenant(Request):
    """A tenant to be made."""

    tenant_id: Id
    name: Name = ""


class NewRate(Request):
    """So many messages a second in the long run (0: no limit), and so many at once."""

    per_s: Annotated[
        float, Field(ge=0, le=PER_S_MAX, json_schema_extra={"anyOf": [{"const": 0}, {"minimum": PER_S_MIN}]})
    ]
    burst: Annotated[int, Field(ge=1, le=BURST_MAX), WHOLE]


class NewLimits(Request):
    """Limits of a tenant's own, all its devices together and each of them; what is null is as the settings say."""

    messages: NewRate | None = None
    device_messages: NewRate | None = None


class Rate(Answer):
    """So many messages a second in the long run (0: no limit), and so many at once."""

    per_s: float
    burst: int


class Limits(Answer):
    """A tenant's own limits; the settings hold for what is null."""

    messages: Rate | None
    device_messages: Rate | None


class Tenant(Answer):
    """A tenant; the devices of one that is not enabled cannot speak."""

    tenant_id: str
    name: str
    enabled: bool
    limits: Limits
    created_at: datetime
    updated_at: datetime


class TenantChanged(Answer):
    """A tenant after a change; `projected` is false where the edge will learn of it a little later."""

    tenant: Tenant
    projected: bool


class TenantWithCount(Answer):
    """A tenant, and how many devices it has."""

    tenant: Tenant
    devices: int


class TenantPage(Answer):
    """Tenants by id; `next` is the `after` of the next page, null where there is none."""

    tenants: list[Tenant]
    next: str | None


class NewDevice(Request):
    """A device to be made; an attribute is a text, a number or a boolean."""

    device_id: Id
    name: Name = ""
    attributes: NewAttributes = {}


class DevicePatch(Request):
    """What is to change: `attributes` are merged into those that are there, and null removes one (RFC 7396)."""

    name: Name | None = None
    attributes: PatchedAttributes = {}


class Rotation(Request):
    """How long the old tokens stay valid, in seconds; 0 ends them at once, as a leaked one must."""

    overlap_s: Annotated[int, Field(ge=0, le=OVERLAP_S_MAX), WHOLE] = OVERLAP_S_DEFAULT


class Token(Answer):
    """When a token was made, and when it ends, if it does; never the token itself."""

    created_at: datetime
    expires_at: datetime | None


class Device(Answer):
    """A device; `tokens` only where one device is asked for. `last_seen` is null where it never spoke."""

    tenant_id: str
    device_id: str
    name: str
    enabled: bool
    attributes: Attributes
    created_at: datetime
    updated_at: datetime
    last_seen: datetime | None
    presence: Presence
    tokens: list[Token] = []


class DeviceChanged(Answer):
    """A device after a change; `projected` is false where the edge will learn of it a little later."""

    device: Device
    projected: bool


class DeviceWithToken(DeviceChanged):
    """A device with a new token, which cannot be read again."""

    token: str


class DevicePage(Answer):
    """Devices by id; `next` is the `after` of the next page, null where there is none."""

    devices: list[Device]
    next: str | None


class NewKey(Request):
    """A key to be made: an operator's where `tenant_id` is absent."""

    name: Annotated[str, Field(min_length=1, max_length=NAME_LENGTH_MAX, json_schema_extra={"pattern": TEXT_PATTERN})]
    tenant_id: Id | None = None
    read_only: bool = False
    expires_in_s: Annotated[int, Field(ge=1, le=KEY_LIFE_S_MAX), WHOLE] | None = None


class Key(Answer):
    """An API key; `tenant_id` null is an operator's. `last_used_at` is right to a minute."""

    key_id: int
    name: str
    tenant_id: str | None
    read_only: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class KeyWithSecret(Answer):
    """A new key with its secret, which cannot be read again."""

    key: Key
    secret: str


class KeyPage(Answer):
    """Keys by id."""

    keys: list[Key]
    next: int | None


class Change(Answer):
    """A change that was made: by whom (`key_id` null: the command line), what, when."""

    id: int
    at: datetime
    key_id: int | None
    actor: str
    action: str
    tenant_id: str | None
    target: str
    details: dict[str, Any]


class ChangePage(Answer):
    """Changes, the newest first; `next` is the `before` of the next page."""

    changes: list[Change]
    next: int | None


class ImportResult(Answer):
    """One line of an import's answer, for one row of the table; the last line is `{"summary": {…}}` instead."""

    row: int
    device_id: str
    status: str
    token: str | None = None
    reason: str | None = None
    detail: str | None = None
    field: str | None = None


class ProblemBody(Answer):
    """An error, as application/problem+json (RFC 9457); what does not apply is absent."""

    status: int
    title: str
    detail: str
    reason: str = ""
    field: str = ""
    position: int | None = None
    limit: str = ""
    limit_value: float | None = None
    version: int | None = None
