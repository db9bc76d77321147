"""Tenants, devices and tokens in a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool, transaction
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.identity import Device, NewDevice, Tenant, admits, digest
from pulse.domain.limits import NO_LIMITS, Rate, TenantLimits
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.registry import Record, device_key, tenant_key

FAR_FUTURE_MS = 4_000_000_000_000


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=4, timeout_s=10, application_name="pulse test") as opened:
        yield opened


@pytest.fixture
async def store(pool: Pool) -> IdentityStore:
    made = IdentityStore(pool, presence_after=PRESENCE_AFTER)
    await made.add_tenant("acme", name="Acme Ltd")
    return made


async def known_device(pool: Pool, device_id: str) -> Device:
    key = device_key("acme", device_id)
    record = (await RegistryTruth(pool).load([key]))[key]
    assert isinstance(record, Device)
    return record


async def test_a_tenant_is_made_once(store: IdentityStore) -> None:
    made = await store.tenant("acme")
    assert (made.tenant_id, made.name, made.enabled) == ("acme", "Acme Ltd", True)
    with pytest.raises(Refusal, match="is there already") as raised:
        await store.add_tenant("acme")
    assert raised.value.reason is Reason.CONFLICT
    with pytest.raises(Refusal) as invalid:
        await store.add_tenant("ac.me")
    assert invalid.value.reason is Reason.INVALID_IDENTITY


async def test_a_tenants_limits_are_its_own_until_they_are_taken_away(pool: Pool, store: IdentityStore) -> None:
    limits = TenantLimits(messages=Rate(0.5, 100), device_messages=Rate(0, 1))
    await store.set_tenant_limits("acme", limits)
    assert (await store.tenant("acme")).limits == limits
    truth = RegistryTruth(pool)
    assert await truth.load(["tenant.acme"]) == {"tenant.acme": Tenant("acme", True, limits)}
    assert [page async for page in truth.pages(10)] == [[Tenant("acme", True, limits)]]
    with pytest.raises(Refusal) as refused:
        await store.set_tenant_limits("acme", TenantLimits(messages=Rate(1, 0)))
    assert refused.value.field == "messages.burst"
    await store.set_tenant_limits("acme", NO_LIMITS)
    assert await truth.load(["tenant.acme"]) == {"tenant.acme": Tenant("acme", True)}
    with pytest.raises(Refusal, match="there is no tenant 'nobody'"):
        await store.set_tenant_limits("nobody", limits)


async def test_what_is_not_there_is_said_with_the_way_out(store: IdentityStore) -> None:
    with pytest.raises(Refusal, match="pulse tenant add nobody") as raised:
        await store.add_devices("nobody", [NewDevice(device_id="b")])
    assert raised.value.reason is Reason.NOT_FOUND
    for missing in (
        store.tenant("nobody"),
        store.set_tenant_enabled("nobody", False),
        store.device("acme", "b"),
        store.set_device_enabled("acme", "b", False),
        store.rotate_token("acme", "b", overlap_s=0),
    ):
        with pytest.raises(Refusal) as raised:
            await missing
        assert raised.value.reason is Reason.NOT_FOUND


async def test_a_device_is_made_with_a_token_that_admits_it(store: IdentityStore, pool: Pool) -> None:
    new = NewDevice(device_id="boiler", name="Boiler [1]", attributes={"site": "north", "floor": 3})
    tokens = await store.add_devices("acme", [new])
    shown = await store.device("acme", "boiler")
    assert (shown.name, shown.attributes, shown.enabled) == (new.name, new.attributes, True)
    assert [token.expires_at for token in shown.tokens] == [None]
    assert admits(await known_device(pool, "boiler"), tokens["boiler"], FAR_FUTURE_MS)


async def test_the_token_itself_is_nowhere_in_the_database(store: IdentityStore, pool: Pool) -> None:
    tokens = await store.add_devices("acme", [NewDevice(device_id="boiler")])
    async with transaction(pool) as connection:
        rows = await connection.fetch("SELECT * FROM device_tokens")
    assert [row["digest"] for row in rows] == [digest(tokens["boiler"])]
    assert tokens["boiler"] not in repr(rows)


async def test_many_devices_are_made_together_or_not_at_all(store: IdentityStore, pool: Pool) -> None:
    new = [NewDevice(device_id=f"d-{number:05}") for number in range(12_000)]
    tokens = await store.add_devices("acme", new)
    assert list(tokens) == [device.device_id for device in new]
    assert len(set(tokens.values())) == 12_000
    assert admits(await known_device(pool, "d-11999"), tokens["d-11999"], FAR_FUTURE_MS)
    with pytest.raises(Refusal, match="d-00007") as raised:
        await store.add_devices("acme", [NewDevice(device_id="fresh"), NewDevice(device_id="d-00007")])
    assert raised.value.reason is Reason.CONFLICT
    with pytest.raises(Refusal, match="given twice"):
        await store.add_devices("acme", [NewDevice(device_id="x"), NewDevice(device_id="x")])
    assert await store.device_count("acme") == 12_000


async def test_devices_can_be_made_or_given_new_tokens_in_one_go(store: IdentityStore, pool: Pool) -> None:
    old = await store.add_devices("acme", [NewDevice(device_id="a", name="kept")])
    new = await store.add_devices("acme", [NewDevice(device_id="a"), NewDevice(device_id="b")], reissue=True)
    assert (await store.device("acme", "a")).name == "kept"
    a = await known_device(pool, "a")
    assert (admits(a, new["a"], 0), admits(a, old["a"], 0)) == (True, False)
    assert admits(await known_device(pool, "b"), new["b"], 0)


async def test_after_a_rotation_both_tokens_admit_until_the_overlap_is_over(store: IdentityStore, pool: Pool) -> None:
    old = (await store.add_devices("acme", [NewDevice(device_id="boiler")]))["boiler"]
    new = await store.rotate_token("acme", "boiler", overlap_s=3600)
    ends = [token.expires_at for token in (await store.device("acme", "boiler")).tokens]
    assert ends[0] is None
    assert ends[1] is not None
    ends_ms = int(ends[1].timestamp() * 1000)
    device = await known_device(pool, "boiler")
    assert admits(device, old, ends_ms - 1)
    assert not admits(device, old, ends_ms)
    assert admits(device, new, FAR_FUTURE_MS)


async def test_a_token_that_has_expired_is_neither_shown_nor_told_to_the_edge(store: IdentityStore, pool: Pool) -> None:
    await store.add_devices("acme", [NewDevice(device_id="boiler")])
    async with transaction(pool) as connection:
        await connection.execute("UPDATE device_tokens SET expires_at = now() - interval '1 s'")
    assert (await store.device("acme", "boiler")).tokens == ()
    assert (await known_device(pool, "boiler")).tokens == ()


async def test_a_rotation_without_overlap_ends_every_older_token_at_once(store: IdentityStore, pool: Pool) -> None:
    first = (await store.add_devices("acme", [NewDevice(device_id="boiler")]))["boiler"]
    second = await store.rotate_token("acme", "boiler", overlap_s=3600)
    third = await store.rotate_token("acme", "boiler", overlap_s=0)
    device = await known_device(pool, "boiler")
    assert [admits(device, token, 0) for token in (first, second, third)] == [False, False, True]


async def test_a_rotation_never_makes_an_older_token_live_longer(store: IdentityStore) -> None:
    await store.add_devices("acme", [NewDevice(device_id="boiler")])
    await store.rotate_token("acme", "boiler", overlap_s=60)
    before = (await store.device("acme", "boiler")).tokens[1].expires_at
    await store.rotate_token("acme", "boiler", overlap_s=86_400)
    assert (await store.device("acme", "boiler")).tokens[2].expires_at == before


async def test_however_often_it_is_rotated_a_device_has_four_tokens_the_newest(
    store: IdentityStore, pool: Pool
) -> None:
    await store.add_devices("acme", [NewDevice(device_id="boiler")])
    issued = [await store.rotate_token("acme", "boiler", overlap_s=3600) for _ in range(6)]
    device = await known_device(pool, "boiler")
    assert [admits(device, token, 0) for token in issued] == [False, False, True, True, True, True]


async def test_rotations_at_once_take_turns(store: IdentityStore, pool: Pool) -> None:
    await store.add_devices("acme", [NewDevice(device_id="boiler")])
    issued = await asyncio.gather(*(store.rotate_token("acme", "boiler", overlap_s=0) for _ in range(4)))
    device = await known_device(pool, "boiler")
    assert sum(admits(device, token, 0) for token in issued) == 1


async def test_pages_follow_one_another_and_filters_hold(store: IdentityStore) -> None:
    await store.add_tenant("beta")
    await store.add_devices("acme", [NewDevice(device_id=f"d{number}") for number in range(5)])
    await store.add_devices("beta", [NewDevice(device_id="d0")])
    await store.set_device_enabled("acme", "d3", False)
    first = await store.devices(limit=3)
    rest = await store.devices(limit=10, after=(first[-1].tenant_id, first[-1].device_id))
    listed = [(device.tenant_id, device.device_id) for device in first + rest]
    assert listed == [*(("acme", f"d{number}") for number in range(5)), ("beta", "d0")]
    assert [device.device_id for device in await store.devices(tenant_id="beta")] == ["d0"]
    assert [device.device_id for device in await store.devices(enabled=False)] == ["d3"]
    assert [tenant.tenant_id for tenant in await store.tenants(after="acme")] == ["beta"]
    await store.set_tenant_enabled("beta", False)
    assert [tenant.tenant_id for tenant in await store.tenants(enabled=True)] == ["acme"]


async def test_the_registry_gets_everything_in_pages_and_by_key(store: IdentityStore, pool: Pool) -> None:
    await store.add_tenant("beta")
    await store.set_tenant_enabled("beta", False)
    await store.add_devices("acme", [NewDevice(device_id=f"d{number}") for number in range(5)])
    await store.set_device_enabled("acme", "d4", False)
    truth = RegistryTruth(pool)
    records: list[Record] = [record async for page in truth.pages(2) for record in page]
    assert records[:2] == [Tenant("acme", True), Tenant("beta", False)]
    assert [device.device_id for device in records[2:] if isinstance(device, Device)] == ["d0", "d1", "d2", "d3", "d4"]
    keys = [tenant_key("beta"), tenant_key("nobody"), device_key("acme", "d4"), device_key("acme", "d9"), "rubbish"]
    assert await truth.load(keys) == {tenant_key("beta"): Tenant("beta", False), device_key("acme", "d4"): records[-1]}
    assert await truth.load([]) == {}


async def test_the_database_itself_refuses_what_is_no_identity(store: IdentityStore, pool: Pool) -> None:
    await store.add_devices("acme", [NewDevice(device_id="boiler")])
    for statement in (
        "INSERT INTO tenants (tenant_id) VALUES ('a.b')",
        "INSERT INTO tenants (tenant_id) VALUES (E'a\\n')",
        "INSERT INTO tenants (tenant_id) VALUES (repeat('x', 65))",
        "INSERT INTO devices (tenant_id, device_id) VALUES ('acme', '')",
        "INSERT INTO devices (tenant_id, device_id, attributes) VALUES ('acme', 'b', '[]')",
        "INSERT INTO device_tokens (tenant_id, device_id, digest) VALUES ('acme', 'boiler', '\\x00')",
    ):
        with pytest.raises(asyncpg.CheckViolationError):
            async with transaction(pool) as connection:
                await connection.execute(statement)


async def test_the_pool_opens_while_postgresql_is_away_and_says_so_when_it_is_used(free_port: int) -> None:
    url = f"postgresql://pulse@127.0.0.1:{free_port}/pulse"
    async with open_pool(url, size_max=1, timeout_s=5, application_name="test") as pool:
        with pytest.raises(Outage):
            await IdentityStore(pool, presence_after=PRESENCE_AFTER).tenant("acme")


async def test_a_pool_without_a_free_connection_is_an_outage_not_an_endless_wait(pool: Pool) -> None:
    async with (
        transaction(pool),
        transaction(pool),
        transaction(pool),
        transaction(pool),
    ):
        with pytest.raises(Outage):
            async with transaction(pool, acquire_timeout_s=0.05):
                pass


async def test_a_connection_that_was_cut_is_an_outage_and_the_next_use_works(store: IdentityStore, pool: Pool) -> None:
    async def cut() -> None:
        async with transaction(pool) as connection, transaction(pool) as other:
            await other.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
            await connection.fetchval("SELECT 1")

    with pytest.raises(Outage):
        await cut()
    assert (await store.tenant("acme")).tenant_id == "acme"
