"""`/routes`: which messages go where, and how their destinations take them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pulse.domain.route_search import TEXT_LENGTH_MAX, RouteSearch, RouteState
from pulse.ui.pages.devices import tenants_of
from pulse.ui.parameters import OptionalId
from pulse.ui.render import page
from pulse.ui.sessions import TheVisitor

PAGE = 50

router = APIRouter(prefix="/routes")


@router.get("")
async def list_routes(
    *,
    request: Request,
    visitor: TheVisitor,
    text: Annotated[str, Query(max_length=TEXT_LENGTH_MAX)] = "",
    tenant: OptionalId = "",
    state: str = "",
    after_tenant: OptionalId = "",
    after: OptionalId = "",
    done: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Those that match, a page at a time."""
    wanted = RouteSearch(
        tenant_id=tenant or visitor.key.tenant_id,
        text=text.strip(),
        state=RouteState(state) if state in set(RouteState) else None,
    )
    found = await visitor.desk().routes.search(wanted, after=(after_tenant, after), limit=PAGE + 1)
    filters = {"text": text, "tenant": tenant, "state": state}
    return page(
        request,
        "routes.html",
        visitor=visitor,
        name="routes",
        found=found[:PAGE],
        last=found[PAGE - 1].stored.route if len(found) > PAGE else None,
        filters=filters,
        filtered=any(filters.values()),
        states=list(RouteState),
        has_tenants=bool(found) or bool(await tenants_of(visitor)),
        done=done,
    )
