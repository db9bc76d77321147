"""`/dead-letters`, for operators, and `/tenants/{tenant_id}/dead-letters`: list, show, mend, replay, purge.

What is done to many of them is answered line by line while it is done (application/x-ndjson). Whoever closes the
connection ends it: what was told is done, the rest is as it was, and the same request can be sent again.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import StreamingResponse

from pulse.api.control import dead_letter_models as models
from pulse.api.control.parameters import BIGINT_MAX, TenantId, TheCaller
from pulse.api.control.streaming import begun
from pulse.api.problem import UNAVAILABLE
from pulse.domain.dead_letter import Filter, Letter, Replayed
from pulse.domain.dead_letter_documents import document
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.services.control import Caller, Reach
from pulse.services.dead_letters import DeadLetters

Steps = AsyncGenerator[list[Replayed], None] | AsyncGenerator[int, None]
"""What a replay publishes at a time, or how many a purge deletes."""

FAILURES_TOLD_MAX = 100
NDJSON = "application/x-ndjson"
LINES: dict[int | str, dict[str, Any]] = {200: {"content": {NDJSON: {"schema": models.LINE}}}}


def _tenant_id(request: Request) -> str | None:
    """Whose dead letters the path names; None: everybody's."""
    return request.path_params.get("tenant_id")


def _declared(tenant_id: TenantId) -> None:
    """For the OpenAPI document, and so that the path is checked."""


TheTenant = Annotated[str | None, Depends(_tenant_id)]
LetterId = Annotated[int, Path(ge=1, le=BIGINT_MAX)]


async def list_letters(
    caller: TheCaller, tenant_id: TheTenant, listing: Annotated[models.Listing, Query()]
) -> dict[str, object]:
    """What could not be processed, the newest first."""
    wanted = listing.filter(tenant_id, replayed=listing.replayed)
    letters = (await _reading(caller, tenant_id)).dead_letters
    page = await letters.page(wanted, before=listing.before, limit=listing.limit + 1)
    more = page[listing.limit - 1].id if len(page) > listing.limit else None
    return {"dead_letters": page[: listing.limit], "next": more}


async def count_letters(
    caller: TheCaller, tenant_id: TheTenant, which: Annotated[models.WhichInState, Query()]
) -> object:
    """How many match: what a replay or a purge of them would be about."""
    wanted = which.filter(tenant_id, replayed=which.replayed)
    return await (await _reading(caller, tenant_id)).dead_letters.count(wanted)


async def show_letter(caller: TheCaller, tenant_id: TheTenant, letter_id: LetterId) -> object:
    """One of them whole."""
    return document(await _letter(caller, tenant_id, letter_id))


async def replay_letter(
    caller: TheCaller, tenant_id: TheTenant, letter_id: LetterId, body: models.Mended | None = None
) -> dict[str, object]:
    """Publish it again where it came from, with another body where one is given; replayed before or not.

    A mended body that would only die again is refused.
    """
    letter = await _letter(caller, tenant_id, letter_id)
    changing = _changing(caller, letter.summary.tenant_id, tenant_id, "replay", str(letter_id), mended=body is not None)
    replayed = await changing.replay_one(letter_id, body=None if body is None else _mended(body))
    return {"id": letter_id, "stream": replayed.stream, "sequence": replayed.sequence}


async def purge_letter(caller: TheCaller, tenant_id: TheTenant, letter_id: LetterId) -> None:
    """Delete it for good."""
    letter = await _letter(caller, tenant_id, letter_id)
    changing = _changing(caller, letter.summary.tenant_id, tenant_id, "purge", str(letter_id))
    async for _ in changing.purge(Filter(letter_id=letter_id), last_id=letter_id):
        pass


async def replay_letters(caller: TheCaller, tenant_id: TheTenant, body: models.ReplayOfMany) -> StreamingResponse:
    """Publish all that match again where they came from; one JSON line for each step, then a summary."""
    wanted = body.filter.filter(tenant_id, replayed=None if body.again else False)
    found = await (await _reading(caller, tenant_id)).dead_letters.count(wanted)
    asked = body.model_dump(mode="json", exclude_none=True)
    changing = _changing(caller, wanted.tenant_id, tenant_id, "replay", "", matching=found.count, **asked)
    return await _answer(changing.replay(wanted, last_id=found.last_id, rate_per_s=body.rate_per_s), found.count)


