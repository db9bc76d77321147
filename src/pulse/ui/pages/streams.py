"""`/streams`: as declared and as they are, their consumers, their room, and their messages. For operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from pulse.domain.browse import Start, read_message
from pulse.domain.errors import Reason, Refusal
from pulse.domain.query import parse_instant
from pulse.services.stream_room import rooms
from pulse.ui.parameters import OptionalId
from pulse.ui.render import page
from pulse.ui.sessions import TheConsole, TheOperator

PAGE = 50
StreamName = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{1,64}$")]

router = APIRouter(prefix="/streams")


@router.get("")
async def list_streams(request: Request, console: TheConsole, visitor: TheOperator) -> Response:
    """All that are declared."""
    status = await console.control.streams.status()
    return page(
        request,
        "streams.html",
        visitor=visitor,
        name="streams",
        found=status,
        rooms=rooms(status.streams, console.pipeline.picture),
    )


@router.get("/{stream}")
async def show_stream(
    *,
    request: Request,
    console: TheConsole,
    visitor: TheOperator,
    stream: StreamName,
    sequence: Annotated[str, Query(pattern="^[0-9]{0,19}$")] = "",
    since: Annotated[str, Query(max_length=40)] = "",
    tenant: OptionalId = "",
) -> Response:
    """One stream, and its messages from a sequence, a time, or the newest ones."""
    status = await console.control.streams.status()
    found = next((each for each in status.streams if each.name == stream), None)
    if found is None:
        raise Refusal(
            Reason.NOT_FOUND, f"there is no stream {stream}: `pulse streams apply` makes those that are declared"
        )
    newest = max(1, found.last_seq - PAGE + 1)
    start = Start(
        sequence=int(sequence) if sequence else newest if not tenant else 1,
        since=parse_instant(since, field="since") if since else None,
        subject=visitor.subject_of(stream, tenant) if tenant else None,
    )
    messages = [read_message(each) for each in await console.messages.read(stream, start, limit=PAGE)]
    return page(
        request,
        "stream.html",
        visitor=visitor,
        name="streams",
        stream=found,
        drift=[each for each in status.drift if each.target.split(".")[0].split(" ")[-1] == stream],
        room=rooms([found], console.pipeline.picture)[stream],
        messages=messages,
        page_size=PAGE,
        has_tenants=stream in console.prefixes,
        filters={"sequence": sequence, "since": since, "tenant": tenant},
    )
