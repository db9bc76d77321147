"""`/devices`: find devices, add one, import many."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pulse.domain.device_csv import parse_devices
from pulse.domain.device_search import TEXT_LENGTH_MAX, DeviceSearch
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import NewDevice
from pulse.domain.labels import check_name
from pulse.domain.presence import Presence
from pulse.domain.registry import device_key, tenant_key
from pulse.services.console import Console, Visitor
from pulse.ui.parameters import OptionalId
from pulse.ui.render import page
from pulse.ui.security import read_form
from pulse.ui.sessions import TheConsole, TheVisitor

PAGE = 50
IMPORT_PART = 500
EXAMPLE_METRICS = {"temperature": 21.5}

router = APIRouter(prefix="/devices")


@router.get("")
async def list_devices(
    *,
    request: Request,
    visitor: TheVisitor,
    text: Annotated[str, Query(max_length=TEXT_LENGTH_MAX)] = "",
    tenant: OptionalId = "",
    presence: str = "",
    enabled: Annotated[str, Query(pattern="^(yes|no)?$")] = "",
    after_tenant: OptionalId = "",
    after: OptionalId = "",
) -> Response:
    """Those that match, a page at a time."""
    wanted = DeviceSearch(
        tenant_id=tenant or visitor.key.tenant_id,
        text=text.strip(),
        enabled={"yes": True, "no": False}.get(enabled),
        presence=Presence(presence) if presence in set(Presence) else None,
    )
    found = await visitor.desk().search.search(wanted, after=(after_tenant, after), limit=PAGE + 1)
    return page(
        request,
        "devices.html",
        visitor=visitor,
        name="devices",
        devices=found[:PAGE],
        last=found[PAGE - 1] if len(found) > PAGE else None,
        filters={"text": text, "tenant": tenant, "presence": presence, "enabled": enabled},
        paged=bool(after),
    )


@router.get("/add")
async def ask(request: Request, visitor: TheVisitor, tenant: OptionalId = "") -> Response:
    """The form for a new device."""
    return await _form(request, visitor, {"tenant_id": tenant, "device_id": "", "name": ""})


@router.post("/add")
async def add(request: Request, console: TheConsole, visitor: TheVisitor) -> Response:
    """Make a device, and show its token this once."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    values = {name: form[name] for name in ("tenant_id", "device_id", "name")}
    try:
        device = NewDevice(device_id=values["device_id"], name=check_name(values["name"]))
        reach = visitor.caller.changing(values["tenant_id"], "device.create", values["device_id"])
        token = (await reach.identities.add_devices(values["tenant_id"], [device]))[device.device_id]
    except Refusal as refusal:
        return await _form(request, visitor, values, refusal=refusal)
    keys = [tenant_key(values["tenant_id"]), device_key(values["tenant_id"], device.device_id)]
    projected = await console.control.tell_edge(keys)
    return show_token(
        request,
        console,
        visitor,
        tenant_id=values["tenant_id"],
        device_id=device.device_id,
        token=token,
        projected=projected,
    )


@router.get("/import")
async def ask_import(request: Request, console: TheConsole, visitor: TheVisitor, tenant: OptionalId = "") -> Response:
    """The form for a table."""
    return await _import_form(request, console, visitor, tenant, "")


@router.post("/import")
async def import_devices(request: Request, console: TheConsole, visitor: TheVisitor) -> Response:
    """Make a device of each row that is none yet; the tokens are shown this once."""
    # As a form every byte of the table may become three.
    form = await read_form(
        request,
        visitor.signed_in.secret,
        origin=request.app.state.origin,
        bytes_max=3 * console.import_bytes_max,
    )
    tenant_id, table = form["tenant_id"], form.raw("table")
    try:
        visitor.caller.changing(tenant_id, "device.import")
        rows = parse_devices(table.encode(), rows_max=console.import_rows_max)
        tokens: dict[str, str] = {}
        for start in range(0, len(rows), IMPORT_PART):
            devices = [row.outcome for row in rows[start : start + IMPORT_PART] if isinstance(row.outcome, NewDevice)]
            if not devices:
                continue
            reach = visitor.caller.changing(tenant_id, "device.import", devices[0].device_id, rows=len(devices))
            made = await reach.identities.add_missing_devices(tenant_id, devices)
            tokens |= made
            await console.control.tell_edge(
                [tenant_key(tenant_id), *(device_key(tenant_id, device_id) for device_id in made)]
            )
    except Refusal as refusal:
        return await _import_form(request, console, visitor, tenant_id, table, refusal=refusal)
    results = [
        (row, tokens.get(row.device_id, ""), row.outcome.message if isinstance(row.outcome, Refusal) else "")
        for row in rows
    ]
    return page(
        request, "device_imported.html", visitor=visitor, name="devices", tenant_id=tenant_id, results=results,
        made=len(tokens),
    )  # fmt: skip


def show_token(
    request: Request,
    console: Console,
    visitor: Visitor,
    *,
    tenant_id: str,
    device_id: str,
    token: str,
    projected: bool,
) -> Response:
    """The token, which is kept nowhere, and how to send with it at once."""
    body = json.dumps({"metrics": EXAMPLE_METRICS}, separators=(",", ":"))
    url = f"{console.gateway_url}/ingest/v1/tenant/{tenant_id}/device/{device_id}/telemetry"
    curl = (
        f"curl -i {shlex.quote(url)} \\\n  -H 'Authorization: Bearer {token}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )
    host, _, port = console.mqtt_url.partition("://")[2].rpartition(":")
    mosquitto = (
        f"mosquitto_pub -h {shlex.quote(host)} -p {port} -q 1 -i {tenant_id}/{device_id} \\\n"
        f"  -u {tenant_id}/{device_id} -P {token} \\\n"
        f"  -t tenant/{tenant_id}/device/{device_id}/telemetry -m '{body}'"
    )
    return page(
        request,
        "device_token.html",
        visitor=visitor,
        name="devices",
        tenant_id=tenant_id,
        device_id=device_id,
        token=token,
        curl=curl,
        mosquitto=mosquitto,
        projected=projected,
    )


async def tenants_of(visitor: Visitor) -> list[str]:
    """The tenants that a form offers: the visitor's own, or the first thousand."""
    if visitor.key.tenant_id is not None:
        return [visitor.key.tenant_id]
    return [each.tenant_id for each in await visitor.caller.reading_own().identities.tenants(limit=1000)]


async def _form(
    request: Request, visitor: Visitor, values: dict[str, str], *, refusal: Refusal | None = None
) -> Response:
    return page(
        request,
        "device_add.html",
        status=_status(refusal),
        visitor=visitor,
        name="devices",
        values=values,
        refusal=refusal,
        tenants=await tenants_of(visitor),
    )


async def _import_form(
    request: Request,
    console: Console,
    visitor: Visitor,
    tenant_id: str,
    table: str,
    *,
    refusal: Refusal | None = None,
) -> Response:
    return page(
        request,
        "device_import.html",
        status=_status(refusal),
        visitor=visitor,
        name="devices",
        tenant_id=tenant_id,
        table=table,
        refusal=refusal,
        tenants=await tenants_of(visitor),
        rows_max=console.import_rows_max,
    )


def _status(refusal: Refusal | None) -> int:
    if refusal is None:
        return 200
    return {Reason.FORBIDDEN: 403, Reason.CONFLICT: 409, Reason.NOT_FOUND: 404}.get(refusal.reason, 422)
