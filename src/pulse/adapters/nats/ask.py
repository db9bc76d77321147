"""Questions about one device over core NATS: the gateway has no database, so it asks a role that has one.

    Asker ─ ask.{kind}.{tenant_id}.{device_id} ─► one of the queue group {kind} ─► Answerer ─► its `answer`
      ◄──── {"result": …}, or {"refusal": {reason, message, field}}, or {"outage": {system, message, retry_after_s}}

Nothing of a question is kept: who asks has an answer within its limit, or an Outage, and may ask again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import nats.errors
import structlog
from msgspec import UNSET, UnsetType
from nats.aio.msg import Msg

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.errors import SYSTEM, mapped
from pulse.domain.errors import Outage, Overloaded, Reason, Refusal
from pulse.domain.identity import is_id

log = structlog.get_logger()

PREFIX = "ask"
CONCURRENCY_MAX = 8
"""Questions that are being answered; each may hold a connection to the database."""
WAITING_MAX = 1000
"""Questions that are being answered, or wait for that; one more is told so at once."""
ANSWER_S_MAX = 4.0
"""Waiting included; who asked has given up by then."""

Answers = Callable[[str, str, bytes], Awaitable[bytes]]
"""(tenant id, device id, body of the question) to JSON. Raises Refusal or Outage, which whoever asks then gets."""


class _Refused(msgspec.Struct, frozen=True):
    reason: Reason
    message: str
    field: str = ""


class _Away(msgspec.Struct, frozen=True):
    system: str
    message: str
    retry_after_s: float
    overloaded: bool = False


class _Answer(msgspec.Struct, frozen=True):
    result: msgspec.Raw | UnsetType = UNSET
    refusal: _Refused | UnsetType = UNSET
    outage: _Away | UnsetType = UNSET


_decode = msgspec.json.Decoder(_Answer).decode
_encode = msgspec.json.Encoder().encode


class Asker:
    """Asks; `timeout_s` bounds the wait for an answer."""

    def __init__(self, client: PulseClient, *, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def ask(self, kind: str, tenant_id: str, device_id: str, body: bytes = b"") -> bytes:
        """The answer, as JSON; the ids must have passed the grammar of ids.

        Raises what the answerer raised (Refusal, Outage), and Outage where nobody answers, or not in time.
        """
        if not self._client.is_connected:
            raise Outage(SYSTEM, "not connected")
        try:
            with mapped(f"cannot ask {kind}"):
                reply = await self._client.request(
                    f"{PREFIX}.{kind}.{tenant_id}.{device_id}", body, timeout=self._timeout_s
                )
        except Outage as outage:
            if isinstance(outage.__cause__, nats.errors.NoRespondersError):
                raise Outage(f"the role {kind}", "nobody answers") from outage
            raise
        answer = _decode(reply.data)
        if answer.result is not UNSET:
            return bytes(answer.result)
        if answer.refusal is not UNSET:
            raise Refusal(answer.refusal.reason, answer.refusal.message, field=answer.refusal.field)
        assert answer.outage is not UNSET, "an answer that says nothing"
        away = answer.outage
        raise (Overloaded if away.overloaded else Outage)(away.system, away.message, retry_after_s=away.retry_after_s)


class Answerer:
    """A service that answers the questions of one kind, with others of that kind, each question once.

    A bug in `answer` is told as an outage, and ends the service.
    """

    def __init__(
        self,
        client: PulseClient,
        *,
        kind: str,
        answer: Answers,
        concurrency_max: int = CONCURRENCY_MAX,
        waiting_max: int = WAITING_MAX,
        answer_s_max: float = ANSWER_S_MAX,
    ) -> None:
        self.name = f"answers about {kind}"
        self._client = client
        self._kind = kind
        self._answer = answer
        self._turns = asyncio.Semaphore(concurrency_max)
        self._waiting_max = waiting_max
        self._answer_s_max = answer_s_max
        self._count = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Answer until `stop`, then finish what has been asked."""
        async with asyncio.TaskGroup() as group:

            async def take(question: Msg) -> None:
                if self._count >= self._waiting_max:
                    await self._reply(question, _outage(Overloaded(f"the role {self._kind}", "too many questions")))
                    return
                self._count += 1
                group.create_task(self._serve(question), name=self.name)

            with mapped(f"cannot answer about {self._kind}"):
                subscription = await self._client.subscribe(f"{PREFIX}.{self._kind}.*.*", queue=self._kind, cb=take)
            await stop.wait()
            if not self._client.is_closed:
                with mapped(f"cannot end answering about {self._kind}"):
                    await subscription.unsubscribe()

    async def _serve(self, question: Msg) -> None:
        try:
            await self._reply(question, await self._find(question))
        except Exception:
            await self._reply(question, _outage(Outage(f"the role {self._kind}", "it has failed")))
            raise
        finally:
            self._count -= 1

    async def _find(self, question: Msg) -> bytes:
        tenant_id, device_id = question.subject.split(".")[2:]
        try:
            if not (is_id(tenant_id) and is_id(device_id)):
                raise Refusal(Reason.INVALID_IDENTITY, "these are no ids")
            async with asyncio.timeout(self._answer_s_max) as limit, self._turns:
                result = await self._answer(tenant_id, device_id, question.data)
        except Refusal as refusal:
            return _encode(_Answer(refusal=_Refused(refusal.reason, refusal.message, refusal.field)))
        except Outage as outage:
            return _outage(outage)
        except TimeoutError:
            if not limit.expired():
                raise
            return _outage(Overloaded(f"the role {self._kind}", "no answer in time"))
        found = _encode(_Answer(result=msgspec.Raw(result)))
        if len(found) > self._client.max_payload:
            return _encode(_Answer(refusal=_Refused(Reason.TOO_LARGE, "the answer is larger than NATS takes")))
        return found

    async def _reply(self, question: Msg, answer: bytes) -> None:
        try:
            with mapped("cannot reply"):
                await self._client.publish(question.reply, answer)
        except Outage as outage:
            log.debug("an answer is lost; who asked finds out by the time it takes", error=str(outage))


def _outage(outage: Outage) -> bytes:
    away = _Away(outage.system, outage.message, outage.retry_after_s, isinstance(outage, Overloaded))
    return _encode(_Answer(outage=away))
