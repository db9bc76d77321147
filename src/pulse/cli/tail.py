"""`pulse tail`: follow messages as they come.

It reads beside the workers: a consumer of its own that acknowledges nothing, so nobody gets a message less. A work
queue allows no such consumer; there it listens to what is published. Messages go to stdout, all else to stderr. Ends
with 130 on Ctrl-C, with 0 after --count messages or when nobody reads what it prints any more.
"""

from __future__ import annotations

import asyncio
import io
import random
import re
import select
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from pulse.adapters.nats import connection as nats_connection
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.follow import Following, Interrupted, Message, follow
from pulse.adapters.nats.listen import listen
from pulse.adapters.nats.streams import stream_state
from pulse.cli.context import Context, as_async, console
from pulse.cli.tail_line import json_of, line_of, read
from pulse.domain.errors import Outage
from pulse.domain.identity import check_device_id, check_tenant_id
from pulse.domain.retry import delay_s
from pulse.runtime.logging import configure_logging
from pulse.topology.declared import load

STREAMS = ("TELEMETRY", "SHADOW", "COMMANDS", "ROUTES", "DOWN")
"""DOWN is what is said to devices."""
RETRY_S_MIN, RETRY_S_MAX = 0.1, 2.0
BEHIND = 10_000
"""Messages that wait for us, from which on we say so."""
BEHIND_EVERY_S = 5.0

Found = list[Message] | str
"""Messages, or a remark about how they come."""


