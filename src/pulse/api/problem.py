"""Refusals and outages as `application/problem+json`. Source: RFC 9457, RFC 9110 (Retry-After)."""

from __future__ import annotations

import math

import msgspec

from pulse.domain.errors import Outage, Reason, Refusal

STATUS = {
    Reason.INVALID_JSON: 400,
    Reason.UNAUTHENTICATED: 401,
    Reason.FORBIDDEN: 403,
    Reason.TOO_LARGE: 413,
    Reason.UNSUPPORTED_TYPE: 415,
    Reason.INVALID_IDENTITY: 422,
    Reason.INVALID_PAYLOAD: 422,
    Reason.TIMESTAMP_OUT_OF_RANGE: 422,
}
TITLE = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    503: "Service Unavailable",
}
CONTENT_TYPE = (b"content-type", b"application/problem+json")


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of an error answer; `reason` and `field` are extension members."""

    status: int
    title: str
    detail: str
    reason: str = ""
    field: str = ""


Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers, body."""


def problem(
    status: int, detail: str, *, reason: str = "", field: str = "", headers: tuple[tuple[bytes, bytes], ...] = ()
) -> Answer:
    """An answer of `status` with a problem body."""
    body = msgspec.json.encode(Problem(status=status, title=TITLE[status], detail=detail, reason=reason, field=field))
    return status, [CONTENT_TYPE, *headers], body


def refused(refusal: Refusal) -> Answer:
    """The answer to a request that is at fault."""
    status = STATUS[refusal.reason]
    headers = ((b"www-authenticate", b'Bearer realm="pulse"'),) if status == 401 else ()
    return problem(status, refusal.message, reason=refusal.reason, field=refusal.field, headers=headers)


def unavailable(outage: Outage, *, retry_after_s: float = 1.0) -> Answer:
    """The answer while a system is away; its own words stay in our log, not in the answer."""
    after = str(math.ceil(retry_after_s)).encode()
    detail = f"{outage.system} is not available; nothing was accepted, or its acceptance could not be confirmed"
    return problem(503, detail, reason="unavailable", headers=((b"retry-after", after),))
