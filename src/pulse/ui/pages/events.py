"""`/events`: one stream of server-sent events a tab, of what its page shows.

    ?topic=pipeline                                   the picture, each second, encoded once for all tabs
    ?topic=tail&stream=TELEMETRY&tenant=&device=      messages as they are stored
    ?topic=device&tenant=…&device=…                   the device's newest rows, and a mark of its shadow and commands
    ?topic=route&tenant=…&route=…                     a mark of the route and how its destination is

Every stream also tells `systems`: what is away, and since when. It ends after STREAM_S_MAX, and the browser comes back
with a session that is then checked again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query
from starlette.responses import StreamingResponse

from pulse.domain.errors import LimitExceeded, Reason
from pulse.domain.shadow import ShadowKey
from pulse.services.console import Console, Visitor
from pulse.services.device_watch import DeviceWatch
from pulse.services.live_tail import DeviceTail, StreamTail
from pulse.services.route_watch import RouteWatch
from pulse.ui.parameters import OptionalId
from pulse.ui.sessions import TheConsole, TheVisitor

STREAM_S_MAX = 300.0
STREAMS_MAX = 200
KEY_STREAMS_MAX = 50
"""Open at the same time, of all and of one key; one more is told 429."""
RETRY = b"retry: 2000\n\n"

Topic = Literal["pipeline", "tail", "device", "route", "systems"]

router = APIRouter()
_open: dict[int, int] = {}


@router.get("/events")
async def events(
    *,
    console: TheConsole,
    visitor: TheVisitor,
    topic: Annotated[Topic, Query()] = "systems",
    stream: Annotated[str, Query(pattern="^[A-Za-z0-9_-]{1,64}$")] = "TELEMETRY",
    tenant: OptionalId = "",
    device: OptionalId = "",
    shadow: OptionalId = "",
    route: OptionalId = "",
) -> StreamingResponse:
    """What `topic` says, until the tab goes."""
    found = _events(
        console, visitor, topic=topic, stream=stream, tenant=tenant, device=device, shadow=shadow, route=route
    )
    key_id = visitor.key.key_id
    if _open.get(key_id, 0) >= KEY_STREAMS_MAX or sum(_open.values()) >= STREAMS_MAX:
        raise LimitExceeded(
            Reason.RATE_LIMITED,
            "too many tabs are open: close some",
            limit="streams",
            value=KEY_STREAMS_MAX,
            retry_after_s=5.0,
        )
    return StreamingResponse(
        _counted(key_id, _bounded(found)), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )


def _events(
    console: Console,
    visitor: Visitor,
    *,
    topic: Topic,
    stream: str,
    tenant: str,
    device: str,
    shadow: str,
    route: str,
) -> AsyncGenerator[tuple[str, bytes], None]:
    """Event names and JSON. Raises Refusal for what the visitor may not see."""
    if topic == "pipeline":
        visitor.check_operator()
        return _named("picture", console.pipeline.watch())
    if topic == "tail":
        subject = visitor.subject_of(stream, tenant or None)
        if subject is None:
            visitor.check_operator()
        messages = StreamTail(console.messages, stream=stream, subject=subject, device_id=device or None)
        return _with_systems(console, _named("messages", messages.watch()))
    if topic == "device":
        reach = visitor.caller.reading(tenant)
        tail = DeviceTail(reach.telemetry, tenant_id=tenant, device_id=device)
        key = ShadowKey(tenant, device, shadow)
        return _with_systems(
            console, DeviceWatch(tail, shadows=reach.shadows, commands=reach.commands, key=key).watch()
        )
    if topic == "route":
        visitor.caller.reading(tenant)
        watch = RouteWatch(visitor.desk().routes, tenant_id=tenant, route_id=route)
        return _with_systems(console, _named("mark", watch.watch()))
    return _systems(console)


async def _named(name: str, parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[tuple[str, bytes], None]:
    try:
        async for part in parts:
            yield name, part
    finally:
        await parts.aclose()


async def _with_systems(
    console: Console, parts: AsyncGenerator[tuple[str, bytes], None]
) -> AsyncGenerator[tuple[str, bytes], None]:
    """The same, and what is away, at first and whenever that changes; `parts` yields once a second or so."""
    said = b""
    try:
        async for part in parts:
            told = msgspec.json.encode(console.pipeline.systems())
            if told != said:
                said = told
                yield "systems", told
            yield part
    finally:
        await parts.aclose()


async def _systems(console: Console) -> AsyncGenerator[tuple[str, bytes], None]:
    """What is away, now and whenever that changes, looked at each second; said again as a sign of life."""
    said, said_at = b"", 0.0
    while True:
        told = msgspec.json.encode(console.pipeline.systems())
        if told != said or time.monotonic() - said_at >= 15:
            said, said_at = told, time.monotonic()
            yield "systems", told
        await asyncio.sleep(1.0)


async def _bounded(found: AsyncGenerator[tuple[str, bytes], None]) -> AsyncIterator[bytes]:
    ends_at = time.monotonic() + STREAM_S_MAX
    yield RETRY
    try:
        async for name, body in found:
            yield b"event: %b\ndata: %b\n\n" % (name.encode(), body)
            if time.monotonic() >= ends_at:
                return
    finally:
        await found.aclose()


async def _counted(key_id: int, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    _open[key_id] = _open.get(key_id, 0) + 1
    try:
        async for part in parts:
            yield part
    finally:
        _open[key_id] -= 1
        if not _open[key_id]:
            del _open[key_id]
