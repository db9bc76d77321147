"""The bodies of the control API: what a sender may say, and what the answers look like.

A request is checked strictly and may name nothing that is not here; ids, names and attributes are checked by `domain`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pulse.domain.identity import ID_PATTERN
from pulse.domain.labels import NAME_LENGTH_MAX

OVERLAP_S_DEFAULT = 86_400
OVERLAP_S_MAX = 30 * 86_400
KEY_LIFE_S_MAX = 10 * 366 * 86_400

Id = Annotated[str, Field(pattern=f"^{ID_PATTERN}$", examples=["acme"])]
Name = Annotated[str, Field(max_length=NAME_LENGTH_MAX)]
Attributes = dict[str, Any]


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


class Tenant(Answer):
    """A tenant; the devices of one that is not enabled cannot speak."""

    tenant_id: str
    name: str
    enabled: bool
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
    attributes: Attributes = {}


class DevicePatch(Request):
    """What is to change: `attributes` are merged into those that are there, and null removes one (RFC 7396)."""

    name: Name | None = None
    attributes: Attributes = {}


class Rotation(Request):
    """How long the old tokens stay valid, in seconds; 0 ends them at once, as a leaked one must."""

    overlap_s: Annotated[int, Field(ge=0, le=OVERLAP_S_MAX)] = OVERLAP_S_DEFAULT


class Token(Answer):
    """When a token was made, and when it ends, if it does; never the token itself."""

    created_at: datetime
    expires_at: datetime | None


class Device(Answer):
    """A device; `tokens` only where one device is asked for."""

    tenant_id: str
    device_id: str
    name: str
    enabled: bool
    attributes: Attributes
    created_at: datetime
    updated_at: datetime
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

    name: Annotated[str, Field(min_length=1, max_length=NAME_LENGTH_MAX)]
    tenant_id: Id | None = None
    read_only: bool = False
    expires_in_s: Annotated[int, Field(ge=1, le=KEY_LIFE_S_MAX)] | None = None


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
    """An error, as application/problem+json (RFC 9457)."""

    status: int
    title: str
    detail: str
    reason: str = ""
    field: str = ""
