"""`/tenants/{tenant_id}/routes`: make, list, show, change, try, enable, disable, delete; rotate secrets; see attempts.

`ETag` is the revision; a change with `If-Match` is made at that revision alone, else it is answered 409 with the one
that there is. A webhook's signing secret is told when it is made, and never again; values of headers never.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response

from pulse.api.control import route_models as models
from pulse.api.control.models import ProblemBody
from pulse.api.control.parameters import After, Enabled, Limit, TenantId, TheCaller, TheControl
from pulse.domain.dry_run import MESSAGES_MAX
from pulse.domain.errors import VersionConflict
from pulse.domain.identity import ID_PATTERN
from pulse.domain.registry import route_key
from pulse.domain.route import Route
from pulse.domain.route_documents import document, settable
from pulse.domain.route_requests import ROUTE_ID_BYTES, check_revision, masked, new_route, patched, with_enabled
from pulse.domain.stored_route import StoredRoute
from pulse.services.control import Caller, Control

router = APIRouter(prefix="/tenants/{tenant_id}/routes", tags=["routes"])

RouteId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]
Messages = Annotated[int, Query(ge=1, le=MESSAGES_MAX, description="How many stored messages to try it on.")]
IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        pattern='^("[0-9]{1,18}"|[0-9]{1,18})$',
        description="The revision that the route must have, as `ETag` told it.",
        examples=['"7"'],
    ),
]
ETAG = {"ETag": {"description": "The revision, in quotes.", "schema": {"type": "string", "pattern": '^"[0-9]+"$'}}}
WITH_ETAG: dict[int | str, dict[str, Any]] = {200: {"headers": ETAG}}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {
        "description": "The route is at another revision: `version`",
        "content": {"application/problem+json": {"schema": ProblemBody.model_json_schema()}},
    }
}


@router.get("", response_model=models.RoutePage)
async def list_routes(
    caller: TheCaller, tenant_id: TenantId, after: After = "", enabled: Enabled = None, limit: Limit = 100
) -> dict[str, object]:
    """The tenant's routes, by id."""
    reach = caller.reading(tenant_id)
    await reach.identities.tenant(tenant_id)
    page = await reach.routes.routes(tenant_id, after=after, enabled=enabled, limit=limit + 1)
    return {
        "routes": [document(each) for each in page[:limit]],
        "next": page[limit - 1].route.route_id if len(page) > limit else None,
    }


@router.post("", response_model=models.RouteChanged, status_code=201)
async def make_route(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, body: models.NewRoute, response: Response
) -> dict[str, object]:
    """Make a route; of a webhook the answer has the secret that it is signed with, which cannot be read again."""
    route_id = body.route_id or f"r-{secrets.token_hex(ROUTE_ID_BYTES)}"
    route = _draft(control, tenant_id, route_id, body)
    reach = caller.changing(tenant_id, "route.create", route_id, **settable(route))
    made, secret = await reach.routes.add(route)
    return await _told(control, made, response, secret=secret)


@router.post("/dry-run", response_model=models.DryRun)
async def try_draft(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, body: models.Draft, messages: Messages = 100
) -> object:
    """What such a route would do with the last stored messages; nothing is made, and nothing is sent."""
    reach = caller.reading(tenant_id)
    await reach.identities.tenant(tenant_id)
    return await control.dry_runs.run(_draft(control, tenant_id, "draft", body), reach.messages, limit=messages)


@router.get("/{route_id}", response_model=models.Route, responses=WITH_ETAG)
async def show_route(
    caller: TheCaller, tenant_id: TenantId, route_id: RouteId, response: Response
) -> dict[str, object]:
    """The route, with its revision as ETag."""
    return _answer(await caller.reading(tenant_id).routes.route(tenant_id, route_id), response)


@router.patch("/{route_id}", response_model=models.RouteChanged, responses=WITH_ETAG | CONFLICT)
async def change_route(
    *,
    caller: TheCaller,
    control: TheControl,
    tenant_id: TenantId,
    route_id: RouteId,
    body: models.RoutePatch,
    response: Response,
    if_match: IfMatch = None,
) -> dict[str, object]:
    """Change what is named; jobs that wait are delivered as the route is then."""
    patch = body.model_dump(exclude_unset=True)
    revision = _revision(if_match)

    def decide(before: Route) -> Route:
        check_revision(before, revision)
        return control.dry_runs.check(patched(before, patch, allowed=control.dry_runs.allowed))

    reach = caller.changing(tenant_id, "route.change", route_id, **masked(patch))
    try:
        changed, secret = await reach.routes.change(tenant_id, route_id, decide)
    except VersionConflict as conflict:
        conflict.field = "If-Match"
        raise
    return await _told(control, changed, response, secret=secret)


