"""What every answer of the console carries, what every form has to prove, and how much a form may be.

answer   no script, style, frame or request of any other origin; no inline script or style at all
form     sent by a page of ours (Origin, Sec-Fetch-Site), with the token that follows from the sender's cookie
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pulse.domain.account import is_form_token
from pulse.domain.errors import LimitExceeded, Reason, Refusal

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FORM_BYTES_MAX = 256 * 1024
FIELDS_MAX = 200
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; font-src 'self'; "
    "manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
STRICT_TRANSPORT = (b"strict-transport-security", b"max-age=31536000")


def secured(app: App, *, https: bool) -> App:
    """`app` with HEADERS on every answer; what it does not say of caching is not to be kept."""
    always = (*HEADERS, STRICT_TRANSPORT) if https else HEADERS

    async def with_headers(scope: Scope, receive: Receive, send: Send) -> None:
        async def told(event: Event) -> None:
            if event["type"] == "http.response.start":
                headers = [*event["headers"], *always]
                if not any(name == b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
                event["headers"] = headers
            await send(event)

        await app(scope, receive, told)

    return with_headers


class Form:
    """The fields of a form, each at most once; a name that was not sent is empty."""

    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields.get(name, "").strip()

    def raw(self, name: str) -> str:
        """As it was sent, spaces included: a password, a table."""
        return self._fields.get(name, "")


async def read_form(request: Request, secret: str, *, origin: str, bytes_max: int = FORM_BYTES_MAX) -> Form:
    """The form that `request` sends, if a page of ours sent it for the holder of `secret`.

    Raises Refusal FORBIDDEN where it did not, UNSUPPORTED_TYPE, INVALID_REQUEST, LimitExceeded TOO_LARGE.
    """
    check_origin(request, origin)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Refusal(Reason.UNSUPPORTED_TYPE, "a form of the console is sent as application/x-www-form-urlencoded")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > bytes_max:
                message = f"a form may have {bytes_max} bytes"
                raise LimitExceeded(Reason.TOO_LARGE, message, limit="form bytes", value=bytes_max)
    except ClientDisconnect as gone:
        raise Refusal(Reason.INVALID_REQUEST, "the form did not arrive whole") from gone
    try:
        fields = dict(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=FIELDS_MAX))
    except ValueError as error:
        raise Refusal(Reason.INVALID_REQUEST, "the form cannot be read") from error
    if not is_form_token(fields.pop("form_token", ""), secret):
        raise Refusal(Reason.FORBIDDEN, "this form has expired: go back, load the page anew, and send it again")
    return Form(fields)


def check_origin(request: Request, origin: str) -> None:
    """Refusal FORBIDDEN where another site's page made the browser send this. `origin`: ours, or empty: the Host's."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    sent = request.headers.get("origin", "")
    ours = origin or f"{request.url.scheme}://{request.headers.get('host', '')}"
    if site not in ("same-origin", "none") or (sent and sent != ours):
        raise Refusal(Reason.FORBIDDEN, "this was sent by a page of another site")


def origin_of(url: str) -> str:
    """`https://console.example:8443` of a URL, empty of an empty one."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}" if url else ""


def redirect(path: str) -> Response:
    """See Other: a form that was done is not sent again by a reload."""
    return Response(status_code=303, headers={"location": path})


def path_within(target: str) -> str:
    """`target` where it is a path of ours, else the home page: no redirect leads away."""
    good = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if good and "\\" not in target else "/"
