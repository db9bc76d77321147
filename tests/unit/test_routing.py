"""Routing without a server: what waits, what is sent again, what is buried, and that the event loop is never held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from pulse.domain.dead_letter import Condemned
from pulse.domain.envelope import wrap
from pulse.domain.errors import Outage, Overloaded, PulseError, Reason, Refusal, StreamFull
from pulse.domain.ledger import PositionSet
from pulse.domain.line import InLine
from pulse.domain.receipt import Receipt
from pulse.domain.registry import Change, Complete, Put, Reading, Removed, route_key
from pulse.domain.route import DeviceFilter, Match, Republish, Route, read_job
from pulse.domain.route_index import Predicate
from pulse.domain.routed import Json, RoutedMessage
from pulse.domain.settlement import Message, SignOfLife
from pulse.domain.subjects import MessageType
from pulse.services import routing
from pulse.services.batches import Positioned
from pulse.services.device_attributes import AttributeCache
from pulse.services.device_state import Answered
from pulse.services.route_jobs import WINDOW_JOBS, Job, Jobs, JobSender
from pulse.services.route_table import Matches, RouteKey, RouteMirror, RouteTable
from pulse.services.routing import Attributes, RoutedSettler, Router
from pulse.services.waiting import Batch

LIMIT_S = 20.0
TELEMETRY = MessageType.TELEMETRY


@dataclass
class Publisher:
    """Answers each publish by what `answer` says of it, a turn of the loop later."""

    answer: Callable[[str, bytes, str], Receipt | PulseError] = lambda *_: Receipt("ROUTES", 1)
    sent: list[tuple[str, str, bytes]] = field(default_factory=list)
    pending: int = 0
    most: int = 0

    def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
        self.sent.append((subject, message_id, body))
        answer = self.answer(subject, body, message_id)
        if isinstance(answer, Overloaded):
            raise answer
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Receipt] = loop.create_future()
        self.pending += 1
        self.most = max(self.most, self.pending)

        def land() -> None:
            self.pending -= 1
            if isinstance(answer, Receipt):
                future.set_result(answer)
            else:
                future.set_exception(answer)

        loop.call_soon(land)
        return future

    def ids(self, subject: str = "routes.acme") -> list[str]:
        return [message_id for where, message_id, _ in self.sent if where == subject]


class Compiler:
    """An expression is `yes`, `no`, `odd` (has no answer) or refused."""

    compiled: int = 0

    def compile(self, text: str, *, told: Callable[[str], None]) -> Predicate:
        if text not in ("yes", "no", "odd"):
            raise Refusal(Reason.INVALID_REQUEST, "no expression")
        self.compiled += 1

        def predicate(scope: object) -> bool:
            if text == "odd":
                told("error")
            return text == "yes"

        return predicate

    def scope(self, message: RoutedMessage) -> object:
        return message


@dataclass
class Metrics:
    jobs: int = 0
    no_room: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)

    def routed(self, *, jobs: int, no_room: int, refused: int) -> None:
        self.jobs += jobs
        self.no_room += no_room
        self.refused += refused

    def unanswered(self, reason: str) -> None:
        self.reasons.append(reason)

    def routes(self, count: int) -> None:
        pass


@dataclass
class Lines:
    room: int = 1000
    jobs: list[InLine] = field(default_factory=list)
    away: bool = False

    async def add(self, jobs: Sequence[InLine]) -> Sequence[Receipt | StreamFull]:
        if self.away:
            raise Outage("postgresql", "away")
        answers: list[Receipt | StreamFull] = []
        for job in jobs:
            known = any(each.position == job.position for each in self.jobs)
            if not known and len(self.jobs) >= self.room:
                answers.append(StreamFull("postgresql", "no room"))
                continue
            if not known:
                self.jobs.append(job)
            answers.append(Receipt("lines", 0, duplicate=known))
        return answers


@dataclass
class Devices:
    attributes_of: dict[str, Mapping[str, Json]] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)

    async def attributes(
        self, tenant_id: str, device_ids: Sequence[str]
    ) -> Mapping[str, tuple[Mapping[str, Json], int]]:
        self.asked.append(sorted(device_ids))
        return {each: (self.attributes_of[each], 10) for each in device_ids if each in self.attributes_of}


@dataclass
class Bench:
    publisher: Publisher = field(default_factory=Publisher)
    lines: Lines = field(default_factory=Lines)
    metrics: Metrics = field(default_factory=Metrics)
    devices: Devices = field(default_factory=Devices)
    compiler: Compiler = field(default_factory=Compiler)

    def __post_init__(self) -> None:
        self.table = RouteTable(compiler=self.compiler, metrics=self.metrics)
        self.router = Router(
            table=self.table,
            sender=JobSender(publisher=self.publisher, lines=self.lines, metrics=self.metrics),
            attributes=AttributeCache(self.devices),
            ready_s_max=0.01,
        )

    async def route(self, count: int, *, first: int = 1) -> None:
        messages = {number: said(number) for number in range(first, first + count)}
        stored = [SignOfLife(number, "acme", f"d{number}") for number in messages]
        async with asyncio.timeout(LIMIT_S):
            await self.router.route({TELEMETRY: stored}, messages, PositionSet())


def said(number: int) -> Message:
    body = wrap(
        tenant_id="acme",
        device_id=f"d{number}",
        message_type=TELEMETRY,
        received_ms=1_790_000_000_000,
        source="http",
        payload=b'{"metrics":{"temp":1}}',
    )
    return Message("telemetry.acme", body, b"", "", number, 0, 1)


def route(route_id: str, expression: str = "", *, tenant_id: str = "acme", **values: object) -> Route:
    match = Match(expression=expression, devices=values.pop("devices", DeviceFilter()))  # type: ignore[arg-type]
    fields: dict[str, object] = {"destination": Republish(topic="x"), "match": match} | values
    return Route(tenant_id=tenant_id, route_id=route_id, **fields)  # type: ignore[arg-type]


async def test_nothing_is_routed_before_the_routes_are_known() -> None:
    bench = Bench()
    with pytest.raises(Outage):
        await bench.route(1)
    bench.table.replace([route("all")])
    await bench.route(1)
    assert bench.publisher.ids() == ["1:all"]


async def test_where_there_are_no_routes_nobody_is_asked_for_anything() -> None:
    bench = Bench()
    bench.table.replace([route("theirs", tenant_id="other", devices=DeviceFilter(attributes={"site": "roof"}))])
    await bench.route(3)
    assert (bench.publisher.sent, bench.devices.asked) == ([], [])


async def test_an_outage_in_the_middle_is_told_and_what_was_answered_is_not_sent_again() -> None:
    bench = Bench()
    bench.table.replace([route("a"), route("b")])
    away = True

    def answer(_subject: str, _body: bytes, message_id: str) -> Receipt | PulseError:
        return Outage("nats", "away") if away and message_id == "2:b" else Receipt("ROUTES", 1)

    bench.publisher.answer = answer
    with pytest.raises(Outage):
        await bench.route(3)
    assert bench.publisher.ids() == ["1:a", "1:b", "2:a", "2:b", "3:a", "3:b"]
    away = False
    await bench.route(3)
    assert bench.publisher.ids()[6:] == ["2:b"]
    assert bench.metrics.jobs == 6
    assert bench.router.take_matches() == {("acme", "a"): Matches(3, 0, 0), ("acme", "b"): Matches(3, 0, 0)}


async def test_what_cannot_be_sent_at_once_is_an_outage_and_nothing_on_its_way_is_forgotten() -> None:
    bench = Bench()
    bench.table.replace([route("a")])
    bench.publisher.answer = lambda _subject, _body, message_id: (
        Overloaded("nats", "full") if message_id == "3:a" else Receipt("ROUTES", 1)
    )
    with pytest.raises(Overloaded):
        await bench.route(3)
    assert bench.publisher.pending == 0


async def test_a_job_that_finds_no_room_or_is_too_large_is_a_dead_letter_and_no_refusal_is_raised() -> None:
    bench = Bench()
    bench.table.replace([route("a")])

    def answer(subject: str, body: bytes, message_id: str) -> Receipt | PulseError:
        if subject == "routes.acme":
            return StreamFull("nats", "full") if message_id == "1:a" else Refusal(Reason.TOO_LARGE, "too large")
        letter = msgspec.json.decode(body, type=Condemned)
        if letter.reason is Reason.TOO_LARGE and letter.body:
            return Refusal(Reason.TOO_LARGE, "the letter is larger still")
        return Receipt("DEAD_LETTERS", 1)

    bench.publisher.answer = answer
    await bench.route(2)
    sent = [body for subject, _, body in bench.publisher.sent if subject == "dead.ROUTES"]
    letters = [msgspec.json.decode(body, type=Condemned) for body in sent]
    first, _, last = letters
    assert (first.reason, read_job(first.subject, first.body).message_id) == (Reason.ROUTES_FULL, "1:a")
    assert (last.reason, last.body, last.error) == (Reason.TOO_LARGE, b"", "too large; job 2:a")
    assert (bench.metrics.jobs, bench.metrics.no_room, bench.metrics.refused) == (0, 1, 1)


async def test_where_the_dead_letters_have_no_room_either_the_worker_waits() -> None:
    bench = Bench()
    bench.table.replace([route("a")])
    bench.publisher.answer = lambda *_: StreamFull("nats", "full")
    with pytest.raises(Outage):
        await bench.route(1)


async def test_an_outage_elsewhere_waits_for_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    beats = Match(message_types=(MessageType.HEARTBEAT,), devices=DeviceFilter(attributes={"site": "roof"}))
    bench.table.replace([route("a"), route("b", tenant_id="other"), route("c", match=beats)])

    async def away(*_: object) -> Attributes:
        raise Outage("postgresql", "away")

    monkeypatch.setattr(bench.devices, "attributes", away)
    stored = {TELEMETRY: [SignOfLife(1, "other", "d1")], MessageType.HEARTBEAT: [SignOfLife(2, "acme", "d2")]}
    with pytest.raises(Outage):
        await bench.router.route(stored, {1: said(1), 2: said(2)}, PositionSet())
    assert bench.publisher.ids("routes.other") == ["1:b"]
    assert bench.publisher.pending == 0


async def test_jobs_of_an_ordered_route_stand_in_lines_and_others_in_routes() -> None:
    bench = Bench()
    bench.table.replace([route("line", ordered=True), route("free")])
    await bench.route(3)
    assert [(job.device_id, job.position, job.route_id) for job in bench.lines.jobs] == [
        (f"d{number}", number, "line") for number in (1, 2, 3)
    ]
    assert bench.publisher.ids() == ["1:free", "2:free", "3:free"]
    assert bench.metrics.jobs == 6


async def test_what_finds_no_room_in_its_line_is_a_dead_letter() -> None:
    bench = Bench(lines=Lines(room=1))
    bench.table.replace([route("line", ordered=True)])
    await bench.route(3)
    assert [job.position for job in bench.lines.jobs] == [1]
    assert bench.publisher.ids("dead.ROUTES") == ["2:line", "3:line"]
    assert (bench.metrics.jobs, bench.metrics.no_room) == (1, 2)


async def test_while_lines_are_away_the_worker_is_told_to_wait_and_nothing_is_made_twice() -> None:
    bench = Bench(lines=Lines(away=True))
    bench.table.replace([route("line", ordered=True)])
    with pytest.raises(Outage):
        await bench.route(2)
    bench.lines.away = False
    await bench.route(2)
    await bench.route(2)
    assert [job.position for job in bench.lines.jobs] == [1, 2]
    assert bench.metrics.jobs == 2


async def test_no_more_than_a_window_is_on_its_way() -> None:
    held: list[asyncio.Future[Receipt]] = []

    class Slow(Publisher):
        def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
            held.append(asyncio.get_running_loop().create_future())
            return held[-1]

    publisher = Slow()
    jobs = Jobs(JobSender(publisher=publisher, lines=Lines(), metrics=Metrics()))

    async def add(count: int) -> None:
        for number in range(count):
            await jobs.add(Job("acme", "a", "d1", f"{number}:a", b"{}"))
        await jobs.close()

    adding = asyncio.create_task(add(WINDOW_JOBS + 1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(held) == WINDOW_JOBS
    async with asyncio.timeout(LIMIT_S):
        while not adding.done():
            for future in held:
                if not future.done():
                    future.set_result(Receipt("ROUTES", 1))
            await asyncio.sleep(0)
    assert len(held) == WINDOW_JOBS + 1


async def test_others_have_their_turn_while_messages_are_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TURN_S_MAX", -1.0)
    bench = Bench()
    bench.table.replace([route("a", "no")])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(others())
    await bench.route(100)
    ticking.cancel()
    assert turns >= 99


async def test_an_expression_is_compiled_once_and_again_only_where_it_changed() -> None:
    bench = Bench()
    bench.table.replace([route("a", "yes"), route("b", "yes"), route("c", "no"), route("d", "hostile"), route("e")])
    await bench.route(1)
    assert bench.publisher.ids() == ["1:a", "1:b", "1:e"]
    assert bench.compiler.compiled == 2
    bench.table.put(route("c", "yes", revision=2))
    bench.table.put(route("a", "no", revision=1))
    bench.table.remove("acme", "e")
    await bench.route(1, first=2)
    assert bench.publisher.ids()[3:] == ["2:a", "2:b", "2:c"]
    assert bench.compiler.compiled == 2


async def test_messages_without_an_answer_are_counted_for_each_route_that_asks() -> None:
    bench = Bench()
    bench.table.replace([route("a", "odd"), route("b", "odd"), route("c", "yes")])
    await bench.route(4)
    assert bench.metrics.reasons == ["error"] * 4
    assert bench.router.take_matches() == {
        ("acme", "a"): Matches(0, 0, 4),
        ("acme", "b"): Matches(0, 0, 4),
        ("acme", "c"): Matches(4, 0, 0),
    }
    assert bench.router.take_matches() == {}


async def test_batches_at_once_all_wait_for_routes_that_are_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling yields to the loop; a batch that came in between would miss the routes that are not there yet."""
    bench = Bench()
    slow = bench.table._compile  # what is slow in it depends on the machine

    async def slower(*arguments: Any) -> None:
        await asyncio.sleep(0)
        await slow(*arguments)

    monkeypatch.setattr(bench.table, "_compile", slower)
    bench.table.replace([route("a")])
    await asyncio.gather(*(bench.route(1, first=number) for number in range(1, 6)))
    assert sorted(bench.publisher.ids()) == [f"{number}:a" for number in range(1, 6)]


