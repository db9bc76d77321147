"""Shadows in PostgreSQL: whoever changes them together, and whatever is left of what was deleted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.outbox import Outbox
from pulse.adapters.postgres.pool import Pool, Scoped, open_connection, open_pool
from pulse.adapters.postgres.shadow_settling import ShadowSettlements
from pulse.adapters.postgres.shadows import SLOTS, ShadowStore
from pulse.domain.errors import LimitExceeded, Refusal, VersionConflict
from pulse.domain.shadow import Sections, Shadow, Update
from pulse.domain.shadow_requests import DEVICE, Changed, Request, change, removal
from shadow_bench import BOUNDS, NAMES_MAX, STREAM, key

RACES = int(os.environ.get("PULSE_TEST_RACES", "200"))


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with open_connection(database, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())
    async with open_pool(database, size_max=8, timeout_s=10, application_name="test") as pool:
        yield pool


@pytest.fixture
def store(pool: Pool) -> ShadowStore:
    return ShadowStore(pool, names_max=NAMES_MAX)


def desire(
    state: dict[str, object], *, version: int | None = None, name: str = "", device_id: str = "d1"
) -> Callable[[Shadow], Changed]:
    """As the control API decides."""
    update = Update(Sections(desired=state)) if version is None else Update(Sections(desired=state), version)
    return lambda shadow: change(
        key(device_id, name), shadow, update, at_ms=1000 + shadow.version, who="a key", bounds=BOUNDS
    )


def remove(at_ms: int, *, name: str = "", device_id: str = "d1") -> Callable[[Shadow], Changed]:
    """As the control API deletes."""
    return lambda shadow: removal(key(device_id, name), shadow, at_ms=at_ms, who="another")


async def test_of_two_writers_with_one_version_one_wins_and_the_other_hears_the_version_that_there_is(
    store: ShadowStore,
) -> None:
    """200 races between two writers, each with the version that it has read: no update is lost."""
    for race in range(RACES):
        results = await asyncio.gather(
            *(store.change(key(), desire({f"r{race}": writer}, version=race)) for writer in ("first", "second")),
            return_exceptions=True,
        )
        won = [result for result in results if not isinstance(result, BaseException)]
        lost = [result for result in results if isinstance(result, VersionConflict)]
        assert (len(won), len(lost)) == (1, 1), results
        assert won[0].shadow.version == lost[0].version == race + 1
    shadow = await store.shadow(key())
    assert (shadow.version, len(shadow.desired.state)) == (RACES, RACES)


async def test_writers_without_a_version_and_the_worker_all_have_their_effect(store: ShadowStore, pool: Pool) -> None:
    """Each of them reads what the others have made, whichever shadow of the device it changes."""
    worker = ShadowSettlements(pool, stream=STREAM, bounds=BOUNDS, names_max=NAMES_MAX)

    async def report(at: int, name: str) -> None:
        update = Update(Sections(reported={f"d{at}": at}))
        await worker.settle([Request((1 << 46) + at, key(name=name), at, update, "update")], [])

    for race in range(25):
        await asyncio.gather(
            *(store.change(key(name=name), desire({f"p{race}{name}": race}, name=name)) for name in ("", "n")),
            *(report(4 * race + index, "n" if index % 2 else "") for index in range(1, 5)),
        )
    for name in ("", "n"):
        shadow = await store.shadow(key(name=name))
        assert (shadow.version, len(shadow.desired.state), len(shadow.reported.state)) == (75, 25, 50)


async def test_the_last_changes_are_kept_and_no_more(store: ShadowStore) -> None:
    for number in range(SLOTS + 5):
        await store.change(key(), desire({"n": number}))
    await store.change(key(), remove(9999))
    changes = await store.changes(key())
    assert [change.version for change in changes] == list(range(7, SLOTS + 7))
    assert (changes[-1].who, changes[-1].patch, changes[-1].at_ms) == ("another", None, 9999)
    assert (changes[-2].who, changes[-2].patch) == ("a key", {"desired": {"n": SLOTS + 4}})
    assert await store.changes(key("nobody")) == []
    assert await store.shadow(key("nobody")) == Shadow()


async def test_what_a_decision_raises_undoes_all_of_it(store: ShadowStore, pool: Pool) -> None:
    await store.change(key(), desire({"a": 1}))
    for wrong in (desire({"a": 2}, version=7), desire({"a": "x" * 9000})):
        with pytest.raises(Refusal):
            await store.change(key(), wrong)
    with pytest.raises(Refusal, match="no such shadow"):
        await store.change(key("d2"), remove(1, device_id="d2"))
    assert (await store.shadow(key())).version == 1
    assert len(await Outbox(pool, "shadow").oldest(10)) == 2  # accepted and delta of the one that was
    assert await pool.fetchval("SELECT count(*) FROM shadows") == 1


async def test_a_deleted_shadow_keeps_its_version_until_the_device_has_too_many_names(
    store: ShadowStore, pool: Pool
) -> None:
    assert NAMES_MAX == 3
    for name in ("a", "b", "c"):
        await store.change(key(name=name), desire({"x": 1}, name=name))
    with pytest.raises(LimitExceeded) as raised:
        await store.change(key(name="d"), desire({"x": 1}, name="d"))
    assert (raised.value.limit, raised.value.value) == ("shadow_names_max", 3)
    for at_ms, name in ((2001, "b"), (2002, "a")):
        await store.change(key(name=name), remove(at_ms, name=name))
    assert await store.names("t1", "d1") == ["c"]
    again = await store.change(key(name="b"), desire({"y": 1}, name="b"))
    assert (again.shadow.version, again.shadow.desired.state) == (3, {"y": 1})
    await store.change(key(name="b"), remove(2003, name="b"))
    await store.change(key(name="d"), desire({"x": 1}, name="d"))
    left = {row["name"] for row in await pool.fetch("SELECT name FROM shadows WHERE device_id = 'd1'")}
    assert left == {"", "b", "c", "d"}, "the one that was deleted first has made room"
    assert await pool.fetchval("SELECT count(*) FROM shadow_changes WHERE name = 'a'") == 0


async def test_names_made_at_one_moment_are_not_more_than_a_device_may_have(store: ShadowStore) -> None:
    results = await asyncio.gather(
        *(store.change(key(name=f"n{number}"), desire({"x": 1}, name=f"n{number}")) for number in range(8)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, Changed) for result in results) == NAMES_MAX
    assert sum(isinstance(result, LimitExceeded) for result in results) == 8 - NAMES_MAX
    assert len(await store.names("t1", "d1")) == NAMES_MAX


async def test_a_key_of_a_tenant_reaches_its_own_shadows_alone(pool: Pool) -> None:
    own, strange = (
        ShadowStore(Scoped(pool=pool, tenant_id=tenant_id), names_max=NAMES_MAX) for tenant_id in ("t1", "t2")
    )
    for name in ("", "a", "b", "c"):
        await own.change(key(name=name), desire({"x": 1}, name=name))
    await own.change(key(name="a"), remove(1, name="a"))
    await own.change(key(name="d"), desire({"x": 1}, name="d"))  # which forgets "a": it may delete
    assert await own.names("t1", "d1") == ["", "b", "c", "d"]
    assert await strange.shadow(key()) == Shadow()
    assert await strange.names("t1", "d1") == []
    assert await strange.changes(key()) == []
    with pytest.raises(Exception, match="row-level security"):
        await strange.change(key("d2"), desire({"x": 2}, device_id="d2"))


async def test_a_device_that_was_never_heard_of_may_be_asked_for_and_leaves_no_names(pool: Pool) -> None:
    assert DEVICE == "device"
    store = ShadowStore(pool, names_max=NAMES_MAX)
    reads = partial(store.shadow, key(name="nothing"))
    assert [await reads(), await reads()] == [Shadow(), Shadow()]
    assert await pool.fetchval("SELECT count(*) FROM shadows") == 0
