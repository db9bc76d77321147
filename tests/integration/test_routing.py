"""Routes in the ingest worker, as the role wires it, against a real nats-server and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.expressions.cel import Compiler
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.jetstream import request
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.nats.streams import consumer_state
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Pool, open_connection, open_pool
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.adapters.postgres.routes import RouteStore
from pulse.adapters.sealing.box import Sealer
from pulse.domain.dead_letter import Condemned, Filter
from pulse.domain.envelope import wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import NewDevice
from pulse.domain.ledger import PositionSet, position
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.registry import route_key
from pulse.domain.route import DeviceFilter, Job, Match, Republish, Route, Webhook, read_job
from pulse.domain.settlement import Message, SignOfLife
from pulse.domain.subjects import MessageType
from pulse.runtime.settings import Settings
from pulse.services.reconcile import RegistryReconciler
from pulse.topology.declared import Declared, load
from pulse.wiring.cli import open_dead_letters
from pulse.wiring.ingest import ingest_services
from pulse.wiring.process import Process
from pulse.wiring.rescue import rescue_services

LIMIT_S = 30.0
STREAMS = ("TELEMETRY", "ROUTES", "DEAD_LETTERS", "KV_registry")
TENANT = "acme"
HEADERS = {"X-Api-Key": "not for the edge"}


@dataclass(kw_only=True)
class Bench:
    """A process with a router, and what stands behind it."""

    client: PulseClient
    pool: Pool
    process: Process
    routes: RouteStore
    steps: list[str] = field(default_factory=list)

    async def add(self, route_id: str, *, tenant_id: str = TENANT, **values: object) -> Route:
        """Make a route and tell the edge, as the control API does."""
        fields: dict[str, object] = {"destination": Republish(topic="seen"), **values}
        route = Route(tenant_id=tenant_id, route_id=route_id, **fields)  # type: ignore[arg-type]
        stored, _ = await self.routes.add(route)
        await self.tell(route)
        return stored.route

    async def change(self, route: Route, **values: object) -> None:
        """Change a route and tell the edge."""
        await self.routes.change(
            route.tenant_id, route.route_id, lambda known: msgspec.structs.replace(known, **values)
        )
        await self.tell(route)

    async def tell(self, route: Route) -> None:
        bucket = RegistryBucket(self.client)
        await bucket.project([route_key(route.tenant_id, route.route_id)], RegistryTruth(self.pool).load)

    async def route(self, messages: Sequence[Message], *, dead: Iterable[int] = (), epoch: int = 1) -> None:
        """Route messages that were stored."""
        positioned = {position(epoch, message.sequence): message for message in messages}
        stored = [SignOfLife(at, TENANT, device_of(message)) for at, message in positioned.items()]
        await self.process.router.route({MessageType.TELEMETRY: stored}, positioned, PositionSet.of(dead))

    async def jobs(self) -> list[Job]:
        """What stands in ROUTES, oldest first."""
        return [read_job(subject, body) for subject, body in await self.messages("ROUTES")]

    async def letters(self) -> list[Condemned]:
        """What stands in DEAD_LETTERS, oldest first."""
        return [msgspec.json.decode(body, type=Condemned) for _, body in await self.messages("DEAD_LETTERS")]

    async def messages(self, stream: str) -> list[tuple[str, bytes]]:
        jetstream = self.client.jetstream()
        state = (await jetstream.stream_info(stream)).state
        sequences = range(state.first_seq, state.last_seq + 1) if state.messages else ()
        found = [await jetstream.get_msg(stream, sequence, direct=True) for sequence in sequences]
        return [(str(each.subject), each.data or b"") for each in found]

    async def until_jobs(self, wanted: Callable[[list[Job]], bool], send: Callable[[], Awaitable[None]]) -> None:
        """Send until the jobs are as wanted: what is sent meets whatever the router knows by then."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                await send()
                if wanted(await self.jobs()):
                    return
                await asyncio.sleep(0.02)


def device_of(message: Message) -> str:
    return str(msgspec.json.decode(message.body)["device_id"])


