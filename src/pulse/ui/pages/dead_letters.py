"""`/dead-letters`: what could not be processed, whole; mend, replay and purge.

What is done to all that match is told step by step to a page with scripts, which can end it by closing the connection:
what was told is done, the rest is as it was. Without scripts it is one answer, about AT_ONCE_MAX of them at most.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from pulse.domain.browse import editable, readable
from pulse.domain.dead_letter import Filter, Letter, Replayed, parse_headers
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.query import parse_instant
from pulse.domain.route_search import FoundRoute
from pulse.services.console import Visitor
from pulse.services.dead_letters import Matching
from pulse.ui.parameters import OptionalId
from pulse.ui.render import page, query
from pulse.ui.security import Form, read_form, redirect
from pulse.ui.sessions import TheConsole, TheVisitor

PAGE = 50
LETTER_ID_MAX = 2**63 - 1
AT_ONCE_MAX = 10_000
"""Letters that one request replays without telling; the rest is for the next one."""
REPLAY_PER_S_MAX = 500.0
"""As the control API does by itself: what is replayed goes the way of what comes meanwhile."""
MENDED_BYTES_MAX = 256 * 1024
STEPS = "application/x-ndjson"
NAMES = ("reason", "stream", "tenant", "device", "route", "since", "until", "state")

Steps = AsyncGenerator[list[Replayed], None] | AsyncGenerator[int, None]
"""What a replay publishes at a time, or how many a purge deletes."""
LetterId = Annotated[int, Path(ge=1, le=LETTER_ID_MAX)]

router = APIRouter(prefix="/dead-letters")


@router.get("")
async def list_letters(
    *,
    request: Request,
    console: TheConsole,
    visitor: TheVisitor,
    reason: Annotated[str, Query(max_length=64)] = "",
    stream: Annotated[str, Query(pattern="^[A-Za-z0-9_-]{0,64}$")] = "",
    tenant: OptionalId = "",
    device: OptionalId = "",
    route: OptionalId = "",
    since: Annotated[str, Query(max_length=40)] = "",
    until: Annotated[str, Query(max_length=40)] = "",
    state: Annotated[str, Query(pattern="^(waiting|replayed)?$")] = "",
    before: Annotated[int | None, Query(ge=1, le=LETTER_ID_MAX)] = None,
    done: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Those that match, the newest first."""
    filters = {
        "reason": reason, "stream": stream, "tenant": tenant, "device": device, "route": route, "since": since,
        "until": until, "state": state,
    }  # fmt: skip
    wanted = filter_of(visitor, filters)
    letters = visitor.desk().dead_letters
    found = list(await letters.page(wanted, before=before, limit=PAGE + 1))
    matching = await letters.count(wanted)
    return page(
        request,
        "dead_letters.html",
        visitor=visitor,
        name="dead-letters",
        letters=found[:PAGE],
        next=found[PAGE - 1].id if len(found) > PAGE else None,
        matching=matching,
        replayable=matching.replayed if state == "replayed" else matching.count - matching.replayed,
        filters=filters,
        filtered=any(filters.values()),
        reasons=sorted(map(str, Reason)),
        streams=list(console.prefixes),
        done=done,
    )


