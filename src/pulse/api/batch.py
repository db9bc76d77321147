"""Many messages in one request, each accepted or refused by itself.

    POST /ingest/v1/batch
    {"tenant_id": "acme", "device_id": "t-1",                                     stand for rows that name none
     "messages": [{"payload": {"metrics": {"temp": 21.5}}},
                  {"device_id": "t-2", "token": "pulse_…", "msg_type": "heartbeat"},
                  {"msg_type": "shadow", "name": "config", "payload": {"state": {"reported": {…}}}},
                  {"idempotency_key": "k-17", "payload": {…}}]}

or, as `application/x-ndjson`, one row a line. A row speaks as its device by its own `token`, else by the request's
(`Authorization`), which therefore is the token of the rows' device: a device sends its backlog with one token, a
gateway that carries for many gives each row the token of its device.

A row's answer is the one that it would have got alone, `index` tells which row. The request's status is the rows' own
where all have the same, else 207. What is no JSON is refused as a whole where it stands in the JSON document, and as
one row in NDJSON. An `Idempotency-Key` of the request stands, with the row's index, for rows that have none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from pulse.api.device_paths import MESSAGE_TYPES, check_shadow_name
from pulse.api.headers import IDEMPOTENCY_KEY, Headers
from pulse.api.problem import (
    CONTENT_TYPE,
    TITLE,
    WWW_AUTHENTICATE,
    Answer,
    Header,
    Problem,
    problem_of,
    retry_after,
    retry_after_s,
)
from pulse.domain.errors import LimitExceeded, Outage, Reason, Refusal
from pulse.domain.identity import check_device_id, check_tenant_id
from pulse.domain.json_text import read_json, refuse_repeated_keys
from pulse.domain.receipt import Receipt
from pulse.domain.subjects import MessageType
from pulse.services.gateway import Gateway, retry_id_of_key, retry_id_of_row

JSON, NDJSON = b"application/json", b"application/x-ndjson"
PAYLOAD_REASONS = frozenset(
    {Reason.INVALID_JSON, Reason.INVALID_PAYLOAD, Reason.TIMESTAMP_OUT_OF_RANGE, Reason.TOO_LARGE}
)

Known = set[tuple[str, str, str | None]]
"""Tenant, device and token of rows before, which need not be looked up again."""
Outcome = asyncio.Future[Receipt] | Refusal | Outage


Kind = Literal["telemetry", "heartbeat", "shadow", "commands-ack"]
"""MESSAGE_TYPES."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One message of a batch."""

    payload: Raw = Raw(b"")
    device_id: str | UnsetType = UNSET
    tenant_id: str | UnsetType = UNSET
    token: str | UnsetType = UNSET
    msg_type: Kind | UnsetType = UNSET
    name: str | UnsetType = UNSET
    idempotency_key: str | UnsetType = UNSET


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document; rows stay as they are, so that what is wrong with one is its own matter."""

    messages: Raw
    tenant_id: str | UnsetType = UNSET
    device_id: str | UnsetType = UNSET


class RowAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a row that is on disk."""

    index: int
    status: int = 202
    stream: str
    seq: int
    durability: str
    duplicate: bool


