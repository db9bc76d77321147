"""`/routes/add`, `/routes/{tenant}/{route}/edit`: one form, checked as it is typed, and tried before it is saved."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from pulse.domain.dry_run import MESSAGES_MAX, DryRun
from pulse.domain.errors import ConfigurationError, Reason, Refusal, VersionConflict
from pulse.domain.registry import route_key
from pulse.domain.route import EXPRESSION_LENGTH_MAX, Route, Webhook
from pulse.domain.route_documents import settable
from pulse.domain.route_requests import ROUTE_ID_BYTES, check_revision, masked, new_route, replaced
from pulse.domain.stored_route import StoredRoute
from pulse.domain.template import read_template
from pulse.domain.webhook_url import Allowed
from pulse.services.console import Console, Visitor
from pulse.ui.pages.devices import tenants_of
from pulse.ui.pages.route import show_secret
from pulse.ui.parameters import OptionalId, RouteId, TenantId
from pulse.ui.render import page, query
from pulse.ui.route_form import LABELS, NEW, TYPES, asked_of, field_of, values_of_form, values_of_route
from pulse.ui.security import Form, read_form, redirect
from pulse.ui.sessions import TheConsole, TheVisitor

MESSAGES = (10, 100, 1000)
AROUND = 60
"""How much of a line is shown on either side of where it does not read."""

router = APIRouter(prefix="/routes")


@router.get("/add")
async def ask(request: Request, visitor: TheVisitor, tenant: OptionalId = "") -> Response:
    """The form for a new route."""
    return await _form(request, visitor, {**NEW, "tenant_id": tenant}, None)


@router.post("/add")
async def add(request: Request, console: TheConsole, visitor: TheVisitor) -> Response:
    """Make it; of a webhook the secret is shown this once."""
    form = await _read(request, visitor)
    values = values_of_form(form)
    tenant_id, route_id = form["tenant_id"], form["route_id"] or f"r-{secrets.token_hex(ROUTE_ID_BYTES)}"
    try:
        wanted = new_route(asked_of(values), tenant_id=tenant_id, route_id=route_id, allowed=_allowed(console))
        console.control.dry_runs.check(wanted)
        reach = visitor.caller.changing(tenant_id, "route.create", route_id, **settable(wanted))
        made, secret = await reach.routes.add(wanted)
    except (Refusal, ConfigurationError) as error:
        return await _form(request, visitor, values, None, refusal=_refusal(error))
    return await _saved(request, console, visitor, made, secret, made_now=True)


@router.get("/{tenant_id}/{route_id}/edit")
async def ask_edit(request: Request, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId) -> Response:
    """The form for one that is there."""
    stored = await visitor.caller.reading(tenant_id).routes.route(tenant_id, route_id)
    return await _form(request, visitor, values_of_route(stored.route), stored)


@router.post("/{tenant_id}/{route_id}/edit")
async def edit(
    *, request: Request, console: TheConsole, visitor: TheVisitor, tenant_id: TenantId, route_id: RouteId
) -> Response:
    """Make it what the form says, if it is still at the revision that the form was made of."""
    form = await _read(request, visitor)
    stored = await visitor.caller.reading(tenant_id).routes.route(tenant_id, route_id)
    values = values_of_form(form) | {"tenant_id": tenant_id, "route_id": route_id}
    try:
        asked = asked_of(values, removed=_removed(form, stored.route))
        del asked["enabled"]
        revision = int(form["revision"]) if form["revision"].isdecimal() and len(form["revision"]) <= 18 else 0

        def decide(before: Route) -> Route:
            check_revision(before, revision)
            wanted = replaced(before, {**asked, "enabled": before.enabled}, allowed=_allowed(console))
            return console.control.dry_runs.check(wanted)

        reach = visitor.caller.changing(tenant_id, "route.change", route_id, **masked(asked))
        changed, secret = await reach.routes.change(tenant_id, route_id, decide)
    except (Refusal, ConfigurationError) as error:
        # After a conflict the next save is meant for what is shown now; else still for what was begun with.
        begun = "" if isinstance(error, VersionConflict) else form["revision"]
        return await _form(
            request,
            visitor,
            values,
            stored,
            refusal=_refusal(error),
            removed=_removed(form, stored.route),
            revision=begun,
        )
    return await _saved(request, console, visitor, changed, secret)


@router.post("/check")
async def check(
    request: Request, console: TheConsole, visitor: TheVisitor, of: Annotated[str, Query()] = "expression"
) -> Response:
    """Whether a condition, or a template, reads; where it does not, at which place."""
    form = await _read(request, visitor)
    name = "template" if of == "template" else "expression"
    text = form.raw(name).replace("\r\n", "\n").strip()
    refusal: Refusal | None = None
    try:
        if name == "expression" and len(text) > EXPRESSION_LENGTH_MAX:
            raise Refusal(Reason.INVALID_REQUEST, f"it has at most {EXPRESSION_LENGTH_MAX} characters")
        if name == "expression":
            console.control.dry_runs.check_expression(text)
        elif text:
            read_template(text)
    except Refusal as refused:
        refusal = refused
    at = _place(text, refusal)
    return page(request, "route_said.html", visitor=visitor, of=name, text=text, refusal=refusal, at=at)


@router.post("/dry-run")
async def dry_run(request: Request, console: TheConsole, visitor: TheVisitor) -> Response:
    """What the draft would do with the last stored messages, beside the form; nothing is saved, and nothing sent."""
    form = await _read(request, visitor)
    values, stored, removed = values_of_form(form), None, list[str]()
    ran: DryRun | None = None
    refusal: Refusal | None = None
    tenant_id = form["tenant_id"]
    reach = visitor.caller.reading(tenant_id)
    if form["revision"]:
        stored = await reach.routes.route(tenant_id, form["route_id"])
        removed = _removed(form, stored.route)
    else:
        await reach.identities.tenant(tenant_id)
    try:
        asked = asked_of(values, removed=removed)
        draft = _draft(console, asked, stored, tenant_id)
        limit = int(form["messages"][:9]) if form["messages"].isdecimal() else MESSAGES[1]
        ran = await console.control.dry_runs.run(draft, reach.messages, limit=max(1, min(limit, MESSAGES_MAX)))
    except Refusal as refused:
        refusal = refused
    return await _form(
        request, visitor, values, stored, removed=removed, revision=form["revision"], tried=True, ran=ran,
        why_not_tried=refusal, messages=form["messages"],
    )  # fmt: skip


def _draft(console: Console, asked: Mapping[str, Any], stored: StoredRoute | None, tenant_id: str) -> Route:
    if stored is not None:
        return replaced(stored.route, asked, allowed=_allowed(console))
    return new_route(asked, tenant_id=tenant_id, route_id="draft", allowed=_allowed(console))


async def _read(request: Request, visitor: Visitor) -> Form:
    return await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)


def _allowed(console: Console) -> Allowed:
    return console.control.dry_runs.allowed


def _refusal(error: Refusal | ConfigurationError) -> Refusal:
    """What an operator has to mend is told where it was met, with nothing lost of what was typed."""
    return error if isinstance(error, Refusal) else Refusal(Reason.INVALID_REQUEST, str(error))


def _removed(form: Form, route: Route) -> list[str]:
    """Those of the route's headers that are ticked away."""
    return [name for name in _headers(route) if form[f"remove_{name}"] == "yes"]


