"""The gateway's decision: in which order it asks, and under which id a retry is recognised."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import PAYLOAD, Publisher, Registry, make_gateway
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.subjects import MessageType
from pulse.services.gateway import Gateway, retry_id_of_key, retry_id_of_row

keys = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=128)


async def message_id(
    gateway: Gateway, publisher: Publisher, *, device_id: str = "t-1", payload: bytes = PAYLOAD, retry_id: str | None
) -> str:
    prepared = gateway.prepare(
        tenant_id="acme",
        device_id=device_id,
        message_type=MessageType.TELEMETRY,
        payload=payload,
        source="http",
        retry_id=retry_id,
    )
    await gateway.submit(prepared)
    return publisher.published[-1].message_id


async def test_what_is_published_is_the_envelope_around_the_devices_own_bytes() -> None:
    publisher = Publisher()
    payload = b' {"metrics" : {"a":1.0e1}} '
    await message_id(make_gateway(publisher), publisher, payload=payload, retry_id=None)
    published = publisher.published[0]
    assert published.subject == "telemetry.acme"
    assert payload in published.body
    assert msgspec.json.decode(published.body)["device_id"] == "t-1"


async def test_a_retry_has_the_id_of_the_first_and_nothing_else_has() -> None:
    publisher = Publisher()
    gateway = make_gateway(publisher)
    numbered, other = b'{"metrics":{"a":1},"seq":7}', b'{"metrics":{"a":2},"seq":7}'
    key = retry_id_of_key("k", field="")
    ids = [
        await message_id(gateway, publisher, retry_id=key),
        await message_id(gateway, publisher, retry_id=key, device_id="t-2"),
        await message_id(gateway, publisher, retry_id=retry_id_of_row("k", 0, field="")),
        await message_id(gateway, publisher, retry_id=retry_id_of_row("k", 1, field="")),
        await message_id(gateway, publisher, payload=numbered, retry_id=None),
        await message_id(gateway, publisher, payload=other, retry_id=None),
        await message_id(gateway, publisher, payload=numbered, retry_id=None, device_id="t-2"),
        await message_id(gateway, publisher, retry_id=None),
        await message_id(gateway, publisher, retry_id=None),
    ]
    assert len(set(ids)) == len(ids)
    assert await message_id(gateway, publisher, retry_id=key) == ids[0]
    assert await message_id(gateway, publisher, payload=numbered, retry_id=None) == ids[4]


@given(st.tuples(keys, st.integers(0, 999) | st.none()), st.tuples(keys, st.integers(0, 999) | st.none()))
def test_no_two_keys_make_the_same_id(first: tuple[str, int | None], second: tuple[str, int | None]) -> None:
    """Whatever slashes are in them."""

    def retry_id(key: str, row: int | None) -> str:
        return retry_id_of_key(key, field="") if row is None else retry_id_of_row(key, row, field="")

    assert (retry_id(*first) == retry_id(*second)) == (first == second)


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "é", "\x7f", "k" * 129])
def test_what_is_no_idempotency_key_is_refused_by_the_name_of_its_field(key: str) -> None:
    with pytest.raises(Refusal) as refused:
        retry_id_of_key(key, field="Idempotency-Key")
    assert refused.value.field == "Idempotency-Key"


def test_before_the_devices_are_read_it_is_an_outage_and_not_a_wrong_token() -> None:
    registry = Registry()
    registry.ready = False
    gateway = make_gateway(Publisher(), registry=registry)
    with pytest.raises(Outage):
        gateway.authenticate("acme", "t-1", registry.token)


@pytest.mark.parametrize(
    ("tenant_id", "device_id", "token"),
    [("acme", "t-1", None), ("acme", "t-1", "wrong"), ("acme", "none", "token"), ("none", "t-1", "token")],
)
def test_an_unknown_device_and_a_wrong_token_are_told_the_same(tenant_id: str, device_id: str, token: str) -> None:
    with pytest.raises(Refusal) as refused:
        make_gateway(Publisher()).authenticate(tenant_id, device_id, token)
    assert (refused.value.reason, refused.value.message) == (Reason.UNAUTHENTICATED, "unknown device or wrong token")


def test_a_payload_at_fault_is_refused_and_a_heartbeat_may_be_empty() -> None:
    gateway = make_gateway(Publisher())
    for kind, payload in ((MessageType.TELEMETRY, b"{}"), (MessageType.HEARTBEAT, b'{"seq":1,"seq":1}')):
        with pytest.raises(Refusal):
            gateway.prepare(tenant_id="acme", device_id="t-1", message_type=kind, payload=payload, source="http")
    kind = MessageType.HEARTBEAT
    assert gateway.prepare(tenant_id="acme", device_id="t-1", message_type=kind, payload=b"", source="http")