class RowRefused(Problem, frozen=True, kw_only=True, omit_defaults=True):
    """The result of a row that was not accepted; `field` is a path within the row."""

    index: int


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The body of an answer below 400."""

    accepted: int
    rejected: int
    results: list[RowAccepted | RowRefused]


class NoneAccepted(Problem, frozen=True, kw_only=True, omit_defaults=True):
    """The body of an answer from 400 on: a problem, with the results beside it."""

    rejected: int
    results: list[RowRefused]


_batches = msgspec.json.Decoder(Batch)
_lists = msgspec.json.Decoder(list[Raw])
_rows = msgspec.json.Decoder(Row)


def split(body: bytes, *, media_type: bytes, rows_max: int) -> tuple[Batch, Sequence[bytes | Raw]]:
    """The document and its rows, not yet read. Raises Refusal for the whole.

    Blank lines of NDJSON are no rows; as many as rows are let pass, which is room for a blank line after each.
    """
    if media_type == NDJSON:
        if body.count(b"\n") > 2 * rows_max:
            raise _too_many(rows_max)
        return Batch(Raw()), [line for line in body.split(b"\n") if line and not line.isspace()]
    batch = read_json(_batches, body)
    rows = bytes(batch.messages)
    # A second `messages` would put all rows of the first out of sight.
    named = 1 + (batch.tenant_id is not UNSET) + (batch.device_id is not UNSET)
    refuse_repeated_keys(body, named, beside=rows)
    try:
        return batch, read_json(_lists, rows)
    except Refusal as refusal:
        raise Refusal(refusal.reason, refusal.message, field="messages") from refusal


class BatchApi:
    """Answers batches; `rows_max` and `payload_bytes_max` bound their rows."""

    def __init__(self, *, gateway: Gateway, durability: str, rows_max: int, payload_bytes_max: int) -> None:
        self._gateway = gateway
        self._durability = durability
        self._rows_max = rows_max
        self._payload_bytes_max = payload_bytes_max

    def submit(self, body: bytes, headers: Headers, *, media_type: bytes) -> list[Outcome]:
        """Hand every row to the gateway at once; raises Refusal for what concerns all of them."""
        batch, rows = split(body, media_type=media_type, rows_max=self._rows_max)
        if not rows:
            raise Refusal(Reason.INVALID_PAYLOAD, "a batch has at least one row", field="messages")
        if len(rows) > self._rows_max:
            raise _too_many(self._rows_max)
        if headers.idempotency_key is not None:
            retry_id_of_key(headers.idempotency_key, field=IDEMPOTENCY_KEY)
        known: Known = set()
        return [self._submit_row(index, row, batch, headers, known) for index, row in enumerate(rows)]

    async def answer(self, outcomes: list[Outcome]) -> tuple[Answer, list[str]]:
        """Wait for JetStream's word on every row; the answer, and the reasons of the rows that were refused."""
        results: list[RowAccepted | RowRefused] = []
        again_s = 0.0
        try:
            for index, outcome in enumerate(outcomes):
                try:
                    if not isinstance(outcome, asyncio.Future):
                        raise outcome
                    receipt = await outcome
                except (Refusal, Outage) as error:
                    again_s = max(again_s, retry_after_s(error) or 0.0)
                    results.append(RowRefused(index=index, **msgspec.structs.asdict(problem_of(error))))
                else:
                    results.append(self._accepted(index, receipt))
        finally:
            for outcome in outcomes[len(results) :]:
                if isinstance(outcome, asyncio.Future):
                    outcome.cancel()
        return _answer(results, again_s), [each.reason for each in results if isinstance(each, RowRefused)]

    def _accepted(self, index: int, receipt: Receipt) -> RowAccepted:
        return RowAccepted(
            index=index,
            stream=receipt.stream,
            seq=receipt.seq,
            durability=self._durability,
            duplicate=receipt.duplicate,
        )

    def _submit_row(self, index: int, text: bytes | Raw, batch: Batch, headers: Headers, known: Known) -> Outcome:
        try:
            row = read_json(_rows, text)
            payload = bytes(row.payload)
            refuse_repeated_keys(bytes(text), _named(row, payload), beside=payload)
            tenant_id, device_id = row.tenant_id or batch.tenant_id or "", row.device_id or batch.device_id or ""
            speaker = (tenant_id, device_id, row.token or headers.token)
            if speaker not in known:
                check_tenant_id(tenant_id)
                check_device_id(device_id)
                self._gateway.authenticate(*speaker)
                known.add(speaker)
            self._gateway.admit(tenant_id, device_id)
            message_type = MESSAGE_TYPES[row.msg_type or "telemetry"]
            name = _shadow_name(row, message_type)
            retry_id = None
            if row.idempotency_key is not UNSET:
                retry_id = retry_id_of_key(row.idempotency_key, field="idempotency_key")
            elif headers.idempotency_key is not None:
                retry_id = retry_id_of_row(headers.idempotency_key, index, field=IDEMPOTENCY_KEY)
            if len(payload) > self._payload_bytes_max:
                raise self._too_large()
        except (Refusal, Outage) as error:
            return error
        try:
            prepared = self._gateway.prepare(
                tenant_id=tenant_id,
                device_id=device_id,
                message_type=message_type,
                payload=payload,
                source="http",
                retry_id=retry_id,
                name=name,
            )
            return self._gateway.submit(prepared)
        except Refusal as refusal:
            if refusal.reason in PAYLOAD_REASONS:
                refusal.field = f"payload.{refusal.field}".rstrip(".")
            return refusal
        except Outage as outage:
            return outage

    def _too_large(self) -> LimitExceeded:
        return LimitExceeded(
            Reason.TOO_LARGE,
            f"a payload may have {self._payload_bytes_max} bytes",
            limit="body_bytes_max",
            value=self._payload_bytes_max,
            field="payload",
        )


def _too_many(rows_max: int) -> LimitExceeded:
    message = f"a batch may have {rows_max} rows"
    return LimitExceeded(Reason.TOO_LARGE, message, limit="batch_rows_max", value=rows_max, field="messages")


def _named(row: Row, payload: bytes) -> int:
    others = (row.device_id, row.tenant_id, row.token, row.msg_type, row.name, row.idempotency_key)
    return len(others) - others.count(UNSET) + bool(payload)


def _shadow_name(row: Row, message_type: MessageType) -> str:
    if row.name is UNSET:
        return ""
    if message_type is not MessageType.SHADOW:
        raise Refusal(Reason.INVALID_PAYLOAD, "only a shadow has a name", field="name")
    return check_shadow_name(row.name)


def _answer(results: list[RowAccepted | RowRefused], again_s: float) -> Answer:
    refused = [each for each in results if isinstance(each, RowRefused)]
    statuses = {each.status for each in results}
    status = statuses.pop() if len(statuses) == 1 else 207
    headers: list[Header] = [retry_after(again_s)] if again_s else []
    if status < 400:
        told = Results(accepted=len(results) - len(refused), rejected=len(refused), results=results)
        return status, [(b"content-type", JSON), *headers], msgspec.json.encode(told)
    if status == 401:
        headers.append(WWW_AUTHENTICATE)
    detail = f"none of {len(results)} messages was accepted"
    none = NoneAccepted(
        status=status,
        title=TITLE[status],
        detail=detail,
        reason=refused[0].reason,
        rejected=len(refused),
        results=refused,
    )
    return status, [CONTENT_TYPE, *headers], msgspec.json.encode(none)