def said(
    sequence: int,
    metrics: str = '"temp":21.5',
    *,
    device_id: str = "boiler-1",
    tenant_id: str = TENANT,
    headers: bytes = b"",
) -> Message:
    """A message of TELEMETRY."""
    body = wrap(
        tenant_id=tenant_id,
        device_id=device_id,
        message_type=MessageType.TELEMETRY,
        received_ms=time.time_ns() // 1_000_000,
        source="mqtt",
        payload=b'{"metrics":{%b}}' % metrics.encode(),
    )
    return Message(f"telemetry.{tenant_id}", body, headers, "", sequence, 0, 1)


def topology(*, routes_bytes_max: int | None = None) -> Declared:
    shipped = load()
    streams = {each.name: each for each in shipped.streams if each.name in STREAMS}
    if routes_bytes_max is not None:
        streams["ROUTES"] = msgspec.structs.replace(streams["ROUTES"], max_bytes=routes_bytes_max)
    consumers = tuple(each for each in shipped.consumers if each.stream in STREAMS)
    return Declared(streams=tuple(streams.values()), consumers=consumers)


@contextlib.asynccontextmanager
async def bench_on(url: str, database: str, declared: Declared) -> AsyncIterator[Bench]:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        client = await enter(connection(url, name="test"))
        provisioner = Provisioner(client)
        await provisioner.apply(declared, await provisioner.plan(declared))
        database_connection = await enter(open_connection(database, timeout_s=10, application_name="test"))
        await migrate(database_connection, available())
        pool = await enter(open_pool(database, size_max=4, timeout_s=10, application_name="test"))
        await IdentityStore(pool, presence_after=PRESENCE_AFTER).add_tenant(TENANT)
        steps: list[str] = []
        process = Process(
            settings=Settings(),
            nats=client,
            pool=pool,
            metrics=CollectorRegistry(),
            probe=steps.append,
            stack=stack,
        )
        bench = Bench(
            client=client,
            pool=pool,
            process=process,
            routes=RouteStore(pool, seals=Sealer(["k" * 32])),
            steps=steps,
        )
        assert process.router
        stop = asyncio.Event()
        tasks = [asyncio.create_task(service.run(stop), name=service.name) for service in process.shared]
        try:
            yield bench
        finally:
            stop.set()
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*tasks)


@pytest.fixture
async def bench(nats: NatsServer, database: str) -> AsyncIterator[Bench]:
    async with bench_on(nats.url, database, topology()) as made:
        yield made


def ids(jobs: Iterable[Job]) -> list[str]:
    return sorted(f"{job.position & 0xFFFF}:{job.route_id}" for job in jobs)


async def test_a_message_becomes_one_job_for_each_route_that_wants_it(bench: Bench) -> None:
    webhook = Webhook(url="https://hooks.example.com/", headers=HEADERS)
    await bench.add("all", destination=webhook)
    await bench.add("hot", match=Match(expression="metrics.temp > 80.0"))
    await bench.add("pumps", match=Match(devices=DeviceFilter(prefix="pump-")))
    await bench.add("off", enabled=False)
    await bench.add("beats", match=Match(message_types=(MessageType.HEARTBEAT,)))
    messages = [said(1), said(2, '"temp":99.5'), said(3, '"door":"open"', device_id="pump-7")]

    await bench.until_jobs(lambda jobs: len(jobs) >= 5, lambda: bench.route(messages))
    await bench.route(messages)
    jobs = await bench.jobs()
    assert ids(jobs) == ["1:all", "2:all", "2:hot", "3:all", "3:pumps"]
    assert b"not for the edge" not in b"".join(body for _, body in await bench.messages("ROUTES"))
    (hot,) = (job for job in jobs if job.route_id == "hot")
    assert (hot.tenant_id, hot.device_id, bytes(hot.payload)) == (TENANT, "boiler-1", b'{"metrics":{"temp":99.5}}')


async def test_messages_that_are_dead_letters_make_no_jobs(bench: Bench) -> None:
    await bench.add("all")
    messages = [said(number) for number in range(1, 5)]
    dead = [position(1, 2), position(1, 3)]
    await bench.until_jobs(lambda jobs: len(jobs) >= 2, lambda: bench.route(messages, dead=dead))
    assert ids(await bench.jobs()) == ["1:all", "4:all"]


async def test_what_a_device_says_again_through_routes_is_counted(bench: Bench) -> None:
    await bench.add("all")
    again = said(1, headers=b"NATS/1.0\r\nPulse-Hops: 2\r\nNats-Msg-Id: x\r\n\r\n")
    await bench.until_jobs(lambda jobs: len(jobs) == 1, lambda: bench.route([again]))
    assert (await bench.jobs())[0].hops == 2