async def test_attributes_are_asked_for_once_for_a_batch_and_then_kept_for_a_while() -> None:
    now = 0.0
    devices = Devices({"d1": {"site": "roof"}})
    cache = AttributeCache(devices, age_s_max=5.0, clock=lambda: now)
    assert await cache.of("acme", {"d1", "d2"}) == {"d1": {"site": "roof"}, "d2": {}}
    devices.attributes_of["d1"] = {"site": "cellar"}
    now = 4.0
    assert (await cache.of("acme", {"d1", "d3"}))["d1"] == {"site": "roof"}
    assert await cache.of("other", {"d1"}) == {"d1": {"site": "cellar"}}
    now = 6.0
    assert await cache.of("acme", {"d1"}) == {"d1": {"site": "cellar"}}
    assert devices.asked == [["d1", "d2"], ["d3"], ["d1"], ["d1"]]


@dataclass
class Settles:
    """A settler that remembers what it settled, and what was dead of it."""

    settled: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    async def settle(self, batch: Batch, positioned: Positioned) -> None:
        self.settled += [position for position, _ in positioned]

    async def condemn(self, batch: Batch, position: int, message: Message, refusal: Refusal) -> None:
        self.settled.append(position)

    async def dead_among(self, settled: PositionSet) -> PositionSet:
        self.asked.append(str(settled))
        return PositionSet.of([3])


