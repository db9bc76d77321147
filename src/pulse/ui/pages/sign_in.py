"""`/sign-in`, `/sign-in/link`, `/sign-out`: the only pages for whoever is not signed in."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pulse.domain.errors import LimitExceeded, Outage, Reason, Refusal
from pulse.services.sign_in import SignedIn
from pulse.ui.render import page
from pulse.ui.security import path_within, read_form, redirect
from pulse.ui.sessions import (
    SIGN_IN_PATH,
    TheConsole,
    TheVisitor,
    address_of,
    cookie_name,
    forget,
    keep,
    new_secret,
    secret_of,
)

SIGN_IN_FORM_BYTES_MAX = 4096

router = APIRouter()


@router.get(SIGN_IN_PATH)
async def ask(request: Request, next_: Annotated[str, Query(alias="next")] = "/") -> Response:
    """The form; it works while PostgreSQL is away, and says so."""
    return _asked(request, path=path_within(next_))


@router.get(f"{SIGN_IN_PATH}/link")
async def ask_link(request: Request, token: str = "") -> Response:
    """What a one-time link leads to: a button, since something that only looks at links must not use one up."""
    return _asked(request, link=token[:64])


@router.post(SIGN_IN_PATH)
async def sign_in(request: Request, console: TheConsole) -> Response:
    """By account, by key or by link, whichever the form has."""
    secret = secret_of(request)
    if not secret and not request.headers.get("cookie"):
        raise Refusal(Reason.FORBIDDEN, "signing in needs a cookie: allow cookies for this site, and load it anew")
    form = await read_form(request, secret or "-", origin=request.app.state.origin, bytes_max=SIGN_IN_FORM_BYTES_MAX)
    path, address, service = path_within(form["next"]), address_of(request), console.sign_in
    if form["link"]:
        return await _signed_in(request, path, service.with_link(form["link"], address=address), link=form["link"])
    if form["key"]:
        return await _signed_in(request, path, service.with_key(form["key"], address=address))
    proof = service.with_password(form["account"], form.raw("password"), address=address)
    return await _signed_in(request, path, proof, account=form["account"])


@router.post("/sign-out")
async def sign_out(request: Request, console: TheConsole, visitor: TheVisitor) -> Response:
    """End the session, here and in PostgreSQL."""
    await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    await console.sign_in.end(visitor.signed_in)
    response = redirect(SIGN_IN_PATH)
    forget(response, https=request.app.state.https)
    return response


async def _signed_in(
    request: Request, path: str, proof: Awaitable[SignedIn], *, account: str = "", link: str = ""
) -> Response:
    try:
        signed_in = await proof
    except Outage as outage:
        return _asked(request, path=path, account=account, link=link, status=503, said=f"{outage.system} is away.")
    except LimitExceeded as limit:
        response = _asked(request, path=path, account=account, link=link, status=429, said=limit.message)
        response.headers["retry-after"] = str(int(limit.retry_after_s or 0) + 1)
        return response
    except Refusal as refusal:
        said = "This link was used before, or its time is over." if link else refusal.message
        return _asked(request, path=path, account=account, status=401, said=said)
    home = "/" if signed_in.session.key.tenant_id is None else "/devices"
    response = redirect(path if path != "/" else home)
    keep(response, signed_in.secret, https=request.app.state.https)
    return response


def _asked(
    request: Request, *, path: str = "/", account: str = "", link: str = "", status: int = 200, said: str = ""
) -> Response:
    """The form, for whoever's cookie that is; a new one where there is none."""
    secret = secret_of(request)
    known = bool(secret) and cookie_name(https=request.app.state.https) in request.cookies
    secret = secret or new_secret()
    response = page(
        request, "sign_in.html", status=status, secret=secret, next=path, account=account, link=link, said=said, name=""
    )
    if not known:
        keep(response, secret, https=request.app.state.https)
    return response
