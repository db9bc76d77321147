"""Refusals and outages as `application/problem+json`. Source: RFC 9457, RFC 9110 (Retry-After), RFC 7694 (415)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from pulse.domain.errors import LimitExceeded, Outage, Overloaded, Reason, Refusal, VersionConflict

STATUS = {
    Reason.INVALID_JSON: 400,
    Reason.INVALID_ENCODING: 400,
    Reason.UNAUTHENTICATED: 401,
    Reason.FORBIDDEN: 403,
    Reason.NOT_FOUND: 404,
    Reason.CONFLICT: 409,
    Reason.TOO_LARGE: 413,
    Reason.UNSUPPORTED_TYPE: 415,
    Reason.RATE_LIMITED: 429,
}
"""Of a refusal for any other reason: UNPROCESSABLE."""
UNPROCESSABLE = 422
TITLE = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    503: "Service Unavailable",
}
UNAVAILABLE, OVERLOADED = "unavailable", "overloaded"
"""The reasons of a 503."""
CONTENT_TYPE = (b"content-type", b"application/problem+json")
CONTENT_ENCODING = "Content-Encoding"
CONTENT_ENCODINGS = b"gzip, zstd"

Header = tuple[bytes, bytes]
Answer = tuple[int, Sequence[Header], bytes]
"""Status, headers, body."""


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of an error answer. Extension members: `reason`, and where there is one

    `field`      the path of the value at fault, or the name of the header
    `position`   the offset in bytes at which reading the body (or row, or its payload) as JSON stopped
    `limit`      the setting that was exceeded, and `limit_value` what it allows
    `version`    the shadow's, where the request was meant for another one
    """

    status: int
    title: str
    detail: str
    reason: str = ""
    field: str = ""
    position: int | None = None
    limit: str = ""
    limit_value: float | None = None
    version: int | None = None


def problem_of(error: Refusal | Outage) -> Problem:
    """What the sender is told of `error`; of an outage not its own words, which stay in our log."""
    if isinstance(error, Overloaded):
        detail = f"as much waits for {error.system} as may wait; nothing was accepted"
        return Problem(status=503, title=TITLE[503], detail=detail, reason=OVERLOADED)
    if isinstance(error, Outage):
        detail = f"{error.system} is not available; nothing was accepted, or its acceptance could not be confirmed"
        return Problem(status=503, title=TITLE[503], detail=detail, reason=UNAVAILABLE)
    status = STATUS.get(error.reason, UNPROCESSABLE)
    exceeded = error if isinstance(error, LimitExceeded) else None
    return Problem(
        status=status,
        title=TITLE[status],
        detail=error.message,
        reason=error.reason,
        field=error.field,
        position=error.position,
        limit=exceeded.limit if exceeded else "",
        limit_value=exceeded.value if exceeded else None,
        version=error.version if isinstance(error, VersionConflict) else None,
    )


def problem(status: int, detail: str, *, reason: str = "", headers: tuple[Header, ...] = ()) -> Answer:
    """An answer of `status` with a problem body."""
    return answer_with(Problem(status=status, title=TITLE[status], detail=detail, reason=reason), headers)


def answer_to(error: Refusal | Outage) -> Answer:
    """The answer to a request that is at fault, or that came while a system is away or has too much to do."""
    told = problem_of(error)
    headers: tuple[Header, ...] = ()
    if told.status == 401:
        headers = (WWW_AUTHENTICATE,)
    elif told.status == 415 and told.field == CONTENT_ENCODING:
        headers = ((b"accept-encoding", CONTENT_ENCODINGS),)
    elif (after_s := retry_after_s(error)) is not None:
        headers = (retry_after(after_s),)
    return answer_with(told, headers)


def answer_with(body: Problem, headers: tuple[Header, ...]) -> Answer:
    """An answer with `body`."""
    return body.status, [CONTENT_TYPE, *headers], msgspec.json.encode(body)


WWW_AUTHENTICATE: Header = (b"www-authenticate", b'Bearer realm="pulse"')


def retry_after_s(error: Refusal | Outage) -> float | None:
    """After how long the same request may succeed; None where it never will."""
    if isinstance(error, Outage):
        return error.retry_after_s
    return error.retry_after_s if isinstance(error, LimitExceeded) else None


def retry_after(seconds: float) -> Header:
    """The header; in whole seconds, at least one."""
    return b"retry-after", str(max(1, math.ceil(seconds))).encode()