async def test_a_route_that_is_changed_disabled_or_deleted_is_so_for_the_next_message(bench: Bench) -> None:
    route = await bench.add("one", match=Match(expression="metrics.temp > 80.0"))
    other = await bench.add("other")
    sequence = 0

    async def send() -> None:
        nonlocal sequence
        sequence += 1
        await bench.route([said(sequence)])

    def last(jobs: list[Job]) -> set[str]:
        return {job.route_id for job in jobs if job.position & 0xFFFF == sequence}

    await bench.until_jobs(lambda jobs: last(jobs) == {"other"}, send)
    await bench.change(route, match=Match())
    await bench.until_jobs(lambda jobs: last(jobs) == {"one", "other"}, send)
    await bench.change(route, enabled=False)
    await bench.until_jobs(lambda jobs: last(jobs) == {"other"}, send)
    await bench.routes.delete(TENANT, "other", lambda _: None)
    await bench.tell(other)
    await bench.until_jobs(lambda jobs: last(jobs) == set(), send)


async def test_a_filter_by_attributes_asks_for_those_of_the_device_now(bench: Bench) -> None:
    store = IdentityStore(bench.pool, presence_after=PRESENCE_AFTER)
    await store.add_devices(
        TENANT, [NewDevice(device_id="roof", attributes={"site": "roof"}), NewDevice(device_id="cellar")]
    )
    await bench.add("filter", match=Match(devices=DeviceFilter(attributes={"site": "roof"})))
    await bench.add("asks", match=Match(expression="device.attributes.site == 'roof'"))
    messages = [said(1, device_id="roof"), said(2, device_id="cellar"), said(3, device_id="stranger")]
    await bench.until_jobs(lambda jobs: len(jobs) >= 2, lambda: bench.route(messages))
    assert ids(await bench.jobs()) == ["1:asks", "1:filter"]


HOSTILE = (
    "metrics.all(a, metrics.all(b, metrics.all(c, a == b)))",
    "[1, 2, 3].map(x, [x, x]).size() > 0",
    "(" * 500 + "true" + ")" * 500,
    " || ".join(["metrics.a.matches('(a+)+$')"] * 9),
    "'" + "x" * 1000 + "' in metrics",
    "metrics.temp >",
)


@pytest.mark.parametrize("expression", HOSTILE)
async def test_a_hostile_expression_is_refused_or_harmless_and_the_others_go_on(bench: Bench, expression: str) -> None:
    """The control API refuses it; here it is in the table nevertheless."""
    with contextlib.suppress(Refusal):
        predicate = Compiler().compile(expression)
        assert predicate.steps(size=1 << 16, elements=10_000) < 10**9
    await bench.add("hostile", match=Match(expression=expression))
    await bench.add("well")
    many = ",".join(f'"m{number}":1' for number in range(200))
    messages = [said(number, many) for number in range(1, 21)]
    await bench.until_jobs(lambda jobs: len(jobs) >= 20, lambda: bench.route(messages))
    assert {job.route_id for job in await bench.jobs()} == {"well"}


async def test_a_full_queue_delays_nobody_and_what_finds_no_room_is_a_dead_letter(
    nats: NatsServer, database: str
) -> None:
    async with bench_on(nats.url, database, topology(routes_bytes_max=100_000)) as bench:
        await bench.add("all")
        await bench.until_jobs(lambda jobs: len(jobs) == 1, lambda: bench.route([said(1)]))
        messages = [said(number) for number in range(1, 1501)]
        for low in range(0, len(messages), 300):
            await bench.route(messages[low : low + 300])
        jobs, letters = await bench.jobs(), await bench.letters()
        assert jobs
        assert letters
        assert {letter.reason for letter in letters} == {Reason.ROUTES_FULL}
        lost = [read_job(letter.subject, letter.body) for letter in letters]
        assert sorted([*ids(jobs), *ids(lost)]) == sorted(f"{number}:all" for number in range(1, 1501))
        assert {letter.tenant_id for letter in letters} == {TENANT}
    async with open_pool(database, size_max=1, timeout_s=10, application_name="test") as pool:
        health = await RouteStore(pool, seals=None).health(TENANT, "all")
    assert health is not None
    assert (health.jobs, health.no_room) == (len(jobs), len(letters))