def reported(number: int, *, tenant_id: str = "acme", kind: MessageType = MessageType.SHADOW) -> tuple[int, Message]:
    body = wrap(
        tenant_id=tenant_id,
        device_id=f"d{number}",
        message_type=kind,
        received_ms=1_790_000_000_000,
        source="mqtt",
        payload=b'{"state":{"reported":{"door":"open"}}}',
    )
    return number, Message(f"shadow.{tenant_id}", body, b"", "", number, 0, 1)


async def test_reports_are_routed_once_they_are_settled_but_for_dead_ones_and_what_devices_only_ask() -> None:
    bench = Bench()
    settler = Settles()
    routed = RoutedSettler(settler, router=bench.router, dead_among=settler.dead_among)
    batch = Answered(1, [])
    told = Match(message_types=(MessageType.SHADOW,), expression="yes")
    bench.table.replace([Route(tenant_id="acme", route_id="a", destination=Republish(topic="x"), match=told)])
    broken = 6, Message("shadow.acme", b"{", b"", "", 6, 0, 1)
    messages = [reported(1), reported(2, kind=MessageType.SHADOW_GET), reported(3), broken, reported(7)]
    await routed.settle(batch, messages)
    assert (settler.settled, settler.asked) == ([1, 2, 3, 6, 7], ["{[1,2),[3,4),[7,8)}"])
    assert bench.publisher.ids() == ["1:a", "7:a"]
    await routed.settle(batch, [reported(8, tenant_id="other")])
    await routed.condemn(batch, *reported(9), Refusal(Reason.REFUSED_BY_DATABASE, "no"))
    assert len(settler.asked) == 1
    assert len(bench.publisher.sent) == 2