@router.post("/all")
async def act_on_all(request: Request, visitor: TheVisitor) -> Response:
    """Replay those that match and wait, or purge all that match; purging is asked for once more before it is done."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    filters = {name: form[name] for name in NAMES}
    wanted, action = filter_of(visitor, filters), form["action"]
    last_id = min(int(form["last_id"][:19]), LETTER_ID_MAX) if form["last_id"].isdecimal() else LETTER_ID_MAX
    if action not in ("purge", "replay"):
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    if action == "purge" and form["sure"] != "yes":
        matching = await visitor.desk().dead_letters.count(wanted)
        return page(
            request, "dead_letters_purge.html", visitor=visitor, name="dead-letters", filters=filters, matching=matching
        )
    if action == "replay" and filters["state"] != "replayed":
        # A message that was replayed is not replayed again by the way.
        wanted = msgspec.structs.replace(wanted, replayed=False)
    letters = visitor.changing_letters(wanted.tenant_id, f"dead-letters.{action}", "", **_given(filters))
    told = STEPS in request.headers.get("accept", "")
    steps: Steps = (
        letters.purge(wanted, last_id=last_id)
        if action == "purge"
        else letters.replay(wanted, last_id=last_id, rate_per_s=REPLAY_PER_S_MAX if told else None)
    )
    verb, back = ("purged", {}) if action == "purge" else ("replayed", filters)
    if told:
        total = (await visitor.desk().dead_letters.count(wanted)).count
        return StreamingResponse(_lines(steps, verb, back, total=total), media_type=STEPS)
    return redirect(f"/dead-letters{query(back, done=await _all_of(steps, verb))}")


@router.get("/{letter_id}")
async def show_letter(request: Request, visitor: TheVisitor, letter_id: LetterId) -> Response:
    """One letter whole."""
    letter = await visitor.desk().dead_letters.show(letter_id)
    return await _letter(request, visitor, letter, done=request.query_params.get("done", "")[:200])


@router.post("/{letter_id}")
async def act_on_one(request: Request, visitor: TheVisitor, letter_id: LetterId) -> Response:
    """Replay one letter, with another body where one is given, or purge it."""
    form = await read_form(
        request, visitor.signed_in.secret, origin=request.app.state.origin, bytes_max=4 * MENDED_BYTES_MAX
    )
    letter = await visitor.desk().dead_letters.show(letter_id)
    tenant_id = letter.summary.tenant_id
    if form["action"] == "purge":
        if form["sure"] != "yes":
            return page(
                request,
                "dead_letters_purge.html",
                visitor=visitor,
                name="dead-letters",
                filters={"letter_id": letter_id},
                matching=Matching(1, int(letter.summary.replays > 0), letter_id),
            )
        letters = visitor.changing_letters(tenant_id, "dead-letters.purge", str(letter_id))
        async for _ in letters.purge(Filter(letter_id=letter_id), last_id=letter_id):
            pass
        return redirect(f"/dead-letters{query({}, done=f'dead letter {letter_id} is purged')}")
    if form["action"] not in ("replay", "mend"):
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    mended = _mended(form, letter) if form["action"] == "mend" else None
    letters = visitor.changing_letters(
        tenant_id, "dead-letters.replay", str(letter_id), mended=True if mended is not None else None
    )
    try:
        replayed = await letters.replay_one(letter_id, body=mended)
    except Refusal as refusal:
        if mended is None:
            raise
        return await _letter(request, visitor, letter, refusal=refusal, text=form.raw("body"))
    said = f"replayed{' mended' if mended is not None else ''} as message {replayed.sequence} of {replayed.stream}"
    return redirect(f"/dead-letters/{letter_id}{query({}, done=said)}")


async def _letter(
    request: Request,
    visitor: Visitor,
    letter: Letter,
    *,
    done: str = "",
    refusal: Refusal | None = None,
    text: str | None = None,
) -> Response:
    one = letter.summary
    may_mend = one.body_bytes <= MENDED_BYTES_MAX
    return page(
        request,
        "dead_letter.html",
        status=422 if refusal else 200,
        visitor=visitor,
        name="dead-letters",
        letter=letter,
        one=one,
        body=readable(letter.body, pretty=True),
        text=text if text is not None else editable(letter.body) if may_mend else None,
        headers=parse_headers(letter.headers),
        route=await _route_of(visitor, letter),
        refusal=refusal,
        done=done,
    )


async def _route_of(visitor: Visitor, letter: Letter) -> FoundRoute | None:
    """The route that wanted it, if there still is one."""
    one = letter.summary
    if one.route_id is None or one.tenant_id is None:
        return None
    try:
        return await visitor.desk().routes.find(one.tenant_id, one.route_id)
    except Refusal:
        return None


def _mended(form: Form, letter: Letter) -> bytes | None:
    """The other body; None where nothing of it was changed."""
    text = form.raw("body").replace("\r\n", "\n")
    return None if text == (editable(letter.body) or "").replace("\r\n", "\n") else text.encode()


async def _all_of(steps: Steps, verb: str) -> str:
    done = refused = 0
    async with aclosing(steps):
        async for step in steps:
            done, refused = _counted(step, done, refused)
            if done + refused >= AT_ONCE_MAX and verb == "replayed":
                break
    return _words(done, refused, verb)


async def _lines(steps: Steps, verb: str, back: Mapping[str, str], *, total: int) -> AsyncGenerator[bytes, None]:
    """How far it is, as JSON lines; the last one says where to go then."""
    done, refused, stopped = 0, 0, ""
    async with aclosing(steps):
        try:
            async for step in steps:
                done, refused = _counted(step, done, refused)
                yield msgspec.json.encode({"done": done + refused, "total": total}) + b"\n"
        except Outage as outage:
            stopped = f"; {outage.system} went away, and the rest is as it was"
    words = f"{_words(done, refused, verb)}{stopped}"
    yield msgspec.json.encode({"go": f"/dead-letters{query(back, done=words)}"}) + b"\n"


def _counted(step: int | list[Replayed], done: int, refused: int) -> tuple[int, int]:
    if isinstance(step, int):
        return done + step, refused
    failed = sum(each.refusal is not None for each in step)
    return done + len(step) - failed, refused + failed


def _words(done: int, refused: int, verb: str) -> str:
    return f"{done:,} {verb}" + (f", {refused:,} were refused by their stream" if refused else "")


def filter_of(visitor: Visitor, filters: Mapping[str, str]) -> Filter:
    """The filter of a form. Raises Refusal for a time that is none."""
    return Filter(
        reason=filters["reason"] or None,
        stream=filters["stream"] or None,
        tenant_id=filters["tenant"] or visitor.key.tenant_id,
        device_id=filters["device"] or None,
        route_id=filters["route"] or None,
        since=parse_instant(filters["since"], field="since") if filters["since"] else None,
        until=parse_instant(filters["until"], field="until") if filters["until"] else None,
        replayed={"waiting": False, "replayed": True}.get(filters["state"]),
    )


def _given(filters: Mapping[str, str]) -> dict[str, object]:
    return {name: value for name, value in filters.items() if value}
