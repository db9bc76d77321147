"""The registry bucket in a real nats-server: writing it, following it, and repairing it from PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files

import msgspec
import pytest
from nats.aio.client import Client

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.registry import PREFIX, STREAM, RegistryBucket
from pulse.adapters.nats.registry_feed import RegistryFeed
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import open_connection, open_pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.domain.errors import ConfigurationError, Outage
from pulse.domain.identity import Device, NewDevice, Tenant, TokenDigest
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.registry import (
    Complete,
    Put,
    Reading,
    Record,
    Removed,
    device_key,
    encode_record,
    record_key,
    tenant_key,
)
from pulse.services.reconcile import RegistryReconciler, Repairs
from pulse.services.registry import DeviceRegistry, RegistryMirror

WAIT_S = 20.0
ACME = Tenant("acme", enabled=True)


def device(number: int, *, enabled: bool = True) -> Device:
    return Device("acme", f"d{number}", enabled, (TokenDigest(bytes([number % 256]) * 32),))


class Records:
    """A truth in memory; `before_load` runs before each answer."""

    def __init__(self, *records: Record) -> None:
        self.by_key = {record_key(record): record for record in records}
        self.before_load: Callable[[], Awaitable[None]] | None = None

    async def load(self, keys: Sequence[str]) -> Mapping[str, Record]:
        answer = {key: self.by_key[key] for key in keys if key in self.by_key}
        if self.before_load is not None:
            act, self.before_load = self.before_load, None
            await act()
        return answer


async def make_bucket(client: Client, **changes: object) -> None:
    config = files("pulse.topology") / "streams" / f"{STREAM}.json"
    body = msgspec.json.encode(msgspec.json.decode(config.read_bytes()) | changes)
    reply = await client.request(f"$JS.API.STREAM.CREATE.{STREAM}", body, timeout=WAIT_S)
    assert "error" not in msgspec.json.decode(reply.data), reply.data


async def delete_bucket(client: Client) -> None:
    await client.request(f"$JS.API.STREAM.DELETE.{STREAM}", b"", timeout=WAIT_S)


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[Client]:
    async with connection(nats.url, name="test", wait_s=WAIT_S) as connected:
        await make_bucket(connected)
        yield connected


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def mirror_of(client: Client) -> AsyncIterator[DeviceRegistry]:
    """A registry that follows the bucket, complete."""
    registry, stop = DeviceRegistry(), asyncio.Event()
    mirror = asyncio.create_task(RegistryMirror(feed=RegistryFeed(client), registry=registry).run(stop))
    try:
        await until(lambda: registry.ready or mirror.done())
        yield registry
    finally:
        stop.set()
        await asyncio.wait_for(mirror, WAIT_S)


async def test_what_was_projected_is_read_back_and_written_again_only_if_it_changed(client: Client) -> None:
    bucket, records = RegistryBucket(client), Records(ACME, device(1), device(2))
    keys = [*records.by_key, "device.acme.nobody"]
    assert await bucket.project(keys, records.load) == set(records.by_key)
    assert await bucket.read(keys) == records.by_key
    assert await bucket.project(keys, records.load) == frozenset()
    del records.by_key["device.acme.d2"]
    assert await bucket.project(keys, records.load) == {"device.acme.d2"}
    assert "device.acme.d2" not in await bucket.read(keys)
    assert sorted([key async for page in bucket.key_pages() for key in page]) == sorted(records.by_key)
    records.by_key["device.acme.d2"] = device(2)
    assert await bucket.project(keys, records.load) == {"device.acme.d2"}


@pytest.mark.parametrize("atomic", [True, False])
async def test_thousands_are_projected_with_or_without_batches(client: Client, atomic: bool) -> None:
    await delete_bucket(client)
    await make_bucket(client, allow_atomic=atomic)
    bucket, records = RegistryBucket(client), Records(*(device(number) for number in range(2500 if atomic else 250)))
    done: list[int] = []
    changed = await bucket.project(list(records.by_key), records.load, on_progress=done.append)
    assert len(changed) == sum(done) == len(records.by_key)
    assert [key async for page in bucket.key_pages() for key in page] == list(records.by_key)
    assert await bucket.read(list(records.by_key)) == records.by_key


async def test_of_two_writers_the_one_that_loaded_later_wins(client: Client) -> None:
    """The first has loaded, and stops; the second commits, loads and writes; then the first writes."""
    bucket, records = RegistryBucket(client), Records(ACME, device(1), device(2))
    keys = list(records.by_key)
    await bucket.project(keys, records.load)
    records.by_key["device.acme.d1"] = device(1, enabled=False)
    records.by_key["device.acme.d2"] = device(2, enabled=False)

    async def second_writer() -> None:
        records.by_key["device.acme.d1"] = Device("acme", "d1", enabled=True)
        assert await bucket.project(["device.acme.d1"], records.load) == {"device.acme.d1"}

    records.before_load = second_writer
    assert await bucket.project(keys, records.load) == {"device.acme.d2"}
    assert await bucket.read(keys) == records.by_key


async def test_a_key_that_others_never_stop_rewriting_is_given_up(client: Client) -> None:
    bucket = RegistryBucket(client)

    async def load(keys: Sequence[str]) -> Mapping[str, Record]:
        await client.request(PREFIX + "device.acme.d1", b"{}", timeout=WAIT_S)
        return {"device.acme.d1": device(1)}

    with pytest.raises(Outage, match="rewritten all the time"):
        await bucket.project(["device.acme.d1"], load)


async def test_a_bucket_that_does_not_exist_is_for_the_operator_to_make(client: Client) -> None:
    await delete_bucket(client)
    with pytest.raises(ConfigurationError, match="streams apply"):
        await RegistryBucket(client).project(["tenant.acme"], Records(ACME).load)


async def test_a_full_bucket_is_said(client: Client) -> None:
    await delete_bucket(client)
    await make_bucket(client, max_bytes=300)
    records = Records(device(1), device(2), device(3))
    with pytest.raises((Outage, ConfigurationError), match="maximum bytes exceeded"):
        await RegistryBucket(client).project(list(records.by_key), records.load)


async def test_a_mirror_begins_with_what_is_there_and_follows_each_change(client: Client) -> None:
    bucket, records = RegistryBucket(client), Records(ACME, *(device(number) for number in range(2000)))
    await bucket.project(list(records.by_key), records.load)
    async with mirror_of(client) as registry:
        assert registry.size == 2000
        assert registry.device("acme", "d7") == device(7)
        records.by_key["device.acme.d7"] = device(7, enabled=False)
        records.by_key["device.acme.new"] = Device("acme", "new", enabled=True)
        del records.by_key["device.acme.d8"]
        await bucket.project(["device.acme.d7", "device.acme.new", "device.acme.d8"], records.load)
        await until(lambda: registry.device("acme", "d8") is None and registry.size == 2000)
        assert registry.device("acme", "d7") == device(7, enabled=False)
        assert registry.device("acme", "new") == Device("acme", "new", enabled=True)


async def test_a_feed_tells_everything_before_it_says_complete(client: Client) -> None:
    records = Records(*(device(number) for number in range(3000)))
    await RegistryBucket(client).project(list(records.by_key), records.load)
    async with aclosing(RegistryFeed(client).watch()) as changes:
        assert await anext(changes) == Reading(from_scratch=True)
        told = [await anext(changes) for _ in range(3000)]
        assert [change.record for change in told if isinstance(change, Put)] == list(records.by_key.values())
        assert await anext(changes) == Complete()


async def test_after_an_interruption_a_feed_tells_only_what_changed(client: Client, nats: NatsServer) -> None:
    bucket, records = RegistryBucket(client), Records(ACME, device(1), device(2))
    await bucket.project(list(records.by_key), records.load)
    async with aclosing(RegistryFeed(client).watch()) as changes:
        while await anext(changes) != Complete():
            pass
        await asyncio.to_thread(nats.kill)
        await asyncio.to_thread(nats.restart)
        async with connection(nats.url, name="other", wait_s=WAIT_S) as other:
            del records.by_key["device.acme.d2"]
            await RegistryBucket(other).project(["device.acme.d2"], records.load)
        async with asyncio.timeout(WAIT_S):
            after = [await anext(changes) for _ in range(3)]
        assert after == [Reading(from_scratch=False), Removed("device.acme.d2"), Complete()]


async def test_a_mirror_of_an_empty_bucket_is_ready(client: Client) -> None:
    async with mirror_of(client) as registry:
        assert registry.ready
        assert registry.size == 0


async def test_an_entry_that_cannot_be_read_counts_as_absent(client: Client) -> None:
    await client.request(PREFIX + "device.acme.d1", b"no JSON", timeout=WAIT_S)
    await client.request(PREFIX + "device.acme.d2", encode_record(device(2)), timeout=WAIT_S)
    async with mirror_of(client) as registry:
        assert registry.device("acme", "d1") is None
        assert registry.device("acme", "d2") == device(2)
        await client.request(PREFIX + "device.acme.d2", b"[]", timeout=WAIT_S)
        await until(lambda: registry.device("acme", "d2") is None)


async def test_a_mirror_survives_the_server_and_catches_up(client: Client, nats: NatsServer) -> None:
    bucket, records = RegistryBucket(client), Records(ACME, device(1), device(2))
    await bucket.project(list(records.by_key), records.load)
    async with mirror_of(client) as registry:
        await asyncio.to_thread(nats.kill)
        await until(lambda: not client.is_connected)
        assert registry.device("acme", "d1") == device(1), "what is known serves through the outage"
        await asyncio.to_thread(nats.restart)
        await until(lambda: client.is_connected)
        del records.by_key["device.acme.d1"]
        records.by_key["device.acme.d3"] = device(3)
        async with connection(nats.url, name="other", wait_s=WAIT_S) as other:
            await RegistryBucket(other).project(["device.acme.d1", "device.acme.d3"], records.load)
        await until(lambda: registry.device("acme", "d3") == device(3) and registry.device("acme", "d1") is None)
        assert registry.device("acme", "d2") == device(2)


async def test_after_the_bucket_was_made_anew_what_is_not_in_it_is_gone(client: Client) -> None:
    bucket, records = RegistryBucket(client), Records(ACME, device(1), device(2))
    await bucket.project(list(records.by_key), records.load)
    async with mirror_of(client) as registry:
        await delete_bucket(client)
        await make_bucket(client)
        await bucket.project(["tenant.acme", "device.acme.d2"], records.load)
        await until(lambda: registry.device("acme", "d1") is None)
        assert registry.device("acme", "d2") == device(2)
        assert registry.tenant_enabled("acme")


async def test_a_mirror_waits_for_a_bucket_that_is_not_there_yet(client: Client) -> None:
    await delete_bucket(client)
    registry, stop = DeviceRegistry(), asyncio.Event()
    mirror = asyncio.create_task(RegistryMirror(feed=RegistryFeed(client), registry=registry).run(stop))
    assert not registry.ready
    await make_bucket(client)
    await until(lambda: registry.ready)
    stop.set()
    await asyncio.wait_for(mirror, WAIT_S)


async def test_the_reconciler_makes_the_bucket_what_postgresql_says(client: Client, database: str) -> None:
    async with open_connection(database, timeout_s=10, application_name="test") as migrator:
        await migrate(migrator, available())
    async with open_pool(database, size_max=2, timeout_s=10, application_name="test") as pool:
        store, truth, bucket = (
            IdentityStore(pool, presence_after=PRESENCE_AFTER),
            RegistryTruth(pool),
            RegistryBucket(client),
        )
        await store.add_tenant("acme")
        await store.add_devices("acme", [NewDevice(device_id=f"d{number}") for number in range(1500)])
        reconciler = RegistryReconciler(truth=truth, projection=bucket)
        assert await reconciler.reconcile_once() == Repairs(checked=1501, missing=1501)
        assert await reconciler.reconcile_once() == Repairs(checked=1501)

        await store.set_device_enabled("acme", "d5", False)
        await store.rotate_token("acme", "d6", overlap_s=0)
        await client.request(PREFIX + "device.acme.d7", b"rubbish", timeout=WAIT_S)
        await client.request(PREFIX + "device.acme.ghost", encode_record(device(1)), timeout=WAIT_S)
        await client.request(PREFIX + "rubbish", b"", timeout=WAIT_S)
        assert await reconciler.reconcile_once() == Repairs(checked=1501, stale=3, surplus=2)
        keys = [tenant_key("acme"), *(device_key("acme", name) for name in ("d5", "d6", "d7", "ghost"))]
        assert await bucket.read(keys) == await truth.load(keys)