def _headers(route: Route) -> list[str]:
    return sorted(route.destination.headers) if isinstance(route.destination, Webhook) else []


def _place(text: str, refusal: Refusal | None) -> tuple[str, str, str] | None:
    """The line that does not read, cut at the place: before, the character, and after."""
    if refusal is None or refusal.position is None or refusal.position > len(text):
        return None
    position = refusal.position
    start, end = text.rfind("\n", 0, position) + 1, text.find("\n", position)
    line, at = text[start : end if end >= 0 else len(text)], position - start
    return line[max(0, at - AROUND) : at], line[at : at + 1], line[at + 1 : at + 1 + AROUND]


async def _saved(
    request: Request, console: Console, visitor: Visitor, stored: StoredRoute, secret: str, *, made_now: bool = False
) -> Response:
    route = stored.route
    projected = await console.control.tell_edge([route_key(route.tenant_id, route.route_id)])
    if secret:
        return show_secret(request, visitor, stored, secret, projected=projected, made=made_now)
    done = "it is made" if made_now else f"it is at revision {route.revision}"
    later = "" if projected else "; the workers could not be told yet, and will be within minutes"
    return redirect(f"/routes/{route.tenant_id}/{route.route_id}{query({}, done=done + later)}")


async def _form(
    request: Request,
    visitor: Visitor,
    values: Mapping[str, str],
    stored: StoredRoute | None,
    *,
    refusal: Refusal | None = None,
    removed: list[str] | None = None,
    revision: str = "",
    tried: bool = False,
    ran: DryRun | None = None,
    why_not_tried: Refusal | None = None,
    messages: str = "",
) -> Response:
    conflict = isinstance(refusal, VersionConflict)
    status = {Reason.FORBIDDEN: 403, Reason.CONFLICT: 409, Reason.NOT_FOUND: 404}
    return page(
        request,
        "route_edit.html",
        status=200 if refusal is None else status.get(refusal.reason, 422),
        visitor=visitor,
        name="routes",
        values=values,
        stored=stored,
        revision=revision or (str(stored.route.revision) if stored else ""),
        header_names=_headers(stored.route) if stored else [],
        removed=removed or [],
        refusal=refusal,
        conflict=conflict,
        theirs=_differences(values, stored.route) if conflict and stored else [],
        wrong=field_of(refusal) if refusal else "",
        wrong_label=LABELS.get(field_of(refusal), "") if refusal else "",
        not_tried_label=LABELS.get(field_of(why_not_tried), "") if why_not_tried else "",
        tenants=await tenants_of(visitor),
        types=TYPES,
        tried=tried,
        ran=ran,
        why_not_tried=why_not_tried,
        messages=messages or str(MESSAGES[1]),
        messages_choices=MESSAGES,
        expression_length_max=EXPRESSION_LENGTH_MAX,
    )


def _differences(values: Mapping[str, str], route: Route) -> list[tuple[str, str]]:
    """Label and value of what the route says now and the form does not; of headers nothing can be said."""
    there = values_of_route(route)
    types = [each for each, _ in TYPES]
    found = [
        (LABELS[name], there[name])
        for name in there
        if name in LABELS and name != "headers" and there[name].strip() != values.get(name, "").strip()
    ]
    if any(there.get(f"type_{each}") != (values.get(f"type_{each}") or None) for each in types):
        found.append((LABELS["types"], ", ".join(each for each in types if there.get(f"type_{each}"))))
    return found