async def test_telemetry_is_stored_and_acked_beside_a_full_queue_and_a_replay_delivers_the_rest(
    nats: NatsServer, database: str
) -> None:
    """As the roles are wired; that the queue is emptied stands for the delivery of what it held."""
    async with bench_on(nats.url, database, topology(routes_bytes_max=60_000)) as bench, keep_gc():
        await bench.add("all")
        count = 400
        publishes = [bench.client.jetstream().publish(f"telemetry.{TENANT}", said(n).body) for n in range(count)]
        await asyncio.gather(*publishes)
        stop = asyncio.Event()
        services = [*await ingest_services(bench.process), *await rescue_services(bench.process)]
        roles = [asyncio.create_task(service.run(stop), name=service.name) for service in services]

        async def acked() -> bool:
            state = await consumer_state(bench.client, "TELEMETRY", "ingest-workers")
            return state.ack_floor_stream_seq == count

        async def written_down() -> bool:
            letters = await bench.pool.fetchval("SELECT count(*) FROM dead_letters WHERE reason = 'routes_full'")
            return int(letters) + len(delivered | {job.message_id for job in await bench.jobs()}) == count

        delivered: set[str] = set()
        await until(acked)
        assert await bench.pool.fetchval("SELECT count(*) FROM telemetry") == count
        await until(written_down)
        settings = Settings(nats_url=nats.url, database_url=database)
        async with asyncio.timeout(LIMIT_S), open_dead_letters(settings, to_replay=True) as letters:
            wanted = Filter(reason=Reason.ROUTES_FULL, replayed=False)
            while len(delivered) < count:
                delivered |= {job.message_id for job in await bench.jobs()}
                await request(bench.client, "STREAM.PURGE.ROUTES", {}, _Deleted, doing="deliver")
                found = await letters.page(wanted)
                replaying = letters.replay(wanted, last_id=max((each.id for each in found), default=0))
                async with contextlib.aclosing(replaying):
                    await anext(replaying, None)  # a page: as much as the queue has room for
        stop.set()
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*roles)
    assert {message_id.partition(":")[2] for message_id in delivered} == {"all"}


@contextlib.asynccontextmanager
async def keep_gc() -> AsyncIterator[None]:
    """The role sets the collector for its own process; here it is that of all tests."""
    threshold = gc.get_threshold()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.05)


async def test_a_bucket_that_was_made_anew_takes_no_route_away(bench: Bench) -> None:
    await bench.add("all")
    await bench.until_jobs(lambda jobs: len(jobs) == 1, lambda: bench.route([said(1)]))
    await request(bench.client, "STREAM.DELETE.KV_registry", {}, _Deleted, doing="remove the bucket")
    provisioner = Provisioner(bench.client)
    await provisioner.apply(topology(), await provisioner.plan(topology()))
    late = await bench.add("late")
    sequence = 1

    async def send() -> None:
        nonlocal sequence
        sequence += 1
        await bench.route([said(sequence)])

    await bench.until_jobs(lambda jobs: any(job.route_id == late.route_id for job in jobs), send)
    assert {job.position & 0xFFFF for job in await bench.jobs() if job.route_id == "all"} == set(range(1, sequence + 1))


async def test_a_route_that_the_edge_was_not_told_of_is_told_by_the_reconciler(bench: Bench) -> None:
    truth, bucket = RegistryTruth(bench.pool), RegistryBucket(bench.client)
    reconciler = RegistryReconciler(truth=truth, projection=bucket)
    await reconciler.reconcile_once()
    webhook = Webhook(url="https://hooks.example.com/", headers=HEADERS)
    await bench.routes.add(Route(tenant_id=TENANT, route_id="untold", destination=webhook))
    assert (await reconciler.reconcile_once()).missing == 1
    assert (await reconciler.reconcile_once()).total == 0
    assert await bucket.read([route_key(TENANT, "untold")]) == {
        route_key(TENANT, "untold"): Route(
            tenant_id=TENANT, route_id="untold", destination=Webhook(url="https://hooks.example.com/")
        )
    }
    await bench.routes.delete(TENANT, "untold", lambda _: None)
    assert (await reconciler.reconcile_once()).surplus == 1


class _Deleted(msgspec.Struct, frozen=True):
    success: bool
