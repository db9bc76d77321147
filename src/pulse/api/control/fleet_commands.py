"""`/tenants/{tenant_id}/fleet-commands`: one request, a command for each of many devices, and how far they are."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from pulse.api.control import command_models as models
from pulse.api.control.commands import MADE_BEFORE, Before, Key, named_as_here
from pulse.api.control.parameters import Limit, TenantId, TheBounds, TheCaller, TheControl
from pulse.domain.command_documents import cursor, fleet_document, read_cursor
from pulse.domain.command_requests import Asked, new_fleet
from pulse.domain.fleet import Filter
from pulse.domain.identity import ID_PATTERN

router = APIRouter(prefix="/tenants/{tenant_id}/fleet-commands", tags=["fleet commands"])

FleetId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]


@router.post("", response_model=models.FleetCommand, status_code=201, responses=MADE_BEFORE)
async def send_fleet_command(
    *,
    caller: TheCaller,
    control: TheControl,
    bounds: TheBounds,
    tenant_id: TenantId,
    body: models.NewFleetCommand,
    response: Response,
    idempotency_key: Key = None,
) -> dict[str, Any]:
    """Tell many devices to do something; their commands are made in the background, which `devices` counts."""
    wanted = body.filter.model_dump(exclude_unset=True)
    reach = caller.changing(
        tenant_id, "fleet_command.create", body.name, filter=wanted, idempotency_key=idempotency_key
    )
    asked = Asked(body.name, body.payload, body.ttl_s, body.timeout_s, idempotency_key)
    chosen = Filter(**{**wanted, "devices": tuple(body.filter.devices)})
    new = new_fleet(asked, tenant_id=tenant_id, wanted=chosen, bounds=bounds.command)
    await caller.reading(tenant_id).identities.tenant(tenant_id)
    with named_as_here():
        made, is_new = await reach.commands.create_fleet(new, who=caller.key.name, at_ms=control.now_ms())
    response.status_code = 201 if is_new else 200
    return fleet_document(made)


@router.get("", response_model=models.FleetCommandPage)
async def list_fleet_commands(
    caller: TheCaller, tenant_id: TenantId, before: Before = None, limit: Limit = 100
) -> dict[str, object]:
    """The tenant's fleet commands, the newest first."""
    reach = caller.reading(tenant_id)
    await reach.identities.tenant(tenant_id)
    page = await reach.commands.fleets(tenant_id, before=read_cursor(before), limit=limit + 1)
    last = page[limit - 1] if len(page) > limit else None
    return {
        "fleet_commands": [fleet_document(fleet) for fleet in page[:limit]],
        "next": cursor(last.created_ms, last.fleet_id) if last else None,
    }


@router.get("/{fleet_id}", response_model=models.FleetCommand)
async def show_fleet_command(caller: TheCaller, tenant_id: TenantId, fleet_id: FleetId) -> dict[str, Any]:
    """The fleet command, and how many of its commands are in each state."""
    return fleet_document(await caller.reading(tenant_id).commands.fleet(tenant_id, fleet_id))


@router.post("/{fleet_id}/cancel", response_model=models.FleetCommand)
async def cancel_fleet_command(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, fleet_id: FleetId
) -> dict[str, Any]:
    """Make no more of its commands, and end those that have not ended."""
    commands = caller.changing(tenant_id, "fleet_command.cancel", fleet_id).commands
    return fleet_document(await commands.cancel_fleet(tenant_id, fleet_id, who=caller.key.name, at_ms=control.now_ms()))
