"""Group commit against real nats-servers that fsync every message: whoever gets a receipt has a stored message."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats.aio.client
import psutil  # type: ignore[import-untyped]
import pytest
from prometheus_client import CollectorRegistry

from conftest import NatsServerFactory
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats import publication
from pulse.adapters.nats.committer import GroupCommitter
from pulse.adapters.nats.connection import PulseClient, connect, connection
from pulse.domain.errors import Outage, Overloaded, Reason, Refusal, StreamFull
from pulse.domain.receipt import Receipt
from pulse.runtime.metrics import PublishMetrics
from pulse.topology.declared import load

LIMIT_S = 30.0
SUBJECT = "telemetry.acme"
TELEMETRY: dict[str, Any] = {
    stream.name: msgspec.to_builtins(stream) for stream in load().streams
}["TELEMETRY"]  # fmt: skip


async def api(client: PulseClient, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = await client.request(f"$JS.API.{subject}", msgspec.json.encode(body or {}), timeout=LIMIT_S)
    decoded: dict[str, Any] = msgspec.json.decode(answer.data)
    assert "error" not in decoded, decoded["error"]
    return decoded


async def make_stream(client: PulseClient, **changes: Any) -> None:
    await api(client, "STREAM.CREATE.TELEMETRY", TELEMETRY | {"max_msgs_per_subject": -1} | changes)


async def messages_in(client: PulseClient) -> int:
    state: dict[str, int] = (await api(client, "STREAM.INFO.TELEMETRY"))["state"]
    return state["messages"]


async def read_stream(client: PulseClient) -> dict[int, bytes]:
    """Every message of the stream by its sequence."""
    subscription = await client.jetstream().subscribe("telemetry.>", ordered_consumer=True)
    expected = await messages_in(client)
    bodies: dict[int, bytes] = {}
    while len(bodies) < expected:
        message = await subscription.next_msg(timeout=LIMIT_S)
        bodies[message.metadata.sequence.stream] = message.data
    await subscription.unsubscribe()
    return bodies


async def until(condition: Callable[[], Awaitable[bool]], *, limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not await condition():  # noqa: ASYNC110 - the condition is in another process
            await asyncio.sleep(0.02)


async def freeze(server: NatsServer) -> None:
    """SIGSTOP, and wait until it has reached every thread: on a busy machine one could still answer."""
    assert server.pid is not None
    psutil.Process(server.pid).send_signal(signal.SIGSTOP)

    async def is_frozen() -> bool:
        stats = [path.read_text() for path in Path(f"/proc/{server.pid}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    await until(is_frozen)


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with connection(nats.url, name="test") as client:
        yield client


@asynccontextmanager
async def committing(client: PulseClient, **options: Any) -> AsyncIterator[GroupCommitter]:
    given: dict[str, Any] = {"streams": {"telemetry": "TELEMETRY"}, "timeout_s": LIMIT_S}
    async with GroupCommitter(client, **(given | options)) as committer:
        yield committer


async def publish_all(committer: GroupCommitter, ids: Iterable[str]) -> list[Receipt]:
    """Publish one message an id, all at the same time; its body is the id."""
    return await asyncio.gather(*(committer.publish(SUBJECT, id_.encode(), message_id=id_) for id_ in ids))


async def outcome(committer: GroupCommitter, id_: str, body: bytes = b"x") -> Receipt | Refusal | Outage:
    try:
        return await committer.publish(SUBJECT, body, message_id=id_)
    except (Refusal, Outage) as error:
        return error


class Proxy:
    """A TCP proxy before nats-server whose answers can be withheld, and whose connections can be cut."""

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self._listener: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.withholds = False

    @property
    def url(self) -> str:
        assert self._listener is not None
        port = self._listener.sockets[0].getsockname()[1]
        return self._server.url.replace(f":{self._server.port}", f":{port}")

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers += [writer, back_writer]
        for source, target, is_answer in ((reader, back_writer, False), (back_reader, writer, True)):
            task = asyncio.create_task(self._copy(source, target, is_answer=is_answer))
            self._tasks.add(task)

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if not (is_answer and self.withholds):
                    target.write(data)
                    await target.drain()
        target.transport.abort()


async def test_each_receipt_names_the_sequence_of_its_own_message(client: PulseClient) -> None:
    await make_stream(client)
    ids = [f"m{number}" for number in range(3500)]
    async with committing(client) as committer:
        receipts = await publish_all(committer, ids)
    stored = await read_stream(client)
    assert len(stored) == len(ids)
    assert [stored[receipt.seq].decode() for receipt in receipts] == ids
    assert {(receipt.stream, receipt.duplicate) for receipt in receipts} == {("TELEMETRY", False)}


async def test_concurrent_publishes_leave_as_batches_and_one_by_itself_as_a_plain_publish(client: PulseClient) -> None:
    await make_stream(client)
    async with committing(client) as committer:
        await publish_all(committer, ["alone"])
        await publish_all(committer, [f"m{number}" for number in range(400)])
    subscription = await client.jetstream().subscribe("telemetry.>", ordered_consumer=True)
    headers = [(await subscription.next_msg(timeout=LIMIT_S)).headers or {} for _ in range(401)]
    await subscription.unsubscribe()
    assert "Nats-Batch-Id" not in headers[0]
    assert [header["Nats-Batch-Sequence"] for header in headers[1:]] == [str(number) for number in range(1, 401)]


async def test_an_id_that_is_published_again_while_pending_is_one_message(client: PulseClient) -> None:
    await make_stream(client)
    ids = ["a", "same", "b", "same", "same", "c", "same", "same"] * 3
    async with committing(client) as committer:
        receipts = await publish_all(committer, ids)
    assert Counter(receipt.duplicate for receipt in receipts) == {False: 4, True: 20}
    stored = await read_stream(client)
    assert len(stored) == 4
    assert [stored[receipt.seq].decode() for receipt in receipts] == ids


async def test_ids_that_the_stream_has_already_answer_as_duplicates_and_do_not_hurt_their_batch(
    client: PulseClient,
) -> None:
    """From another process, say: nothing local knows of them."""
    await make_stream(client)
    old = [f"m{number}" for number in range(0, 1000, 50)]
    async with committing(client) as other:
        first = dict(zip(old, await publish_all(other, old), strict=True))
    ids = [f"m{number}" for number in range(1000)]
    async with committing(client) as committer:
        receipts = dict(zip(ids, await publish_all(committer, ids), strict=True))
    stored = await read_stream(client)
    assert len(stored) == 1000
    assert all(stored[receipt.seq].decode() == id_ for id_, receipt in receipts.items())
    assert {id_ for id_, receipt in receipts.items() if receipt.duplicate} == set(old)
    assert all(receipts[id_].seq == first[id_].seq for id_ in old)


async def test_a_batch_whose_answer_was_lost_is_stored_once_and_its_callers_learn_their_sequences(
    nats: NatsServer, client: PulseClient
) -> None:
    await make_stream(client)
    ids = [f"m{number}" for number in range(500)]

    async def is_stored() -> bool:
        return await messages_in(client) == len(ids)

    async with Proxy(nats) as proxy:
        behind = await connect(proxy.url, name="behind the proxy")
        async with committing(behind, attempt_timeout_s=2 * LIMIT_S) as committer:
            proxy.withholds = True
            publishing = asyncio.create_task(publish_all(committer, ids))
            await until(is_stored)
            proxy.cut()
            proxy.withholds = False
            receipts = await publishing
        await behind.close()
    stored = await read_stream(client)
    assert [stored[receipt.seq].decode() for receipt in receipts] == ids
    assert all(receipt.duplicate for receipt in receipts)
    assert len(stored) == len(ids)


async def test_an_answer_that_never_comes_is_asked_for_again_on_the_same_connection(
    nats: NatsServer, client: PulseClient
) -> None:
    await make_stream(client)
    ids = [f"m{number}" for number in range(50)]

    async def is_stored() -> bool:
        return await messages_in(client) == len(ids)

    async with Proxy(nats) as proxy:
        behind = await connect(proxy.url, name="behind the proxy")
        async with committing(behind, attempt_timeout_s=0.3) as committer:
            proxy.withholds = True
            publishing = asyncio.create_task(publish_all(committer, ids))
            await until(is_stored)
            proxy.withholds = False
            receipts = await publishing
        await behind.close()
    assert [receipt.seq for receipt in receipts] == list(range(1, 51))
    assert await messages_in(client) == 50


class Load:
    """Callers that publish one message after the other, and ask again under the same id after an Outage."""

    def __init__(self, committer: GroupCommitter, *, name: str) -> None:
        self._committer = committer
        self._name = name
        self.receipts: dict[str, Receipt] = {}
        self.unknown: set[str] = set()
        self.stopping = False

    async def caller(self, number: int) -> None:
        count = 0
        while not self.stopping:
            count += 1
            id_ = f"{self._name}-{number}-{count}"
            while not self.stopping:
                try:
                    receipt = await self._committer.publish(SUBJECT, id_.encode(), message_id=id_)
                except Outage:
                    self.unknown.add(id_)
                    await asyncio.sleep(0.05)
                    continue
                self.receipts[id_] = receipt
                self.unknown.discard(id_)
                break

    async def run(self, callers: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(callers):
                tasks.create_task(self.caller(number))


def check(receipts: dict[str, Receipt], unknown: set[str], stored: dict[int, bytes]) -> None:
    """The oracle: no receipt without its message, no message twice, none that nobody published."""
    lost = [id_ for id_, receipt in receipts.items() if stored.get(receipt.seq) != id_.encode()]
    assert not lost, f"{len(lost)} of {len(receipts)} receipts name a sequence without their message: {lost[:5]}"
    twice = [body for body, count in Counter(stored.values()).items() if count > 1]
    assert not twice, f"{len(twice)} messages are stored twice: {twice[:5]}"
    assert {body.decode() for body in stored.values()} <= receipts.keys() | unknown


@pytest.mark.chaos
async def test_no_receipt_without_its_message_after_kill_9_of_nats_server(nats: NatsServer) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201
    dice = random.Random(seed)
    async with connection(nats.url, name="test") as client:
        await make_stream(client)
        async with committing(client, timeout_s=5.0, attempt_timeout_s=1.0) as committer:
            load = Load(committer, name=f"s{seed}")
            running = asyncio.create_task(load.run(300))
            for _ in range(5):
                await asyncio.sleep(dice.uniform(0.05, 0.6))
                nats.kill()
                await asyncio.sleep(dice.uniform(0.0, 0.3))
                await asyncio.to_thread(nats.start)
                answered = len(load.receipts)

                async def goes_on(answered: int = answered) -> bool:
                    return len(load.receipts) > answered + 300

                await until(goes_on)
            load.stopping = True
            await running
        check(load.receipts, load.unknown, await read_stream(client))
    assert len(load.receipts) > 1000


async def test_what_jetstream_answers_is_counted_by_stream_and_outcome(nats: NatsServer) -> None:
    registry = CollectorRegistry()
    async with connection(nats.url, name="test") as client:
        await make_stream(client)
        async with committing(client, metrics=PublishMetrics(registry)) as committer:
            await publish_all(committer, [f"m{number}" for number in range(500)])
            await committer.publish(SUBJECT, b"m0", message_id="m0")
    counted = {
        outcome: registry.get_sample_value("pulse_published_total", {"stream": "TELEMETRY", "outcome": outcome})
        for outcome in ("stored", "duplicate")
    }
    assert counted == {"stored": 500, "duplicate": 1}
    assert registry.get_sample_value("pulse_publish_batch_messages_sum") == 501
    assert registry.get_sample_value("pulse_publish_seconds_count") == registry.get_sample_value(
        "pulse_publish_batch_messages_count"
    )


@pytest.mark.chaos
async def test_the_same_id_five_times_also_across_a_restart_is_one_message(nats: NatsServer) -> None:
    async with connection(nats.url, name="test") as client:
        await make_stream(client)
        async with committing(client) as committer:
            receipts = [await committer.publish(SUBJECT, b"once", message_id="k/acme/d1/42") for _ in range(2)]
            nats.kill()
            await asyncio.to_thread(nats.start)

            async def is_back() -> bool:
                return isinstance(await outcome(committer, "probe"), Receipt)

            await until(is_back)
            receipts += [await committer.publish(SUBJECT, b"once", message_id="k/acme/d1/42") for _ in range(3)]
        assert [receipt.duplicate for receipt in receipts] == [False, True, True, True, True]
        assert {receipt.seq for receipt in receipts} == {1}
        assert Counter((await read_stream(client)).values())[b"once"] == 1


@pytest.mark.chaos
async def test_what_is_pending_when_nats_dies_is_stored_when_it_is_back(nats: NatsServer) -> None:
    ids = [f"m{number}" for number in range(3000)]
    async with connection(nats.url, name="test") as client:
        await make_stream(client)
        async with committing(client) as committer:
            publishing = asyncio.create_task(publish_all(committer, ids))
            await asyncio.sleep(0)
            await asyncio.sleep(0.005)
            nats.kill()
            await asyncio.to_thread(nats.start)
            receipts = await publishing
        stored = await read_stream(client)
        assert [stored[receipt.seq].decode() for receipt in receipts] == ids
        assert len(stored) == len(ids)


async def test_while_nats_is_known_to_be_away_a_publish_fails_at_once_and_recovers_by_itself(nats: NatsServer) -> None:
    async with connection(nats.url, name="test") as client:
        await make_stream(client)
        async with committing(client) as committer:
            nats.kill()

            async def is_detected() -> bool:
                return not client.is_connected

            await until(is_detected)
            with pytest.raises(Outage, match="NATS is away") as refused:
                committer.submit(SUBJECT, b"x", message_id="a")
            assert refused.value.retry_after_s > 0
            assert committer.pending == 0
            await asyncio.to_thread(nats.start)

            async def is_back() -> bool:
                return isinstance(await outcome(committer, "a"), Receipt)

            await until(is_back)


async def test_beyond_its_bounds_a_publish_is_refused_at_once_and_memory_stays_flat(nats: NatsServer) -> None:
    """NATS hangs: nothing is answered, and nobody has noticed yet."""
    async with connection(nats.url, name="test") as client:
        await make_stream(client)
        async with committing(client, pending_max=2000, timeout_s=8.0, attempt_timeout_s=0.5) as committer:
            await freeze(nats)
            waiting = [committer.submit(SUBJECT, bytes(200), message_id=f"m{number}") for number in range(2000)]
            before = psutil.Process().memory_info().rss
            refused = 0
            for number in range(50_000):
                with contextlib.suppress(Overloaded):
                    committer.submit(SUBJECT, bytes(200), message_id=f"n{number}")
                    refused -= 1
                refused += 1
                if number % 5000 == 0:
                    await asyncio.sleep(0.02)
            assert refused == 50_000
            assert committer.pending == 2000
            assert psutil.Process().memory_info().rss - before < 8 * 1024 * 1024
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(error) for error in outcomes} == {Outage}
            assert committer.pending == 0
            psutil.Process(nats.pid).send_signal(signal.SIGCONT)

            async def is_back() -> bool:
                return isinstance(await outcome(committer, "after"), Receipt)

            await until(is_back)


async def test_pending_bytes_are_bounded_too(client: PulseClient) -> None:
    await make_stream(client)
    async with committing(client, pending_bytes_max=10_000) as committer:
        futures = [committer.submit(SUBJECT, bytes(5000), message_id=f"m{number}") for number in range(2)]
        with pytest.raises(Overloaded):
            committer.submit(SUBJECT, b"x", message_id="one-more")
        await asyncio.gather(*futures)
        await committer.publish(SUBJECT, b"x", message_id="one-more")


async def test_a_message_above_max_payload_is_refused_alone(client: PulseClient) -> None:
    await make_stream(client)
    async with committing(client) as committer:
        bodies = [bytes(10), bytes(client.max_payload - 10), bytes(10), bytes(client.max_payload - 300), bytes(10)]
        outcomes = await asyncio.gather(*(outcome(committer, f"m{n}", body) for n, body in enumerate(bodies)))
        assert [type(one) for one in outcomes] == [Receipt, Refusal, Receipt, Receipt, Receipt]
        assert isinstance(outcomes[1], Refusal)
        assert outcomes[1].reason is Reason.TOO_LARGE
    assert client.stats["reconnects"] == 0


async def test_a_server_that_comes_back_with_a_smaller_max_payload_is_not_sent_what_it_would_hang_up_on(
    nats_server_factory: NatsServerFactory, scratch: Path
) -> None:
    first = nats_server_factory(scratch / "nats", password="secret")
    first.start()
    async with connection(first.url, name="test") as client:
        await make_stream(client)
        async with committing(client, attempt_timeout_s=2 * LIMIT_S) as committer:
            await freeze(first)
            publishing = asyncio.gather(
                *(outcome(committer, f"m{number}", bytes(200_000 if number == 3 else 10)) for number in range(6))
            )
            await asyncio.sleep(0)
            first.kill()
            second = nats_server_factory(
                scratch / "nats",
                password="secret",
                port=first.port,
                monitor_port=first.monitor_port,
                extra_conf="max_payload: 100KB",
            )
            await asyncio.to_thread(second.start)
            outcomes = await publishing
        assert [type(one) for one in outcomes] == [Receipt, Receipt, Receipt, Refusal, Receipt, Receipt]
        assert client.stats["reconnects"] == 1


async def test_a_message_above_the_streams_own_bound_is_refused_alone(client: PulseClient) -> None:
    """The server drops it from the batch without a word, and refuses the batch for the gap."""
    await make_stream(client, max_msg_size=1000)
    async with committing(client) as committer:
        outcomes = await asyncio.gather(
            *(outcome(committer, f"m{number}", bytes(2000 if number == 77 else 10)) for number in range(200))
        )
    refused = [number for number, one in enumerate(outcomes) if not isinstance(one, Receipt)]
    assert refused == [77]
    assert isinstance(outcomes[77], Refusal)
    assert outcomes[77].reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("subject", "message_id"),
    [
        ("telemetry.a b", "m"),
        ("telemetry.a\r\nPUB x 0", "m"),
        ("telemetry.*", "m"),
        ("telemetry.>", "m"),
        ("telemetry.ä", "m"),
        ("", "m"),
        ("nowhere.acme", "m"),
        ("telemetry.acme", ""),
        ("telemetry.acme", "m\r\nNats-Rollup: all"),
        ("telemetry.acme", "m\n"),
        ("telemetry.acme", "ä"),
        ("telemetry.acme", "m" * 513),
    ],
)
async def test_a_subject_or_id_that_is_no_nats_token_is_refused_before_it_reaches_the_wire(
    client: PulseClient, subject: str, message_id: str
) -> None:
    await make_stream(client)
    async with committing(client) as committer:
        with pytest.raises(Refusal):
            await committer.publish(subject, b"x", message_id=message_id)
        await committer.publish(SUBJECT, b"x", message_id="m")


async def test_a_stream_without_allow_atomic_is_served_message_by_message(client: PulseClient) -> None:
    await make_stream(client, allow_atomic=False)
    ids = [f"m{number}" for number in range(300)]
    async with committing(client) as committer:
        receipts = await publish_all(committer, ids)
    stored = await read_stream(client)
    assert [stored[receipt.seq].decode() for receipt in receipts] == ids
    assert len(stored) == len(ids)


async def test_a_stream_that_is_missing_is_an_outage_that_says_so_and_one_that_comes_in_time_is_none(
    client: PulseClient,
) -> None:
    async with committing(client, timeout_s=2.0) as committer:
        failed = await outcome(committer, "a")
        assert isinstance(failed, Outage)
        assert "no stream answers" in failed.message
    async with committing(client) as committer:
        publishing = asyncio.create_task(publish_all(committer, [f"m{number}" for number in range(100)]))
        await asyncio.sleep(0.2)
        await make_stream(client)
        assert sorted(receipt.seq for receipt in await publishing) == list(range(1, 101))


async def test_a_full_stream_fails_its_callers_at_once(client: PulseClient) -> None:
    await make_stream(client, discard="new", max_msgs=150)
    async with committing(client) as committer:
        await publish_all(committer, [f"m{number}" for number in range(150)])
        async with asyncio.timeout(LIMIT_S / 2):
            failed = await asyncio.gather(*(outcome(committer, f"n{number}") for number in range(100)))
    assert {type(one) for one in failed} == {StreamFull}
    assert all("is full" in str(one) for one in failed)
    assert await messages_in(client) == 150


async def test_a_missing_permission_is_named(nats_server_factory: NatsServerFactory) -> None:
    server = nats_server_factory(
        extra_conf="""
        authorization { users: [
            {user: pulse, password: secret, permissions: {publish: {deny: ["telemetry.>"]}}}
        ] }
        """,
        user="pulse",
        password="secret",
    )
    server.start()
    async with connection(server.url, name="test") as client:
        await make_stream(client)
        async with committing(client, timeout_s=2.0) as committer:
            failed = await outcome(committer, "a")
    assert isinstance(failed, Outage)
    assert "permissions violation" in failed.message.lower()


async def test_a_caller_that_goes_away_does_not_break_its_batch(client: PulseClient) -> None:
    await make_stream(client)
    async with committing(client) as committer:
        tasks = [
            asyncio.create_task(committer.publish(SUBJECT, b"x", message_id=f"m{number}")) for number in range(200)
        ]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in outcomes[::2])
        assert all(isinstance(one, Receipt) for one in outcomes[1::2])

        async def is_settled() -> bool:
            return committer.pending == 0

        await until(is_settled)


async def test_close_answers_what_is_pending_first(client: PulseClient) -> None:
    await make_stream(client)
    async with committing(client) as committer:
        futures = [committer.submit(SUBJECT, b"x", message_id=f"m{number}") for number in range(2500)]
    assert all(future.done() for future in futures)
    assert sorted(future.result().seq for future in futures) == list(range(1, 2501))
    with pytest.raises(Outage):
        committer.submit(SUBJECT, b"x", message_id="late")


async def test_close_gives_up_what_cannot_be_answered_within_its_limit(nats: NatsServer) -> None:
    async with connection(nats.url, name="test") as client:
        await make_stream(client)
        async with committing(client, drain_s_max=0.3) as committer:
            await freeze(nats)
            future = committer.submit(SUBJECT, b"x", message_id="m")
        assert nats.pid is not None
        psutil.Process(nats.pid).send_signal(signal.SIGCONT)
        assert isinstance(future.exception(), Outage)


async def test_run_serves_until_it_is_told_to_stop(client: PulseClient) -> None:
    await make_stream(client)
    committer = GroupCommitter(client, streams={"telemetry": "TELEMETRY"})
    with pytest.raises(Outage):
        committer.submit(SUBJECT, b"x", message_id="early")
    stop = asyncio.Event()
    running = asyncio.create_task(committer.run(stop))

    async def is_open() -> bool:
        return isinstance(await outcome(committer, "m"), Receipt)

    await until(is_open)
    stop.set()
    await running


async def test_a_bug_in_what_an_answer_means_ends_it_and_is_not_swallowed_by_nats_py(
    client: PulseClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    await make_stream(client)
    committer = GroupCommitter(client, streams={"telemetry": "TELEMETRY"})
    monkeypatch.setattr(committer, "_execute", broken)
    running = asyncio.create_task(committer.run(asyncio.Event()))

    async def is_open() -> bool:
        with contextlib.suppress(Outage):
            waiting.append(committer.submit(SUBJECT, b"x", message_id="m"))
        return bool(waiting)

    waiting: list[asyncio.Future[Receipt]] = []
    await until(is_open)
    with pytest.raises(RuntimeError, match="a bug"):
        async with asyncio.timeout(LIMIT_S):
            await running
    assert isinstance(waiting[0].exception(), Outage)


class Teller:
    """Waits for a receipt, and notes that it was told inside of what brought it."""

    def __init__(self) -> None:
        self.told: list[Receipt | Refusal | Outage] = []
        self.gone = False
        self.all = asyncio.Event()

    def done(self) -> bool:
        return self.gone

    def set_result(self, receipt: Receipt, /) -> None:
        self.told.append(receipt)
        self.all.set()

    def set_exception(self, error: Refusal | Outage, /) -> None:
        self.told.append(error)
        self.all.set()


async def test_whoever_waits_without_a_future_is_told_once_and_not_at_all_when_gone(client: PulseClient) -> None:
    await make_stream(client)
    async with committing(client) as committer:
        first, follower, gone = Teller(), Teller(), Teller()
        for waiting, message_id in ((first, "m"), (follower, "m"), (gone, "other")):
            committer.send(SUBJECT, b"x", message_id=message_id, waiting=waiting)
        gone.gone = True
        await committer.publish(SUBJECT, b"x", message_id="last")
        await asyncio.gather(first.all.wait(), follower.all.wait())
    assert first.told == [Receipt("TELEMETRY", 1)]
    assert follower.told == [Receipt("TELEMETRY", 1, duplicate=True)]
    assert gone.told == []


async def test_subjects_that_were_checked_are_remembered_within_a_bound(
    client: PulseClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "SUBJECTS_KNOWN_MAX", 3)
    await make_stream(client)
    async with committing(client) as committer:
        for number in range(10):
            await committer.publish(f"telemetry.t{number}", b"x", message_id=f"m{number}")
            assert len(committer._subjects) <= 3
        for subject in ("telemetry.a b", "telemetry.*", "elsewhere.a"):
            for _ in range(2):
                with pytest.raises(Refusal):
                    committer.submit(subject, b"x", message_id="m")


@pytest.fixture
async def cluster(nats_server_factory: NatsServerFactory) -> list[NatsServer]:
    """Three servers, once they have a leader."""
    routes = [ports.free_port() for _ in range(3)]
    urls = ", ".join(f'"nats://127.0.0.1:{route}"' for route in routes)
    servers = [
        nats_server_factory(
            user="pulse",
            password="secret",
            extra_conf=f"""
            server_name: n{number}
            cluster {{ name: test, listen: "127.0.0.1:{route}", routes: [{urls}] }}
            """,
        )
        for number, route in enumerate(routes)
    ]
    await asyncio.gather(*(asyncio.to_thread(server.start) for server in servers))
    return servers


@pytest.mark.chaos
async def test_a_cluster_loses_its_leader_and_no_receipt_loses_its_message(cluster: list[NatsServer]) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201
    dice = random.Random(seed)
    async with connection(",".join(server.url for server in cluster), name="test") as client:

        async def is_made() -> bool:
            try:
                await make_stream(client, num_replicas=3)
            except (AssertionError, nats.errors.Error):
                return False
            return True

        await until(is_made)
        async with committing(client, timeout_s=20.0, attempt_timeout_s=1.0) as committer:
            load = Load(committer, name=f"s{seed}")
            running = asyncio.create_task(load.run(300))
            await asyncio.sleep(dice.uniform(0.5, 1.5))
            leader = (await api(client, "STREAM.INFO.TELEMETRY"))["cluster"]["leader"]
            victim = cluster[int(leader.removeprefix("n"))]
            victim.kill()
            answered, since = len(load.receipts), time.monotonic()

            async def goes_on() -> bool:
                return len(load.receipts) > answered + 3000

            await until(goes_on)
            print(f"{answered} receipts before the kill, 3000 more {time.monotonic() - since:.1f} s after it")  # noqa: T201
            await asyncio.to_thread(victim.start)
            await asyncio.sleep(dice.uniform(0.2, 1.0))
            load.stopping = True
            await running
        check(load.receipts, load.unknown, await read_stream(client))


async def test_the_private_attributes_of_nats_py_that_the_committer_writes_to_are_there(client: PulseClient) -> None:
    """Pins `GroupCommitter._write`: whoever moves to another nats-py reads its `publish` first."""
    assert nats.aio.client.__version__ == "2.16.0"
    assert client._pending == []
    assert client._pending_data_size == 0
    assert client._flush_queue is not None
    subscription = await client.subscribe("somewhere")
    await client.flush()
    frame = b"PUB somewhere 2\r\nhi\r\n"
    client._pending.append(frame)
    client._pending_data_size += len(frame)
    woken = asyncio.get_running_loop().create_future()
    client._flush_queue.put_nowait(woken)
    assert (await subscription.next_msg(timeout=LIMIT_S)).data == b"hi"
    assert woken.done()
    assert client._pending == []
    assert client._pending_data_size == 0
