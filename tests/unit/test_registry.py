"""The registry in memory, the service that feeds it, and the reconciler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.identity import Device, Tenant, TokenDigest, digest, make_token
from pulse.domain.limits import Rate, TenantLimits
from pulse.domain.registry import Change, Complete, Put, Reading, Record, Removed, device_key, record_key, tenant_key
from pulse.services.reconcile import Loader, RegistryReconciler, Repairs
from pulse.services.registry import DeviceRegistry, RegistryMirror

NOW_MS = 1_700_000_000_000
TOKEN = make_token(bytes(32))
BOILER = Device("acme", "boiler", enabled=True, tokens=(TokenDigest(digest(TOKEN)),))
ACME = Tenant("acme", enabled=True)


def registry(*changes: Change) -> DeviceRegistry:
    made = DeviceRegistry()
    for change in (Reading(from_scratch=True), Put(ACME), Put(BOILER), Complete(), *changes):
        made.apply(change)
    return made


def admitted(known: DeviceRegistry) -> bool:
    return known.authenticate("acme", "boiler", TOKEN, NOW_MS)


def test_a_device_is_admitted_with_its_token_and_nobody_else_is() -> None:
    known = registry()
    assert admitted(known)
    assert not known.authenticate("acme", "boiler", make_token(b"x" * 32), NOW_MS)
    assert not known.authenticate("acme", "kettle", TOKEN, NOW_MS)
    assert not known.authenticate("other", "boiler", TOKEN, NOW_MS)
    assert not known.authenticate("acme", "boiler", "", NOW_MS)
    assert known.size == 1


def test_the_stand_in_for_an_unknown_device_has_no_token_that_admits() -> None:
    assert not registry(Put(Tenant("", enabled=True))).authenticate("", "", "", NOW_MS)


@pytest.mark.parametrize(
    "change",
    [
        Put(Tenant("acme", enabled=False)),
        Removed(tenant_key("acme")),
        Put(Device("acme", "boiler", enabled=False, tokens=BOILER.tokens)),
        Put(Device("acme", "boiler", enabled=True)),
        Removed(device_key("acme", "boiler")),
    ],
)
def test_a_change_of_tenant_or_device_is_felt_at_once(change: Change) -> None:
    assert not admitted(registry(change))


def test_a_tenants_own_limits_are_known_until_they_or_the_tenant_are_gone() -> None:
    limits = TenantLimits(messages=Rate(1, 1))
    limited = Put(Tenant("acme", enabled=True, limits=limits))
    assert registry().limits_of("acme") is None
    assert registry(limited).limits_of("acme") == limits
    assert registry(limited, Put(ACME)).limits_of("acme") is None
    assert registry(limited, Removed(tenant_key("acme"))).limits_of("acme") is None
    again = registry(limited, Reading(from_scratch=True), Put(ACME))
    assert again.limits_of("acme") == limits
    again.apply(Complete())
    assert again.limits_of("acme") is None


def test_a_device_whose_tenant_is_not_known_is_not_admitted() -> None:
    known = DeviceRegistry()
    for change in (Reading(from_scratch=True), Put(BOILER), Complete()):
        known.apply(change)
    assert known.device("acme", "boiler") == BOILER
    assert not admitted(known)


def test_nobody_is_admitted_before_the_first_state_is_complete() -> None:
    known = DeviceRegistry()
    for change in (Reading(from_scratch=True), Put(ACME), Put(BOILER)):
        known.apply(change)
    assert (known.ready, admitted(known)) == (False, False)
    known.apply(Complete())
    assert (known.ready, admitted(known)) == (True, True)


def test_while_it_is_read_again_the_old_state_serves_and_afterwards_what_vanished_is_gone() -> None:
    known = registry(Reading(from_scratch=True), Put(ACME))
    assert known.ready
    assert admitted(known)
    known.apply(Complete())
    assert not admitted(known)
    assert known.size == 0


def test_a_reading_that_breaks_off_changes_nothing() -> None:
    known = registry(Reading(from_scratch=True), Put(Tenant("other", enabled=True)), Reading(from_scratch=True))
    known.apply(Put(ACME))
    known.apply(Complete())
    assert not known.tenant_enabled("other")


def test_reading_on_keeps_what_is_known() -> None:
    known = registry(Reading(from_scratch=False), Removed(device_key("acme", "kettle")), Complete())
    assert admitted(known)


def test_a_removal_of_what_is_not_there_or_no_key_is_harmless() -> None:
    known = registry(Removed("session.x"), Removed("device.other.x"), Removed("tenant.other"))
    assert admitted(known)


tokens = st.builds(TokenDigest, st.binary(min_size=32, max_size=32), st.none() | st.integers(0, 2**62))


@given(st.builds(Device, st.just("acme"), st.just("boiler"), st.booleans(), st.lists(tokens, max_size=4).map(tuple)))
def test_a_device_comes_out_as_it_went_in(device: Device) -> None:
    assert registry(Put(device)).device("acme", "boiler") == device


class Feed:
    """Tells `changes`, then waits for ever."""

    def __init__(self, changes: Iterable[Change], error: Exception | None = None) -> None:
        self._changes = changes
        self._error = error
        self.told = asyncio.Event()

    async def watch(self) -> AsyncGenerator[Change, None]:
        for change in self._changes:
            yield change
        self.told.set()
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()


async def test_the_mirror_follows_its_feed_until_it_is_stopped() -> None:
    feed, known, stop = (
        Feed([Reading(from_scratch=True), Put(ACME), Put(BOILER), Complete()]),
        DeviceRegistry(),
        asyncio.Event(),
    )
    mirror = asyncio.create_task(RegistryMirror(feed=feed, registry=known).run(stop))
    await feed.told.wait()
    assert admitted(known)
    stop.set()
    await asyncio.wait_for(mirror, 5)


async def test_a_feed_that_fails_ends_the_mirror_with_its_error() -> None:
    feed = Feed([], RuntimeError("a bug"))
    with pytest.raises(ExceptionGroup) as raised:
        await asyncio.wait_for(RegistryMirror(feed=feed, registry=DeviceRegistry()).run(asyncio.Event()), 5)
    assert raised.group_contains(RuntimeError, match="a bug")


class MemoryTruth:
    """PostgreSQL; what is in `hidden` commits only after the pages were read."""

    def __init__(self, records: Iterable[Record], later: Iterable[Record] = ()) -> None:
        self.records = {record_key(record): record for record in records}
        self._later = {record_key(record): record for record in later}

    async def pages(self, size: int) -> AsyncGenerator[list[Record], None]:
        records = list(self.records.values())
        self.records |= self._later
        for begin in range(0, len(records), size):
            yield records[begin : begin + size]

    async def load(self, keys: Sequence[str]) -> Mapping[str, Record]:
        return {key: self.records[key] for key in keys if key in self.records}


class MemoryProjection:
    def __init__(self, entries: Mapping[str, Record | None]) -> None:
        self.entries = dict(entries)

    async def key_pages(self) -> AsyncGenerator[list[str], None]:
        yield list(self.entries)

    async def read(self, keys: Sequence[str]) -> Mapping[str, Record | None]:
        return {key: self.entries[key] for key in keys if key in self.entries}

    async def project(self, keys: Sequence[str], load: Loader) -> frozenset[str]:
        records = await load(keys)
        changed = set()
        for key in keys:
            before = self.entries.get(key)
            if key in records and (before is None or before != records[key]):
                self.entries[key] = records[key]
                changed.add(key)
            elif key not in records and key in self.entries:
                del self.entries[key]
                changed.add(key)
        return frozenset(changed)


async def reconcile(truth: MemoryTruth, projection: MemoryProjection) -> Repairs:
    reconciler = RegistryReconciler(truth=truth, projection=projection, clock_ns=lambda: NOW_MS * 1_000_000)
    return await reconciler.reconcile_once()


async def test_what_is_missing_stale_unreadable_or_surplus_is_repaired_and_counted() -> None:
    disabled = Device("acme", "stale", enabled=False)
    garbled = Device("acme", "garbled", enabled=True)
    truth = MemoryTruth([ACME, BOILER, disabled, garbled])
    projection = MemoryProjection(
        {
            "tenant.acme": ACME,
            "device.acme.stale": Device("acme", "stale", enabled=True),
            "device.acme.garbled": None,
            "device.acme.gone": Device("acme", "gone", enabled=True),
            "rubbish": None,
        }
    )
    assert await reconcile(truth, projection) == Repairs(checked=4, missing=1, stale=2, surplus=2)
    assert projection.entries == truth.records
    assert await reconcile(truth, projection) == Repairs(checked=4)


async def test_a_commit_during_the_comparison_wins_over_what_was_read_before() -> None:
    disabled = Device("acme", "boiler", enabled=False)
    truth = MemoryTruth([ACME, BOILER], later=[disabled])
    projection = MemoryProjection({"tenant.acme": ACME, "device.acme.boiler": disabled})
    assert (await reconcile(truth, projection)).total == 0
    assert projection.entries["device.acme.boiler"] == disabled


async def test_tokens_that_expired_are_no_difference() -> None:
    expired = TokenDigest(b"e" * 32, NOW_MS - 1)
    projection = MemoryProjection(
        {"tenant.acme": ACME, "device.acme.boiler": Device("acme", "boiler", True, (*BOILER.tokens, expired))}
    )
    assert (await reconcile(MemoryTruth([ACME, BOILER]), projection)).total == 0
