"""`/devices/{tenant}/{device}/commands`: tell a device to do something, see what became of it, call it off."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Request, Response

from pulse.domain.command import Command
from pulse.domain.command_documents import document, moves_document
from pulse.domain.command_requests import Asked, new_command
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.domain.json_text import read_json
from pulse.services.control import Reach
from pulse.ui.parameters import DeviceId, TenantId
from pulse.ui.render import page, query
from pulse.ui.security import Form, read_form, redirect
from pulse.ui.sessions import TheConsole, TheVisitor

CommandId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]

router = APIRouter(prefix="/devices/{tenant_id}/{device_id}/commands")
_anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


@router.post("")
async def send(
    *, request: Request, console: TheConsole, visitor: TheVisitor, tenant_id: TenantId, device_id: DeviceId
) -> Response:
    """Send one; a form that is sent twice sends one command."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    try:
        asked = Asked(form["name"], _payload(form), _seconds(form), None, form["once"] or None)
        new = new_command(asked, tenant_id=tenant_id, device_id=device_id, ordered=False, bounds=console.command)
        reach = visitor.caller.changing(
            tenant_id, "command.create", device_id, name=new.name, idempotency_key=new.idempotency_key
        )
        made, _ = await reach.commands.create(new, who=visitor.key.name, at_ms=console.control.now_ms())
    except Refusal as refusal:
        if refusal.reason in (Reason.FORBIDDEN, Reason.NOT_FOUND):
            raise
        values = {name: form.raw(name) for name in ("name", "payload", "ttl_s", "once")}
        return page(
            request,
            "command_send.html",
            status=409 if refusal.reason is Reason.CONFLICT else 422,
            visitor=visitor,
            name="devices",
            tenant_id=tenant_id,
            device_id=device_id,
            refusal=refusal,
            ttl_s_max=console.command.command_ttl_s_max,
            values=values,
        )
    return redirect(f"/devices/{tenant_id}/{device_id}{query({}, done=f'{made.name} is on its way')}#commands")


@router.get("/{command_id}")
async def show(
    request: Request, visitor: TheVisitor, tenant_id: TenantId, device_id: DeviceId, command_id: CommandId
) -> Response:
    """One command whole, and which states it came into."""
    reach = visitor.caller.reading(tenant_id)
    command = await _command_of(reach, tenant_id, device_id, command_id)
    return page(
        request,
        "command.html",
        visitor=visitor,
        name="devices",
        tenant_id=tenant_id,
        command=document(command),
        final=command.state.final,
        moves=moves_document(await reach.commands.moves(tenant_id, command_id)),
    )


@router.post("/{command_id}/cancel")
async def cancel(
    *,
    request: Request,
    console: TheConsole,
    visitor: TheVisitor,
    tenant_id: TenantId,
    device_id: DeviceId,
    command_id: CommandId,
) -> Response:
    """End one that has not ended."""
    await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    await _command_of(visitor.caller.reading(tenant_id), tenant_id, device_id, command_id)
    reach = visitor.caller.changing(tenant_id, "command.cancel", command_id)
    ended = await reach.commands.cancel(tenant_id, command_id, who=visitor.key.name, at_ms=console.control.now_ms())
    return redirect(f"/devices/{tenant_id}/{device_id}{query({}, done=f'{ended.name} is cancelled')}#commands")


async def _command_of(reach: Reach, tenant_id: str, device_id: str, command_id: str) -> Command:
    command = await reach.commands.command(tenant_id, command_id)
    if command.device_id != device_id:
        raise Refusal(Reason.NOT_FOUND, f"{device_id} has no command {command_id}")
    return command


def _payload(form: Form) -> object:
    """Any JSON; nothing is an empty object."""
    try:
        return read_json(_anything, form["payload"].encode() or b"{}")
    except Refusal as refusal:
        raise Refusal(refusal.reason, refusal.message, field="payload", position=refusal.position) from refusal


def _seconds(form: Form) -> float | None:
    """None where nothing is said. A number that is none at all, or is not finite, is refused."""
    try:
        return float(form["ttl_s"]) if form["ttl_s"] else None
    except ValueError as error:
        raise Refusal(Reason.INVALID_REQUEST, "is no number of seconds", field="ttl_s") from error