@dataclass
class Truth:
    """PostgreSQL; away for as many readings as `outages` says."""

    known: list[Route]
    outages: int = 0

    async def routes(self, size: int) -> AsyncGenerator[list[Route], None]:
        if self.outages:
            self.outages -= 1
            raise Outage("postgresql", "away")
        yield self.known


@dataclass
class Feed:
    changes: Iterable[Change]
    told: asyncio.Event = field(default_factory=asyncio.Event)

    async def watch(self) -> AsyncGenerator[Change, None]:
        for change in self.changes:
            yield change
        self.told.set()
        await asyncio.Event().wait()


@dataclass
class Records:
    outages: int = 0
    told: list[dict[RouteKey, Matches]] = field(default_factory=list)

    async def add_matches(self, matches: Mapping[RouteKey, Matches]) -> None:
        if self.outages:
            self.outages -= 1
            raise Outage("postgresql", "away")
        self.told.append(dict(matches))


async def test_the_bucket_tells_of_changes_and_postgresql_of_what_there_is() -> None:
    bench = Bench()
    stale, fresh = route("stale"), route("fresh", revision=2)
    feed = Feed(
        [
            Reading(from_scratch=True),
            Put(stale),
            Complete(),
            Put(fresh),
            Reading(from_scratch=False),
            Removed(route_key("acme", "gone")),
            Complete(),
            Reading(from_scratch=True),
            Complete(),
        ]
    )
    truth = Truth([route("gone"), route("kept"), fresh])
    records = Records(outages=1)
    mirror = RouteMirror(
        feed=feed,
        truth=truth,
        table=bench.table,
        records=records,
        take_matches=bench.router.take_matches,
        tell_s=0.01,
    )
    stop = asyncio.Event()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(mirror.run(stop))
        await feed.told.wait()
        truth.known = []
        assert len(bench.table) == 3
        await bench.route(1)
        while not records.told:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
        await bench.route(1, first=2)
        stop.set()
    assert sorted(bench.publisher.ids()) == ["1:fresh", "1:gone", "1:kept", "2:fresh", "2:gone", "2:kept"]
    assert sum(sum(one.jobs for one in told.values()) for told in records.told) == 6
