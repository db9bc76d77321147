"""Reading messages of a stream for people, some at a time, without a consumer; satisfies `services.console.Messages`.

Source: NATS ADR-31, batched direct get. The answers come one by one on an inbox; one without a body (status 204) ends
them.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import SYSTEM, mapped
from pulse.adapters.nats.streams import stream_state
from pulse.domain.browse import Start, StreamMessage
from pulse.domain.errors import Outage

TIMEOUT_S = 3.0
BYTES_MAX = 2 * 1024 * 1024
END, NO_MESSAGES = "204", "404"


class MessageBrowser:
    """Reads any stream that allows direct gets, as all declared ones do. Raises Outage."""

    def __init__(self, client: PulseClient) -> None:
        self._client = client

    async def last_sequence(self, stream: str) -> int:
        """The sequence of the newest message, 0 where there never was one."""
        self._check_connected()
        return (await stream_state(self._client, stream)).last_seq

    async def read(self, stream: str, start: Start, *, limit: int) -> list[StreamMessage]:
        """At most `limit` messages, oldest first, and BYTES_MAX of them."""
        self._check_connected()
        wanted: dict[str, object] = {"batch": limit, "max_bytes": BYTES_MAX, "next_by_subj": start.subject or ">"}
        if start.since is not None:
            wanted["start_time"] = start.since.isoformat()
        else:
            wanted["seq"] = max(1, start.sequence)
        with mapped(f"cannot read messages of {stream}"):
            return await _read(self._client, f"{jetstream.API}.DIRECT.GET.{stream}", wanted)

    def _check_connected(self) -> None:
        if not self._client.is_connected:
            raise Outage(SYSTEM, "the connection to NATS is lost")


async def _read(client: Client, subject: str, wanted: dict[str, object]) -> list[StreamMessage]:
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    found: list[StreamMessage] = []
    try:
        await client.publish(subject, msgspec.json.encode(wanted), reply=inbox)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                answer = await subscription.next_msg(timeout=TIMEOUT_S)
                status = (answer.headers or {}).get("Status", "")
                if status in (END, NO_MESSAGES):
                    return found
                if status:
                    description = (answer.headers or {}).get("Description", "no reason given")
                    raise Outage(SYSTEM, f"NATS refuses to read: {status} {description}")
                found.append(_message(answer))
    except (NatsTimeoutError, TimeoutError) as error:
        raise Outage(SYSTEM, f"no answer within {TIMEOUT_S} s") from error
    finally:
        await subscription.unsubscribe()


def _message(answer: Msg) -> StreamMessage:
    headers = answer.headers or {}
    return StreamMessage(
        sequence=int(headers["Nats-Sequence"]),
        subject=headers["Nats-Subject"],
        stored_at=_instant(headers["Nats-Time-Stamp"]),
        body=answer.data,
        pending=int(headers.get("Nats-Num-Pending", "0")),
    )


def _instant(text: str) -> datetime:
    """To the microsecond; the server writes nanoseconds."""
    head, _, tail = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{head}.{(tail + '000000')[:6]}+00:00")
