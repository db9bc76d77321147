"""Every error of the control API as `application/problem+json`. Source: RFC 9457."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from pulse.api.problem import Answer, Problem, answer_to, answer_with
from pulse.domain.errors import Outage, PulseError, Reason, Refusal

log = structlog.get_logger()

FIELD_ERRORS_MAX = 20
MISCONFIGURED_RETRY_AFTER = b"30"
TOLD_EVERY_S = 5.0
"""How often the log says that requests are refused while a system is away."""


class FieldError(msgspec.Struct, frozen=True, kw_only=True):
    """One value at fault; `field` is its path, beginning in the body, the query or the path."""

    field: str
    detail: str


class InvalidRequest(Problem, frozen=True, kw_only=True, omit_defaults=True):
    """A request with several values at fault; the first one stands in `field` and `detail`."""

    errors: tuple[FieldError, ...] = ()


def answer_to_any(error: PulseError) -> Answer:
    """What the sender is told of an error of ours."""
    if isinstance(error, Outage):
        log.warning(
            "refused for an outage", every_s=TOLD_EVERY_S, every_key=error.system, system=error.system, error=str(error)
        )
    if isinstance(error, Refusal | Outage):
        return answer_to(error)
    # What an operator has to mend is nothing that the sender could change.
    log.error("cannot answer before an operator mends it", every_s=TOLD_EVERY_S, error=str(error))
    title = HTTPStatus.SERVICE_UNAVAILABLE.phrase
    problem = Problem(status=503, title=title, detail="this installation is misconfigured", reason="misconfigured")
    return answer_with(problem, ((b"retry-after", MISCONFIGURED_RETRY_AFTER),))


def response_of(answer: Answer) -> Response:
    """`answer` as FastAPI sends it."""
    status, headers, body = answer
    response = Response(body, status_code=status)
    response.raw_headers.extend(headers)
    return response


def handle_errors(app: FastAPI) -> None:
    """Let `app` answer every error as a problem; `app.state.methods_of` tells what a path may be asked with."""
    app.add_exception_handler(PulseError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


async def _ours(_request: Request, error: Exception) -> Response:
    assert isinstance(error, PulseError)
    return response_of(answer_to_any(error))


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = tuple(
        FieldError(field=_path(each["loc"]), detail=str(each["msg"])) for each in error.errors()[:FIELD_ERRORS_MAX]
    )
    return response_of(
        answer_with(
            InvalidRequest(
                status=422,
                title=HTTPStatus.UNPROCESSABLE_ENTITY.phrase,
                detail=errors[0].detail,
                reason=Reason.INVALID_REQUEST,
                field=errors[0].field,
                errors=errors,
            ),
            (),
        )
    )


def _path(location: tuple[int | str, ...]) -> str:
    """`("body", "attributes", "site")` → `attributes.site`."""
    return ".".join(str(part) for part in location[1:]) or str(location[0])


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = Problem(status=error.status_code, title=HTTPStatus(error.status_code).phrase, detail=str(error.detail))
    given = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        given = {"allow": ", ".join(request.app.state.methods_of(request.scope["path"]))}
    headers = tuple((name.lower().encode(), value.encode()) for name, value in given.items())
    return response_of(answer_with(problem, headers))


async def _bug(request: Request, _error: Exception) -> Response:
    """The server logs it with its trace."""
    log.error("a request met a bug", method=request.method, path=request.url.path)
    title = HTTPStatus.INTERNAL_SERVER_ERROR.phrase
    return response_of(answer_with(Problem(status=500, title=title, detail="a bug on our side; it is logged"), ()))