@router.delete("/{route_id}", status_code=204, responses=CONFLICT)
async def delete_route(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, route_id: RouteId, if_match: IfMatch = None
) -> None:
    """Delete the route, with its secrets and the record of its attempts; what waits for it becomes dead letters."""
    revision = _revision(if_match)
    reach = caller.changing(tenant_id, "route.delete", route_id)
    try:
        await reach.routes.delete(tenant_id, route_id, lambda route: check_revision(route, revision))
    except VersionConflict as conflict:
        conflict.field = "If-Match"
        raise
    await control.tell_edge([route_key(tenant_id, route_id)])


@router.post("/{route_id}/enable", response_model=models.RouteChanged)
async def enable_route(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, route_id: RouteId, response: Response
) -> dict[str, object]:
    """Let it take messages again, also where Pulse had disabled it by itself."""
    return await _set_enabled(caller, control, tenant_id, route_id, response, enabled=True)


@router.post("/{route_id}/disable", response_model=models.RouteChanged)
async def disable_route(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, route_id: RouteId, response: Response
) -> dict[str, object]:
    """Let it take nothing more."""
    return await _set_enabled(caller, control, tenant_id, route_id, response, enabled=False)


@router.post("/{route_id}/secret", response_model=models.RouteChanged, responses=CONFLICT)
async def rotate_secret(
    *,
    caller: TheCaller,
    control: TheControl,
    tenant_id: TenantId,
    route_id: RouteId,
    response: Response,
    body: models.SecretRotation | None = None,
) -> dict[str, object]:
    """Sign its webhook with a new secret, and for a while with the one before as well."""
    overlap_s = (body or models.SecretRotation()).overlap_s
    reach = caller.changing(tenant_id, "route.rotate", route_id, overlap_s=overlap_s)
    rotated, secret = await reach.routes.rotate_secret(tenant_id, route_id, overlap_s=overlap_s)
    return await _told(control, rotated, response, secret=secret)


@router.get("/{route_id}/attempts", response_model=models.Attempts)
async def list_attempts(
    caller: TheCaller, tenant_id: TenantId, route_id: RouteId, limit: Limit = 100
) -> dict[str, object]:
    """The last attempts, newest first."""
    routes = caller.reading(tenant_id).routes
    await routes.route(tenant_id, route_id)
    return {"attempts": await routes.attempts(tenant_id, route_id, limit=limit)}


@router.get("/{route_id}/health", response_model=models.Health | None)
async def show_health(caller: TheCaller, tenant_id: TenantId, route_id: RouteId) -> object:
    """How its destination is."""
    routes = caller.reading(tenant_id).routes
    await routes.route(tenant_id, route_id)
    return await routes.health(tenant_id, route_id)


@router.post("/{route_id}/dry-run", response_model=models.DryRun)
async def try_route(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, route_id: RouteId, messages: Messages = 100
) -> object:
    """What the route would do with the last stored messages, enabled or not; nothing is sent."""
    reach = caller.reading(tenant_id)
    stored = await reach.routes.route(tenant_id, route_id)
    return await control.dry_runs.run(stored.route, reach.messages, limit=messages)


@router.post("/{route_id}/test", response_model=models.Trial)
async def test_route(caller: TheCaller, control: TheControl, tenant_id: TenantId, route_id: RouteId) -> object:
    """Send one message, marked as a test, to the destination now, and tell what it answers; enabled or not.

    It is like the last stored message of the devices that the filter holds for, and is stored nowhere itself. It does
    not count: for no attempt, for no circuit. A route may be tested a few times a minute (429).
    """
    reach = caller.changing(tenant_id, "route.test", route_id)
    await reach.routes.route(tenant_id, route_id)
    return await control.trials.run(tenant_id, route_id)


def _draft(control: Control, tenant_id: str, route_id: str, body: models.Draft) -> Route:
    asked = body.model_dump(exclude_unset=True, exclude={"route_id"})
    route = new_route(asked, tenant_id=tenant_id, route_id=route_id, allowed=control.dry_runs.allowed)
    return control.dry_runs.check(route)


async def _set_enabled(
    caller: Caller, control: Control, tenant_id: str, route_id: str, response: Response, *, enabled: bool
) -> dict[str, object]:
    reach = caller.changing(tenant_id, "route.enable" if enabled else "route.disable", route_id)
    changed, _ = await reach.routes.change(tenant_id, route_id, lambda route: with_enabled(route, enabled))
    return await _told(control, changed, response)


def _revision(if_match: str | None) -> int | None:
    return None if if_match is None else int(if_match.strip('"'))


def _answer(stored: StoredRoute, response: Response) -> dict[str, object]:
    response.headers["etag"] = f'"{stored.route.revision}"'
    return document(stored)


async def _told(control: Control, stored: StoredRoute, response: Response, *, secret: str = "") -> dict[str, object]:
    """The route as it is now, and whether the workers know."""
    projected = await control.tell_edge([route_key(stored.route.tenant_id, stored.route.route_id)])
    return {"route": _answer(stored, response), "projected": projected, "secret": secret or None}
