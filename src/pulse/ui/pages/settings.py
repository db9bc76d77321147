"""`/settings`: tenants, API keys and the log of changes."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pulse.domain.access import in_force
from pulse.domain.errors import Reason, Refusal
from pulse.domain.labels import check_name
from pulse.domain.registry import tenant_key
from pulse.ui.pages.devices import tenants_of
from pulse.ui.parameters import OptionalId
from pulse.ui.render import page
from pulse.ui.security import read_form, redirect
from pulse.ui.sessions import TheConsole, TheOperator, TheVisitor

PAGE = 100
LOG_PAGE = 50
DAYS_MAX = 3660
KEY_ID_DIGITS_MAX = 18

router = APIRouter(prefix="/settings")


@router.get("")
async def tenants(request: Request, visitor: TheVisitor, after: OptionalId = "") -> Response:
    """The tenants that the key reaches."""
    identities = visitor.caller.reading_own().identities
    found = await identities.tenants(after=after, limit=PAGE + 1)
    counts = {each.tenant_id: await identities.device_count(each.tenant_id) for each in found[:PAGE]}
    return page(
        request,
        "settings_tenants.html",
        visitor=visitor,
        name="settings",
        tab="tenants",
        tenants=found[:PAGE],
        counts=counts,
        next=found[PAGE - 1].tenant_id if len(found) > PAGE else None,
    )


@router.post("/tenants")
async def change_tenant(request: Request, console: TheConsole, visitor: TheOperator) -> Response:
    """Make, enable or disable a tenant."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    tenant_id, action = form["tenant_id"], form["action"]
    if action == "create":
        name = check_name(form["name"])
        reach = visitor.caller.changing(tenant_id, "tenant.create", tenant_id, operators_only=True, name=name)
        await reach.identities.add_tenant(tenant_id, name=name)
    elif action in ("enable", "disable"):
        reach = visitor.caller.changing(tenant_id, f"tenant.{action}", tenant_id, operators_only=True)
        await reach.identities.set_tenant_enabled(tenant_id, action == "enable")
    else:
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    await console.control.tell_edge([tenant_key(tenant_id)])
    return redirect("/settings")


@router.get("/keys")
async def keys(
    request: Request,
    console: TheConsole,
    visitor: TheOperator,
    after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> Response:
    """All keys, those that have ended too."""
    return await _keys(request, console, visitor, after=after)


@router.post("/keys")
async def change_key(request: Request, console: TheConsole, visitor: TheOperator) -> Response:
    """Make a key, and show its secret this once; or revoke one."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    if form["action"] == "revoke" and form["key_id"].isdecimal() and len(form["key_id"]) <= KEY_ID_DIGITS_MAX:
        await visitor.caller.changing(None, "key.revoke", form["key_id"]).keys.revoke(int(form["key_id"]))
        return redirect("/settings/keys")
    if form["action"] != "create":
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    tenant_id, read_only = form["tenant_id"] or None, form["read_only"] == "yes"
    days = int(form["days"][:9]) if form["days"].isdecimal() else 0
    expires_at = console.control.clock() + timedelta(days=min(days, DAYS_MAX)) if days else None
    name = check_name(form["name"] or "console")
    reach = visitor.caller.changing(
        tenant_id, "key.create", name, operators_only=True, read_only=read_only, expires_at=expires_at
    )
    made, secret = await reach.keys.add(name=name, tenant_id=tenant_id, read_only=read_only, expires_at=expires_at)
    return await _keys(request, console, visitor, made=made.name, made_secret=secret)


@router.get("/log")
async def log(
    request: Request,
    visitor: TheVisitor,
    tenant: OptionalId = "",
    before: Annotated[int | None, Query(ge=1, le=2**63 - 1)] = None,
) -> Response:
    """Who changed what, the newest first."""
    wanted = tenant or None
    reach = visitor.caller.reading_own() if wanted is None else visitor.caller.reading(wanted)
    found = await reach.changes.changes(tenant_id=wanted, before=before, limit=LOG_PAGE + 1)
    return page(
        request,
        "settings_log.html",
        visitor=visitor,
        name="settings",
        tab="log",
        changes=found[:LOG_PAGE],
        next=found[LOG_PAGE - 1].id if len(found) > LOG_PAGE else None,
        filters={"tenant": tenant},
    )


async def _keys(
    request: Request,
    console: TheConsole,
    visitor: TheOperator,
    *,
    after: int = 0,
    made: str = "",
    made_secret: str = "",
) -> Response:
    found = await visitor.caller.reading(None).keys.keys(after=after, limit=PAGE + 1)
    now = console.control.clock()
    return page(
        request,
        "settings_keys.html",
        visitor=visitor,
        name="settings",
        tab="keys",
        keys=found[:PAGE],
        in_force={each.key_id: in_force(each, now) for each in found},
        next=found[PAGE - 1].key_id if len(found) > PAGE else None,
        tenants=await tenants_of(visitor),
        made=made,
        made_secret=made_secret,
    )
