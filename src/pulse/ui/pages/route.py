"""`/routes/{tenant}/{route}`: one route, how its destination takes it, its attempts; switch, test, rotate, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.registry import route_key
from pulse.domain.route_requests import with_enabled
from pulse.domain.route_trial import Trial
from pulse.domain.stored_route import StoredRoute
from pulse.services.console import Visitor
from pulse.services.route_watch import mark_of
from pulse.ui.parameters import RouteId, TenantId
from pulse.ui.render import page, query
from pulse.ui.security import read_form, redirect
from pulse.ui.sessions import TheConsole, TheVisitor

ATTEMPTS_SHOWN = 50
OVERLAP_S = 86_400

router = APIRouter(prefix="/routes/{tenant_id}/{route_id}")


@router.get("")
async def show(
    *,
    request: Request,
    visitor: TheVisitor,
    tenant_id: TenantId,
    route_id: RouteId,
    done: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """The route; what moves of it is told by a mark."""
    return await _shown(request, visitor, "route.html", tenant_id, route_id, done=done)


@router.get("/parts")
async def parts(*, request: Request, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId) -> Response:
    """What of the page moves."""
    return await _shown(request, visitor, "route_parts.html", tenant_id, route_id)


@router.post("/switch")
async def switch(
    *, request: Request, console: TheConsole, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId
) -> Response:
    """Enable or disable it."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    if form["action"] not in ("enable", "disable"):
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    enabled = form["action"] == "enable"
    reach = visitor.caller.changing(tenant_id, f"route.{form['action']}", route_id)
    await reach.routes.change(tenant_id, route_id, lambda route: with_enabled(route, enabled))
    await console.control.tell_edge([route_key(tenant_id, route_id)])
    done = "it takes messages again" if enabled else "it takes nothing more"
    return redirect(f"/routes/{tenant_id}/{route_id}{query({}, done=done)}")


@router.post("/test")
async def send_test(
    *, request: Request, console: TheConsole, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId
) -> Response:
    """Send one marked message to its destination now, and show what that answers."""
    await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    reach = visitor.caller.changing(tenant_id, "route.test", route_id)
    await reach.routes.route(tenant_id, route_id)
    try:
        trial, untold = await console.control.trials.run(tenant_id, route_id), ""
    except Refusal as refusal:
        trial, untold = None, refusal.message
    except Outage as outage:
        trial, untold = None, f"nobody delivers now: {outage.message}"
    return await _shown(request, visitor, "route.html", tenant_id, route_id, trial=trial, untold=untold)


@router.post("/secret")
async def rotate(
    *, request: Request, console: TheConsole, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId
) -> Response:
    """Sign with a new secret, which is shown this once."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    overlap_s = OVERLAP_S if form["overlap"] == "day" else 0
    reach = visitor.caller.changing(tenant_id, "route.rotate", route_id, overlap_s=overlap_s)
    rotated, secret = await reach.routes.rotate_secret(tenant_id, route_id, overlap_s=overlap_s)
    projected = await console.control.tell_edge([route_key(tenant_id, route_id)])
    return show_secret(request, visitor, rotated, secret, projected=projected)


@router.get("/delete")
async def ask_delete(*, request: Request, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId) -> Response:
    """What deleting it would mean."""
    return await _shown(request, visitor, "route_delete.html", tenant_id, route_id)


@router.post("/delete")
async def delete(
    *, request: Request, console: TheConsole, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId
) -> Response:
    """Delete it for good."""
    await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    reach = visitor.caller.changing(tenant_id, "route.delete", route_id)
    await reach.routes.delete(tenant_id, route_id, lambda _: None)
    await console.control.tell_edge([route_key(tenant_id, route_id)])
    return redirect(f"/routes{query({}, done=f'route {tenant_id}/{route_id} is deleted')}")


def show_secret(
    request: Request, visitor: Visitor, stored: StoredRoute, secret: str, *, projected: bool, made: bool = False
) -> Response:
    """What it signs with from now on, which cannot be read again."""
    return page(
        request,
        "route_secret.html",
        visitor=visitor,
        name="routes",
        stored=stored,
        route=stored.route,
        secret=secret,
        projected=projected,
        made=made,
    )


async def _shown(
    request: Request,
    visitor: Visitor,
    template: str,
    tenant_id: str,
    route_id: str,
    *,
    done: str = "",
    trial: Trial | None = None,
    untold: str = "",
) -> Response:
    reach = visitor.caller.reading(tenant_id)
    found = await visitor.desk().routes.find(tenant_id, route_id)
    return page(
        request,
        template,
        visitor=visitor,
        name="routes",
        found=found,
        route=found.stored.route,
        health=found.health,
        mark=mark_of(found),
        attempts=await reach.routes.attempts(tenant_id, route_id, limit=ATTEMPTS_SHOWN),
        attempts_shown=ATTEMPTS_SHOWN,
        done=done,
        trial=trial,
        untold=untold,
    )