async def purge_letters(caller: TheCaller, tenant_id: TheTenant, body: models.Purge) -> StreamingResponse:
    """Delete all that match for good; one JSON line for each step, then a summary."""
    wanted = body.filter.filter(tenant_id, replayed=body.filter.replayed)
    found = await (await _reading(caller, tenant_id)).dead_letters.count(wanted)
    asked = body.model_dump(mode="json", exclude_none=True, exclude={"confirm"})
    changing = _changing(caller, wanted.tenant_id, tenant_id, "purge", "", matching=found.count, **asked)
    last_id = found.last_id if body.last_id is None else min(body.last_id, found.last_id)
    return await _answer(changing.purge(wanted, last_id=last_id), found.count)


async def _reading(caller: Caller, tenant_id: str | None) -> Reach:
    """Raises Refusal FORBIDDEN, and NOT_FOUND for a tenant that is none."""
    reach = caller.reading(tenant_id)
    if tenant_id is not None:
        await reach.identities.tenant(tenant_id)
    return reach


async def _letter(caller: Caller, tenant_id: str | None, letter_id: int) -> Letter:
    letter = await caller.reading(tenant_id).dead_letters.show(letter_id)
    if tenant_id is not None and letter.summary.tenant_id != tenant_id:
        raise Refusal(Reason.NOT_FOUND, f"there is no dead letter {letter_id}")
    return letter


def _changing(
    caller: Caller, whose: str | None, tenant_id: str | None, action: str, target: str, **details: object
) -> DeadLetters:
    """For one change, which is logged as one of `whose`; of the path without a tenant only operators make it."""
    operators_only = tenant_id is None
    return caller.changing(
        whose, f"dead-letters.{action}", target, operators_only=operators_only, **details
    ).dead_letters


def _mended(body: models.Mended) -> bytes:
    try:
        return body.body.encode() if body.encoding == "text" else base64.b64decode(body.body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(Reason.INVALID_REQUEST, f"the body is no {body.encoding}", field="body") from error


async def _answer(steps: Steps, total: int) -> StreamingResponse:
    return StreamingResponse(await begun(_lines(steps, total)), media_type=NDJSON)


async def _lines(steps: Steps, total: int) -> AsyncGenerator[bytes, None]:
    done, failed, stopped = 0, 0, ""
    async with aclosing(steps):
        try:
            async for step in steps:
                refused = [] if isinstance(step, int) else [each for each in step if each.refusal]
                for each in refused[: max(0, FAILURES_TOLD_MAX - failed)]:
                    yield _line("failed", _failure(each))
                done += step if isinstance(step, int) else len(step)
                failed += len(refused)
                yield _line("progress", {"done": done, "failed": failed, "total": total})
        except Outage as outage:
            if not done:
                raise
            stopped = f"{UNAVAILABLE}: {outage.system}"
    yield _line("summary", {"done": done, "failed": failed, "total": total, "stopped": stopped})


def _failure(one: Replayed) -> dict[str, object]:
    assert one.refusal is not None
    return {"id": one.letter_id, "reason": one.refusal.reason, "detail": one.refusal.message}


def _line(name: str, value: object) -> bytes:
    return msgspec.json.encode({name: value}) + b"\n"


def _routes(router: APIRouter) -> APIRouter:
    """All of the above below the prefix of `router`; what has a name stands before what has an id."""
    add = router.add_api_route
    add("", list_letters, methods=["GET"], response_model=models.DeadLetterPage)
    add("/count", count_letters, methods=["GET"], response_model=models.DeadLetterCount)
    for path, endpoint in (("/replay", replay_letters), ("/purge", purge_letters)):
        add(path, endpoint, methods=["POST"], response_class=StreamingResponse, responses=LINES)
    add("/{letter_id:int}", show_letter, methods=["GET"], response_model=models.DeadLetterWhole)
    add("/{letter_id:int}", purge_letter, methods=["DELETE"], status_code=204)
    add("/{letter_id:int}/replay", replay_letter, methods=["POST"], response_model=models.ReplayedLetter)
    return router


router = APIRouter(tags=["dead letters"])
router.include_router(_routes(APIRouter(prefix="/dead-letters")))
router.include_router(_routes(APIRouter(prefix="/tenants/{tenant_id}/dead-letters", dependencies=[Depends(_declared)])))
