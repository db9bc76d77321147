"""The cookie: who is signed in, and which forms are theirs before they are.

A visitor who is not signed in has a cookie too, so that the form for signing in has a token; signing in replaces it,
so that a cookie which somebody else has planted is worth nothing afterwards.
"""

from __future__ import annotations

import secrets
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.responses import Response

from pulse.domain.account import SECRET_RANDOM_BYTES, is_session_secret, make_session_secret
from pulse.domain.errors import Reason, Refusal
from pulse.services.console import Console, Visitor
from pulse.services.sign_in import SignedIn

SIGN_IN_PATH = "/sign-in"


class NotSignedIn(Refusal):
    """The page needs somebody who is signed in."""

    def __init__(self) -> None:
        super().__init__(Reason.UNAUTHENTICATED, "sign in first")


def cookie_name(*, https: bool) -> str:
    """With https the name itself makes browsers refuse the cookie from anywhere else (RFC 6265bis, 4.1.3)."""
    return "__Host-pulse" if https else "pulse"


def secret_of(request: Request) -> str:
    """What the cookie holds; empty where there is none of ours."""
    secret = request.cookies.get(cookie_name(https=request.app.state.https), "")
    return secret if is_session_secret(secret) else ""


def new_secret() -> str:
    """For somebody who is not signed in."""
    return make_session_secret(secrets.token_bytes(SECRET_RANDOM_BYTES))


def keep(response: Response, secret: str, *, https: bool) -> None:
    """Give the browser the cookie; it ends with the browser, or when the session does."""
    response.set_cookie(cookie_name(https=https), secret, path="/", secure=https, httponly=True, samesite="strict")


def forget(response: Response, *, https: bool) -> None:
    """Take it away."""
    response.delete_cookie(cookie_name(https=https), path="/", secure=https, httponly=True, samesite="strict")


def console_of(request: Request) -> Console:
    """The console behind the page."""
    return cast(Console, request.app.state.console)


async def visitor_of(request: Request) -> Visitor:
    """Whoever is signed in. Raises NotSignedIn; Outage where that cannot be found out now."""
    console, secret = console_of(request), secret_of(request)
    session = await console.sign_in.who(secret) if secret else None
    if session is None:
        raise NotSignedIn
    visitor = console.visitor(SignedIn(secret=secret, session=session))
    request.state.visitor = visitor
    return visitor


async def operator_of(request: Request) -> Visitor:
    """The same, of somebody who reaches everything. Raises Refusal FORBIDDEN."""
    visitor = await visitor_of(request)
    visitor.check_operator()
    return visitor


def address_of(request: Request) -> str:
    """Where it comes from; behind a proxy that is the proxy, for all alike."""
    return request.client.host if request.client is not None else "unknown"


TheConsole = Annotated[Console, Depends(console_of)]
TheVisitor = Annotated[Visitor, Depends(visitor_of)]
TheOperator = Annotated[Visitor, Depends(operator_of)]
