"""`/tenants/{tenant_id}/devices/{device_id}/shadow`: read it, say what is desired, see who changed it, delete it.

A device's unnamed shadow, or the one that `?name=` names. `ETag` is the version; a change with `If-Match` is made at
that version alone, else it is answered 409 with the version that there is. What the device hears of a change is
committed with it, and told now or when the device is back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from msgspec import UNSET
from pydantic import Field

from pulse.api.control import models
from pulse.api.control.parameters import DeviceId, TenantId, TheBounds, TheCaller, TheControl
from pulse.domain.command_documents import instant
from pulse.domain.errors import Reason, Refusal, VersionConflict
from pulse.domain.identity import ID_PATTERN
from pulse.domain.shadow import Sections, Shadow, ShadowKey, Update, check_update
from pulse.domain.shadow_documents import document
from pulse.domain.shadow_requests import Changed, change, removal

router = APIRouter(prefix="/tenants/{tenant_id}/devices/{device_id}", tags=["shadows"])

Name = Annotated[str, Query(pattern=f"^({ID_PATTERN})?$", description="A named shadow; default: the unnamed one.")]
IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        pattern='^("[0-9]{1,18}"|[0-9]{1,18})$',
        description="The version that the shadow must have, as `ETag` told it; 0 where there must never have been one.",
        examples=['"7"'],
    ),
]
ETAG = {"ETag": {"description": "The version, in quotes.", "schema": {"type": "string", "pattern": '^"[0-9]+"$'}}}
WITH_ETAG: dict[int | str, dict[str, Any]] = {200: {"headers": ETAG}}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {
        "description": "The shadow is at another version: `version`",
        "content": {"application/problem+json": {"schema": models.ProblemBody.model_json_schema()}},
    }
}


class DesiredPatch(models.Request):
    """A JSON Merge Patch (RFC 7396) of what is desired: null deletes, and null for all of it empties it."""

    desired: Annotated[dict[str, Any] | None, Field(examples=[{"power": "on", "colour": None}])]


class ShadowDocument(models.Answer):
    """A shadow: its sections and what is left to do (`delta`), and when each attribute was last set.

    `metadata` mirrors the sections. Times are in ms since the epoch.
    """

    state: dict[str, dict[str, Any]]
    metadata: dict[str, dict[str, Any]]
    version: int
    timestamp: int


class ShadowNames(models.Answer):
    """The names of a device's shadows; the unnamed one has an empty name."""

    names: list[str]


class ShadowChange(models.Answer):
    """What made a version: who asked for it (`device`, or whose key it was), and for what; null is its deletion."""

    version: int
    at: datetime
    who: str
    patch: dict[str, Any] | None


class ShadowChanges(models.Answer):
    """The last changes, newest first."""

    changes: list[ShadowChange]


@router.get("/shadows", response_model=ShadowNames)
async def list_shadows(caller: TheCaller, tenant_id: TenantId, device_id: DeviceId) -> dict[str, object]:
    """The names of the shadows that the device has."""
    reach = caller.reading(tenant_id)
    await reach.identities.device(tenant_id, device_id)
    return {"names": await reach.shadows.names(tenant_id, device_id)}


@router.get("/shadow", response_model=ShadowDocument, responses=WITH_ETAG)
async def show_shadow(
    caller: TheCaller, tenant_id: TenantId, device_id: DeviceId, response: Response, name: Name = ""
) -> dict[str, Any]:
    """The shadow, with its version as ETag."""
    reach = caller.reading(tenant_id)
    await reach.identities.device(tenant_id, device_id)
    shadow = await reach.shadows.shadow(ShadowKey(tenant_id, device_id, name))
    if not shadow.exists:
        raise Refusal(Reason.NOT_FOUND, "there is no such shadow", field="name" if name else "")
    return _answer(shadow, response)


@router.patch("/shadow", response_model=ShadowDocument, responses=WITH_ETAG | CONFLICT)
async def change_shadow(
    *,
    caller: TheCaller,
    control: TheControl,
    bounds: TheBounds,
    tenant_id: TenantId,
    device_id: DeviceId,
    body: DesiredPatch,
    response: Response,
    name: Name = "",
    if_match: IfMatch = None,
) -> dict[str, Any]:
    """Patch what is desired; the device hears what is left to do, now or when it is back."""
    version = _version(if_match)
    key = ShadowKey(tenant_id, device_id, name)
    reach = caller.changing(tenant_id, "shadow.change", device_id, name=name, desired=body.desired)
    with _named_as_here():
        update = check_update(Update(Sections(desired=body.desired), version=UNSET if version is None else version))
        await caller.reading(tenant_id).identities.device(tenant_id, device_id)

        def decide(shadow: Shadow) -> Changed:
            return change(key, shadow, update, at_ms=control.now_ms(), who=caller.key.name, bounds=bounds.shadow)

        changed = await reach.shadows.change(key, decide)
    return _answer(changed.shadow, response)


@router.delete("/shadow", status_code=204, responses=CONFLICT)
async def delete_shadow(
    *,
    caller: TheCaller,
    control: TheControl,
    tenant_id: TenantId,
    device_id: DeviceId,
    name: Name = "",
    if_match: IfMatch = None,
) -> None:
    """Delete the shadow; one that is made later goes on counting its versions."""
    version = _version(if_match)
    key = ShadowKey(tenant_id, device_id, name)
    reach = caller.changing(tenant_id, "shadow.delete", device_id, name=name)
    await caller.reading(tenant_id).identities.device(tenant_id, device_id)

    def decide(shadow: Shadow) -> Changed:
        return removal(key, shadow, at_ms=control.now_ms(), who=caller.key.name, version=version)

    with _named_as_here():
        await reach.shadows.change(key, decide)


@router.get("/shadow/changes", response_model=ShadowChanges)
async def list_changes(
    caller: TheCaller, tenant_id: TenantId, device_id: DeviceId, name: Name = ""
) -> dict[str, object]:
    """The last changes, by whomever: as many as are kept of each shadow."""
    reach = caller.reading(tenant_id)
    await reach.identities.device(tenant_id, device_id)
    changes = await reach.shadows.changes(ShadowKey(tenant_id, device_id, name))
    return {
        "changes": [
            {"version": each.version, "at": instant(each.at_ms), "who": each.who, "patch": each.patch}
            for each in reversed(changes)
        ]
    }


@contextmanager
def _named_as_here() -> Iterator[None]:
    """What is refused within is named as this API has it: a header for the version, no `state` around `desired`."""
    try:
        yield
    except Refusal as refusal:
        refusal.field = "If-Match" if isinstance(refusal, VersionConflict) else refusal.field.removeprefix("state.")
        raise


def _version(if_match: str | None) -> int | None:
    return None if if_match is None else int(if_match.strip('"'))


def _answer(shadow: Shadow, response: Response) -> dict[str, Any]:
    response.headers["etag"] = f'"{shadow.version}"'
    return document(shadow)
