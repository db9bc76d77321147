"""`/tenants/{tenant_id}/devices/{device_id}/commands` and `/tenants/{tenant_id}/commands`: tell devices what to do.

A command is made once under its `Idempotency-Key`, however often the request is repeated. What the device hears is
committed with it, and sent until the device has answered or its time to live is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response

from pulse.api.control import command_models as models
from pulse.api.control.parameters import DeviceId, Limit, TenantId, TheBounds, TheCaller, TheControl
from pulse.domain.command import State
from pulse.domain.command_documents import CURSOR_PATTERN, cursor, document, moves_document, read_cursor
from pulse.domain.command_requests import KEY_PATTERN, Asked, new_command
from pulse.domain.errors import Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.services.control import Reach

router = APIRouter(prefix="/tenants/{tenant_id}", tags=["commands"])

CommandId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=f"^{KEY_PATTERN}$",
        description="Names the request among the tenant's: repeated under the same key it makes nothing more.",
    ),
]
Before = Annotated[str | None, Query(pattern=f"^{CURSOR_PATTERN}$", description="`next` of the page before.")]
OfState = Annotated[State | None, Query(description="Only those in this state.")]
MADE_BEFORE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Made before, under the same Idempotency-Key"},
    409: {"description": "Another request was made under this Idempotency-Key"},
}


@router.post("/devices/{device_id}/commands", response_model=models.Command, status_code=201, responses=MADE_BEFORE)
async def send_command(
    *,
    caller: TheCaller,
    control: TheControl,
    bounds: TheBounds,
    tenant_id: TenantId,
    device_id: DeviceId,
    body: models.NewCommand,
    response: Response,
    idempotency_key: Key = None,
) -> dict[str, Any]:
    """Tell a device to do something, now or when it is back."""
    reach = caller.changing(tenant_id, "command.create", device_id, name=body.name, idempotency_key=idempotency_key)
    asked = Asked(body.name, body.payload, body.ttl_s, body.timeout_s, idempotency_key)
    new = new_command(asked, tenant_id=tenant_id, device_id=device_id, ordered=body.ordered, bounds=bounds.command)
    with named_as_here():
        made, is_new = await reach.commands.create(new, who=caller.key.name, at_ms=control.now_ms())
    response.status_code = 201 if is_new else 200
    return document(made)


@router.get("/devices/{device_id}/commands", response_model=models.CommandPage)
async def list_commands_of_device(
    *,
    caller: TheCaller,
    tenant_id: TenantId,
    device_id: DeviceId,
    state: OfState = None,
    before: Before = None,
    limit: Limit = 100,
) -> dict[str, object]:
    """The commands of a device, the newest first."""
    reach = caller.reading(tenant_id)
    await reach.identities.device(tenant_id, device_id)
    return await _page(reach, tenant_id, before, limit, device_id=device_id, state=state)


@router.get("/commands", response_model=models.CommandPage)
async def list_commands(
    *,
    caller: TheCaller,
    tenant_id: TenantId,
    device_id: Annotated[str | None, Query(pattern=f"^{ID_PATTERN}$", description="Only this device's.")] = None,
    state: OfState = None,
    fleet_id: Annotated[str | None, Query(pattern=f"^{ID_PATTERN}$", description="Only of this fleet command.")] = None,
    before: Before = None,
    limit: Limit = 100,
) -> dict[str, object]:
    """The commands of all devices of the tenant, the newest first."""
    reach = caller.reading(tenant_id)
    await reach.identities.tenant(tenant_id)
    return await _page(reach, tenant_id, before, limit, device_id=device_id, state=state, fleet_id=fleet_id)


@router.get("/commands/{command_id}", response_model=models.CommandWithMoves)
async def show_command(caller: TheCaller, tenant_id: TenantId, command_id: CommandId) -> dict[str, Any]:
    """The command, and which states it came into, when, and by whom."""
    commands = caller.reading(tenant_id).commands
    command = await commands.command(tenant_id, command_id)
    return {**document(command), "moves": moves_document(await commands.moves(tenant_id, command_id))}


@router.post("/commands/{command_id}/cancel", response_model=models.Command)
async def cancel_command(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, command_id: CommandId
) -> dict[str, Any]:
    """End a command that has not ended: it is sent no more, and what its device still says of it moves nothing."""
    commands = caller.changing(tenant_id, "command.cancel", command_id).commands
    return document(await commands.cancel(tenant_id, command_id, who=caller.key.name, at_ms=control.now_ms()))


@contextmanager
def named_as_here() -> Iterator[None]:
    """What is wrong with the key is named as it came, by its header."""
    try:
        yield
    except Refusal as refusal:
        if refusal.field == "idempotency_key":
            refusal.field = "Idempotency-Key"
        raise


async def _page(
    reach: Reach,
    tenant_id: str,
    before: str | None,
    limit: int,
    *,
    device_id: str | None = None,
    state: State | None = None,
    fleet_id: str | None = None,
) -> dict[str, object]:
    page = await reach.commands.commands(
        tenant_id, device_id=device_id, state=state, fleet_id=fleet_id, before=read_cursor(before), limit=limit + 1
    )
    last = page[limit - 1] if len(page) > limit else None
    return {
        "commands": [document(command) for command in page[:limit]],
        "next": cursor(last.created_ms, last.command_id) if last else None,
    }
