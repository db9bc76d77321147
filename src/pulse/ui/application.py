"""The console put together: pages, files, errors as pages, and what every answer carries."""

from __future__ import annotations

from urllib.parse import urlencode

import msgspec
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pulse.domain.errors import LimitExceeded, Outage, PulseError, Reason, Refusal
from pulse.services.console import Console
from pulse.ui.assets import Assets
from pulse.ui.pages import (
    commands,
    dead_letters,
    device,
    devices,
    events,
    live,
    pipeline,
    route,
    route_editor,
    routes,
    settings,
    shadow,
    sign_in,
    streams,
)
from pulse.ui.render import make_templates, page
from pulse.ui.security import App, origin_of, secured
from pulse.ui.sessions import SIGN_IN_PATH, NotSignedIn

log = structlog.get_logger()

MODULES = (
    sign_in, pipeline, devices, device, shadow, commands, live, streams, routes, route_editor, route, dead_letters,
    settings, events,
)  # fmt: skip
STATUS_OF = {
    Reason.FORBIDDEN: 403,
    Reason.UNAUTHENTICATED: 401,
    Reason.NOT_FOUND: 404,
    Reason.CONFLICT: 409,
    Reason.TOO_LARGE: 413,
    Reason.UNSUPPORTED_TYPE: 415,
    Reason.RATE_LIMITED: 429,
}
ASSET_HEADERS = {"cache-control": "public, max-age=31536000, immutable", "vary": "accept-encoding"}
BUG = "a bug on our side; it is in the log of the role ui"


def console_app(*, console: Console, assets: Assets, public_url: str) -> App:
    """The ASGI application for all paths of the console; `public_url`: where browsers find it, empty: as they say."""
    https = public_url.startswith("https:")
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.console = console
    app.state.templates = make_templates(assets)
    app.state.https = https
    app.state.origin = origin_of(public_url)
    app.state.assets = assets
    for module in MODULES:
        app.include_router(module.router)
    app.add_api_route("/static/{name}", _asset, methods=["GET", "HEAD"])
    app.add_exception_handler(NotSignedIn, _sign_in_first)
    app.add_exception_handler(PulseError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)
    return secured(app, https=https)


async def _asset(request: Request, name: str) -> Response:
    assets: Assets = request.app.state.assets
    asset = assets.by_address.get(f"/static/{name}")
    if asset is None:
        raise HTTPException(404)
    if asset.compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        headers = {**ASSET_HEADERS, "content-encoding": "gzip"}
        return Response(asset.compressed, headers=headers, media_type=asset.content_type)
    return Response(asset.body, headers=ASSET_HEADERS, media_type=asset.content_type)


def _told(request: Request, status: int, title: str, detail: str, *, system: str = "") -> Response:
    """An error as a page, or as JSON where a script asked; htmx puts the page's message where the answer would be."""
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"status": status, "title": title, "detail": detail}, status_code=status)
    visitor = getattr(request.state, "visitor", None)
    return page(
        request,
        "error.html",
        status=status,
        visitor=visitor,
        title=title,
        detail=detail,
        system=system,
        may_reload=request.method == "GET",
        name="",
    )


async def _sign_in_first(request: Request, _error: Exception) -> Response:
    """To the page for it, and back afterwards; a script is told 401."""
    if request.method != "GET" or "text/html" not in request.headers.get("accept", "text/html"):
        return JSONResponse({"status": 401, "title": "Unauthorized", "detail": "sign in first"}, status_code=401)
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    path = SIGN_IN_PATH if target == "/" else f"{SIGN_IN_PATH}?{urlencode({'next': target})}"
    if request.headers.get("hx-request"):
        return Response(status_code=204, headers={"hx-redirect": path})
    return Response(status_code=303, headers={"location": path})


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, PulseError)
    if isinstance(error, Outage):
        log.warning("a page met an outage", every_s=5.0, every_key=error.system, system=error.system, error=str(error))
        answer = _told(request, 503, f"{error.system} is away", error.message, system=error.system)
        answer.headers["retry-after"] = str(max(1, round(error.retry_after_s)))
        return answer
    if isinstance(error, Refusal):
        status = STATUS_OF.get(error.reason, 422)
        where = f"{error.field}: " if error.field else ""
        answer = _told(request, status, "That did not work", f"{where}{error.message}")
        if isinstance(error, LimitExceeded) and error.retry_after_s is not None:
            answer.headers["retry-after"] = str(int(error.retry_after_s) + 1)
        return answer
    log.error("a page cannot be made before an operator mends it", every_s=5.0, error=str(error))
    return _told(request, 503, "This installation is misconfigured", error.message)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _told(request, 422, "That cannot be read", f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _told(request, 404, "There is nothing here", "Nothing of the console has this address.")
    answer = _told(request, error.status_code, "That did not work", str(error.detail))
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _bug(request: Request, _error: Exception) -> Response:
    """The server logs it with its trace."""
    log.error("a page met a bug", method=request.method, path=request.url.path)
    return Response(msgspec.json.encode({"status": 500, "detail": BUG}), 500, media_type="application/json")
