"""Brings a JetStream account to what is declared, over the raw API.

Safe to run twice and twice at once: a creation or update that fails because another provisioner came first is judged
by what is there then. After the last change everything is read back, and what still differs is a failed check.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import msgspec

from pulse.adapters.nats import jetstream
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import SYSTEM, ErrorCode, JetStreamRefusal, mapped
from pulse.adapters.nats.jetstream import ConsumerAnswer, StreamAnswer, time_ns
from pulse.adapters.nats.streams import SUBJECTS_MAX, consumer_answers, subject_messages
from pulse.domain.errors import CheckFailed, Outage
from pulse.topology.actual import Actual, ActualConsumer, ActualStream
from pulse.topology.declared import Declared, StreamConfig
from pulse.topology.plan import Change, Plan, make_plan

VERIFY_INTERVAL_S = 0.1
VERIFY_S_MAX = 20.0
"""A stream that gets replicas, or moves, has no leader for some seconds."""


class _ApiLevel(msgspec.Struct, frozen=True):
    level: int = 0


class _AccountAnswer(msgspec.Struct, frozen=True):
    api: _ApiLevel


class _StreamsPage(msgspec.Struct, frozen=True):
    total: int
    streams: list[StreamAnswer] | None = None
    missing: list[str] | None = None


class _StoredMessage(msgspec.Struct, frozen=True):
    seq: int
    time: str


class _MessageAnswer(msgspec.Struct, frozen=True):
    message: _StoredMessage


class _Anything(msgspec.Struct, frozen=True):
    pass


class Provisioner:
    """Reads, plans and applies on one account; `timeout_s` bounds each call."""

    def __init__(self, client: PulseClient, *, timeout_s: float = jetstream.TIMEOUT_S) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def plan(self, declared: Declared) -> Plan:
        """What `apply` would do; nothing is changed. Raises as `read_actual` does."""
        return make_plan(declared, await self.read_actual(declared))

    async def read_actual(self, declared: Declared) -> Actual:
        """All streams of the account, and the consumers of the declared ones.

        Raises Outage where JetStream is away, or holds a declared stream without being able to show it; and
        ConfigurationError where this user may not ask.
        """
        with mapped("cannot read the streams"):
            account = await self._request("INFO", {}, _AccountAnswer, "cannot read the JetStream account")
            answers = {str(answer.config["name"]): answer async for answer in self._streams(declared)}
            now_ns = max((time_ns(answer.ts) for answer in answers.values()), default=0)
            streams = {name: _actual(answer) for name, answer in answers.items()}
            for stream in declared.streams:
                if stream.name in streams:
                    streams[stream.name] = await self._with_evidence(stream, streams[stream.name], now_ns)
        return Actual(streams=streams, now_ns=now_ns, api_level=account.api.level, clustered=self._client.clustered)

    async def apply(self, declared: Declared, plan: Plan) -> None:
        """Do what `plan` says, then check that nothing is left to do.

        Raises CheckFailed before anything is changed where a change is blocked, and at the end where something still
        differs; Outage or ConfigurationError where the server is away or refuses.
        """
        if plan.blocked:
            raise CheckFailed(
                f"{plan.blocked[0].target}: {plan.blocked[0].reason}", hint="`pulse streams plan` names the way out"
            )
        for change in plan.changes:
            with mapped(f"cannot {change.action} {change.target}"):
                await self._apply(declared, change)
        await self._verify(declared)

    async def _apply(self, declared: Declared, change: Change) -> None:
        doing = f"cannot {change.action} {change.target}"
        try:
            if change.kind == "stream":
                await self._request(f"STREAM.{change.action.upper()}.{change.name}", change.config, _Anything, doing)
            else:
                body = {"stream_name": change.stream, "config": change.config, "action": change.action}
                await self._request(f"CONSUMER.CREATE.{change.stream}.{change.name}", body, _Anything, doing)
        except JetStreamRefusal:
            # Another provisioner may have been quicker: its stream may stand already, and a second reservation of
            # max_bytes for the same stream does not fit (10047).
            left = await self.plan(declared)
            if any(change.target == other.target for other in left.changes):
                raise

    async def _verify(self, declared: Declared) -> None:
        deadline = time.monotonic() + VERIFY_S_MAX
        while True:
            try:
                left = (await self.plan(declared)).changes
                if not left:
                    return
            except Outage:
                if time.monotonic() >= deadline:
                    raise
            else:
                if time.monotonic() >= deadline:
                    names = ", ".join(change.target for change in left)
                    raise CheckFailed(
                        f"applied, but this still differs: {names}", hint="`pulse streams plan` shows how"
                    )
            await asyncio.sleep(VERIFY_INTERVAL_S)

    async def _streams(self, declared: Declared) -> AsyncIterator[StreamAnswer]:
        offset, total = 0, 1
        while offset < total:
            page = await self._request("STREAM.LIST", {"offset": offset}, _StreamsPage, "cannot list the streams")
            away = declared.stream_names() & set(page.missing or ())
            if away:
                raise Outage(SYSTEM, f"the stream {min(away)} has no leader", hint="are the other servers up?")
            found = page.streams or []
            for answer in found:
                yield answer
            offset, total = offset + max(1, len(found)), page.total

    async def _with_evidence(self, declared: StreamConfig, actual: ActualStream, now_ns: int) -> ActualStream:
        """Add the consumers, and, where a limit falls below what is there, what the exact cost is derived from."""
        consumers = {
            answer.name: _actual_consumer(answer)
            async for answer in consumer_answers(self._client, declared.name, timeout_s=self._timeout_s)
        }
        counted: tuple[int, ...] | None = None
        first_kept: int | None = None
        if 0 < declared.max_msgs_per_subject < actual.messages and actual.subjects <= SUBJECTS_MAX:
            before = actual.config.get("max_msgs_per_subject", -1)
            if before != declared.max_msgs_per_subject:
                by_subject = await subject_messages(self._client, declared.name, timeout_s=self._timeout_s)
                counted = tuple(by_subject.values())
        if declared.max_age and declared.max_age != actual.config.get("max_age", 0) and actual.messages:
            first_kept = await self._first_younger_than(declared.name, actual, now_ns - declared.max_age)
        return replace(actual, consumers=consumers, subject_messages=counted, first_kept_seq=first_kept)

    async def _first_younger_than(self, stream: str, actual: ActualStream, moment_ns: int) -> int:
        """The first sequence stored at `moment_ns` or later: a bisection, some twenty reads of one message."""
        low, high = actual.first_seq, actual.last_seq + 1
        while low < high:
            middle = (low + high) // 2
            found = await self._next_message(stream, middle)
            if found is not None and time_ns(found.time) < moment_ns:
                low = found.seq + 1
            else:
                high = middle
        return low

    async def _next_message(self, stream: str, seq: int) -> _StoredMessage | None:
        try:
            answer = await self._request(
                f"STREAM.MSG.GET.{stream}", {"seq": seq, "next_by_subj": ">"}, _MessageAnswer, "cannot read a message"
            )
        except JetStreamRefusal as refusal:
            if refusal.err_code == ErrorCode.NO_MESSAGE_FOUND:
                return None
            raise
        return answer.message

    async def _request(
        self, subject: str, body: Mapping[str, object], shape: type[jetstream.T], doing: str
    ) -> jetstream.T:
        return await jetstream.request(self._client, subject, body, shape, doing=doing, timeout_s=self._timeout_s)


def _actual(answer: StreamAnswer) -> ActualStream:
    state = answer.state
    return ActualStream(
        config=answer.config,
        messages=state.messages,
        bytes=state.bytes,
        first_seq=state.first_seq,
        last_seq=state.last_seq,
        first_ts_ns=time_ns(state.first_ts),
        last_ts_ns=time_ns(state.last_ts),
        deleted=state.num_deleted,
        subjects=state.num_subjects,
    )


def _actual_consumer(answer: ConsumerAnswer) -> ActualConsumer:
    return ActualConsumer(
        config=answer.config,
        delivered_stream_seq=answer.delivered.stream_seq,
        ack_pending=answer.num_ack_pending,
        redelivered=answer.num_redelivered,
    )
