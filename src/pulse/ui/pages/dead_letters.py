"""`/dead-letters`: what could not be processed, whole; replay and purge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from pulse.domain.browse import readable
from pulse.domain.dead_letter import Filter, parse_headers
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.domain.query import parse_instant
from pulse.services.console import Visitor
from pulse.services.dead_letters import Matching
from pulse.ui.render import page, query
from pulse.ui.security import read_form, redirect
from pulse.ui.sessions import TheVisitor

PAGE = 50
LETTER_ID_MAX = 2**63 - 1
AT_ONCE_MAX = 10_000
"""Letters that one request replays; the rest is for the next one, or for `pulse dead-letters replay`."""
NAMES = ("reason", "tenant", "device", "since", "until", "state")

OptionalId = Annotated[str, Query(pattern=f"^({ID_PATTERN})?$")]
LetterId = Annotated[int, Path(ge=1, le=LETTER_ID_MAX)]

router = APIRouter(prefix="/dead-letters")


@router.get("")
async def list_letters(
    *,
    request: Request,
    visitor: TheVisitor,
    reason: Annotated[str, Query(max_length=64)] = "",
    tenant: OptionalId = "",
    device: OptionalId = "",
    since: Annotated[str, Query(max_length=40)] = "",
    until: Annotated[str, Query(max_length=40)] = "",
    state: Annotated[str, Query(pattern="^(waiting|replayed)?$")] = "",
    before: Annotated[int | None, Query(ge=1, le=LETTER_ID_MAX)] = None,
    done: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Those that match, the newest first."""
    filters = {
        "reason": reason, "tenant": tenant, "device": device, "since": since, "until": until, "state": state,
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
        filters=filters,
        filtered=any(filters.values()),
        reasons=sorted(map(str, Reason)),
        done=done,
    )


@router.post("/all")
async def act_on_all(request: Request, visitor: TheVisitor) -> Response:
    """Replay or purge all that match; purging is asked for once more before it is done."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    filters = {name: form[name] for name in NAMES}
    wanted, action = filter_of(visitor, filters), form["action"]
    last_id = min(int(form["last_id"][:19]), LETTER_ID_MAX) if form["last_id"].isdecimal() else LETTER_ID_MAX
    if action == "purge" and form["sure"] != "yes":
        matching = await visitor.desk().dead_letters.count(wanted)
        return page(
            request, "dead_letters_purge.html", visitor=visitor, name="dead-letters", filters=filters, matching=matching
        )
    if action == "purge":
        letters = visitor.changing_letters(wanted.tenant_id, "dead-letters.purge", "", **_given(filters))
        gone = sum([deleted async for deleted in letters.purge(wanted, last_id=last_id)])
        return redirect(f"/dead-letters{query({}, done=f'{gone:,} purged')}")
    if action != "replay":
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    done = await _replay(visitor, wanted, filters, last_id)
    return redirect(f"/dead-letters{query(filters, done=done)}")


@router.get("/{letter_id}")
async def show_letter(request: Request, visitor: TheVisitor, letter_id: LetterId) -> Response:
    """One letter whole."""
    letter = await visitor.desk().dead_letters.show(letter_id)
    return page(
        request,
        "dead_letter.html",
        visitor=visitor,
        name="dead-letters",
        letter=letter,
        one=letter.summary,
        body=readable(letter.body, pretty=True),
        headers=parse_headers(letter.headers),
        done=request.query_params.get("done", "")[:200],
    )


@router.post("/{letter_id}")
async def act_on_one(request: Request, visitor: TheVisitor, letter_id: LetterId) -> Response:
    """Replay one letter, or purge it."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
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
    if form["action"] != "replay":
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    letters = visitor.changing_letters(tenant_id, "dead-letters.replay", str(letter_id))
    replayed = await letters.replay_one(letter_id)
    said = f"replayed as message {replayed.sequence} of {replayed.stream}"
    return redirect(f"/dead-letters/{letter_id}{query({}, done=said)}")


async def _replay(visitor: Visitor, wanted: Filter, filters: Mapping[str, str], last_id: int) -> str:
    letters = visitor.changing_letters(wanted.tenant_id, "dead-letters.replay", "", **_given(filters))
    published = refused = 0
    async for page_of in letters.replay(wanted, last_id=last_id):
        refused += sum(each.refusal is not None for each in page_of)
        published += sum(each.refusal is None for each in page_of)
        if published + refused >= AT_ONCE_MAX:
            break
    more = f", {refused:,} were refused by their stream" if refused else ""
    return f"{published:,} replayed{more}"


def filter_of(visitor: Visitor, filters: Mapping[str, str]) -> Filter:
    """The filter of a form. Raises Refusal for a time that is none."""
    return Filter(
        reason=filters["reason"] or None,
        tenant_id=filters["tenant"] or visitor.key.tenant_id,
        device_id=filters["device"] or None,
        since=parse_instant(filters["since"], field="since") if filters["since"] else None,
        until=parse_instant(filters["until"], field="until") if filters["until"] else None,
        replayed={"waiting": False, "replayed": True}.get(filters["state"]),
    )


def _given(filters: Mapping[str, str]) -> dict[str, object]:
    return {name: value for name, value in filters.items() if value}