class Age(click.ParamType[timedelta]):
    """A length of time like 90s, 10m, 2h, 1d."""

    name = "age"
    UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}  # noqa: RUF012 - never changed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Read it."""
        if isinstance(value, timedelta):
            return value
        if not (found := re.fullmatch(r"(\d{1,6})([smhd])", value)):
            self.fail(f"{value!r} is not a length of time like 90s, 10m, 2h or 1d", param, ctx)
        return timedelta(seconds=int(found[1]) * self.UNITS[found[2]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be followed; `subject` is None for all of the stream."""

    stream: str
    subject: str | None
    since: datetime | None


@click.command()
@click.option("--tenant", "tenant_id", metavar="TENANT_ID", help="Only messages of this tenant.")
@click.option("--device", "device_id", metavar="DEVICE_ID", help="Only messages of the devices of this id.")
@click.option("--stream", type=click.Choice(STREAMS, case_sensitive=False), default="TELEMETRY", show_default=True)
@click.option("--since", type=Age(), metavar="AGE", help="Begin so long ago, as in 10m, instead of now.")
@click.option("--count", type=click.IntRange(1), help="End after so many messages.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.pass_obj
@as_async
async def tail(
    context: Context,
    *,
    tenant_id: str | None,
    device_id: str | None,
    stream: str,
    since: timedelta | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Follow messages as they come; Ctrl-C ends it (exit code 130)."""
    if tenant_id is not None:
        check_tenant_id(tenant_id)
    if device_id is not None:
        check_device_id(device_id)
    settings = context.settings()
    # What happens to the connection is told as a remark, between the messages that it is about.
    configure_logging(level="error", log_format=settings.log_format)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    colour = console.color_system is not None and not console.no_color
    left = count
    client = await nats_connection.connect(
        settings.nats_url, name="pulse tail", on_disconnect=_lost, on_reconnect=_back
    )
    try:
        async with aclosing(_messages(client, stream, tenant_id, since)) as found_all:
            async for found in found_all:
                if isinstance(found, str):
                    _remark(found)
                    continue
                if _reader_left():
                    return
                for message in found:
                    shown = read(message)
                    if device_id is not None and shown.device_id != device_id:
                        continue
                    click.echo(json_of(shown, stream=stream) if as_json else line_of(shown, colour=colour))
                    if left is not None:
                        left -= 1
                        if left == 0:
                            return
    finally:
        await nats_connection.close(client, drain_s_max=1.0)


def _messages(
    client: PulseClient, stream: str, tenant_id: str | None, since: timedelta | None
) -> AsyncGenerator[Found, None]:
    (config,) = [each for each in load().streams if each.name == stream]
    (everything,) = config.subjects
    below = ".>" if stream == "DOWN" else ""
    subject = None if tenant_id is None else f"{everything.removesuffix('>')}{tenant_id}{below}"
    if config.retention == "workqueue":
        if since is not None:
            raise click.UsageError(f"{stream} is a work queue, of which only new messages can be followed: no --since")
        return _heard(client, subject or everything)
    start = None if since is None else datetime.now(UTC) - since
    return _followed(client, Wanted(stream=stream, subject=subject, since=start))


async def _heard(client: PulseClient, subject: str) -> AsyncGenerator[Found, None]:
    """What is published on `subject` from now on."""
    async with listen(client, subject=subject) as listening:
        yield f"waiting for messages on {subject}"
        told = 0
        while True:
            yield await listening.read()
            if listening.dropped > told:
                yield f"{listening.dropped - told:,} messages came too fast and are not shown"
                told = listening.dropped


class _Place:
    """How far the following has come: behind `sequence` of the making `created` of the stream."""

    def __init__(self, sequence: int | None) -> None:
        self.sequence = sequence
        self.created = ""
        self.attempt = 0
        self.caught_up = False
        self.behind_told_at = float("-inf")


async def _followed(client: PulseClient, wanted: Wanted) -> AsyncGenerator[Found, None]:
    """The messages of a stream, through every interruption, without a gap that is not told."""
    now = await stream_state(client, wanted.stream)
    place = _Place(now.last_seq if wanted.since is None else None)
    while True:
        try:
            async with (
                follow(
                    client,
                    stream=wanted.stream,
                    from_sequence=1 if place.sequence is None else place.sequence + 1,
                    from_time=wanted.since if place.sequence is None else None,
                    subject=wanted.subject,
                ) as following,
                aclosing(_read_on(following, wanted, place)) as found_all,
            ):
                async for found in found_all:
                    yield found
        except (Interrupted, Outage) as reason:
            place.attempt += 1
            if place.attempt == 1:
                yield f"interrupted: {reason.message if isinstance(reason, Outage) else reason}; trying again"
        chance = random.random()  # noqa: S311
        await asyncio.sleep(delay_s(place.attempt, minimum_s=RETRY_S_MIN, maximum_s=RETRY_S_MAX, random=chance))


async def _read_on(following: Following, wanted: Wanted, place: _Place) -> AsyncGenerator[Found, None]:
    """One following until it is interrupted; moves `place`."""
    if place.created and following.stream_created != place.created:
        place.created, place.sequence = following.stream_created, 0
        yield f"the stream {wanted.stream} was made anew"
        return
    if place.attempt and place.created:
        yield "following again" + (f" behind message {place.sequence:,}" if place.sequence else "")
    elif following.pending == 0:
        yield f"waiting for messages in {wanted.stream} on {wanted.subject or 'all subjects'}"
    place.created, place.attempt = following.stream_created, 0
    place.caught_up = place.caught_up or following.pending == 0
    while True:
        messages = await following.read()
        if not messages:
            yield messages
            continue
        gone = messages[-1].sequence - (place.sequence or 0) - len(messages)
        if wanted.subject is None and place.sequence is not None and gone > 0:
            yield f"{gone:,} messages are gone: the stream's limits removed them before they were shown"
        yield messages
        place.sequence = messages[-1].sequence
        pending = messages[-1].pending
        place.caught_up = place.caught_up or pending == 0
        if place.caught_up and pending > BEHIND and time.monotonic() - place.behind_told_at > BEHIND_EVERY_S:
            place.behind_told_at = time.monotonic()
            yield f"{pending:,} messages behind"


async def _lost() -> None:
    _remark("the connection to NATS is lost; waiting for it")


async def _back() -> None:
    _remark("the connection to NATS is back")


def _remark(text: str) -> None:
    click.echo(click.style(f"── {text} ──", dim=True), err=True)


def _reader_left() -> bool:
    """Whether nobody will read what is printed: without a look, that is found out at the next message only."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR | select.POLLHUP)
        return bool(poll.poll(0))
    except (AttributeError, io.UnsupportedOperation):
        return False
