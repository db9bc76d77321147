"""What devices ask for over HTTP, with answerers in the place of the roles that have a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import msgspec
import pytest
from multidict import CIMultiDictProxy

from bridge_process import until
from gateway_process import TOKEN, prepared, serving
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.ask import Answerer, Asker
from pulse.adapters.nats.connection import PulseClient
from pulse.domain.envelope import unwrap
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.runtime.settings import Settings
from pulse.services import polls as polling

DEVICE = "/device/v1/tenant/acme/device/d0"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[PulseClient]:
    async with prepared(nats) as made:
        yield made


def settings(**more: object) -> Settings:
    return msgspec.convert({"gateway_port": ports.free_port(), "gateway_ask_s_max": 20.0, **more}, Settings)


@asynccontextmanager
async def answering(
    client: PulseClient, kind: str, answer: Callable[[str, str, bytes], Awaitable[bytes]], **bounds: float
) -> AsyncIterator[None]:
    answerer = Answerer(client, kind=kind, answer=answer, **bounds)  # type: ignore[arg-type]
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(answerer.run(stop))
        await client.flush()
        yield
        stop.set()


@dataclass
class Commands:
    """What is open for each device; `asked` is set by every question."""

    open: dict[str, list[str]] = field(default_factory=dict)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    questions: int = 0

    async def answer(self, tenant_id: str, device_id: str, _body: bytes) -> bytes:
        self.questions += 1
        self.asked.set()
        listed = [{"commandId": each, "name": "reboot"} for each in self.open.get(device_id, [])]
        return msgspec.json.encode({"commands": listed})


async def get(url: str, path: str, **headers: str) -> tuple[int, CIMultiDictProxy[str], bytes]:
    async with aiohttp.ClientSession() as session, session.get(url + path, headers=AUTH | headers) as answer:
        return answer.status, answer.headers, await answer.read()


async def sent(client: PulseClient) -> list[tuple[str, str]]:
    """(device, command) of all that was reported as sent."""
    context = client.jetstream()
    state = (await context.stream_info("COMMANDS")).state
    found = []
    for sequence in range(max(1, state.first_seq), state.last_seq + 1):
        message = await context.get_msg("COMMANDS", sequence)
        envelope = unwrap(message.subject or "", message.data or b"")
        assert (envelope.msg_type, envelope.source) == ("commands-sent", "http")
        found.append((envelope.device_id, msgspec.json.decode(envelope.payload)["commandId"]))
    return found


async def test_a_device_gets_its_shadow_and_is_told_when_it_knows_it_already(client: PulseClient) -> None:
    async def answer(tenant_id: str, device_id: str, body: bytes) -> bytes:
        return msgspec.json.encode({"state": [tenant_id, device_id, body.decode()], "version": 7})

    async with answering(client, "shadow", answer), serving(client, settings()) as url:
        status, headers, body = await get(url, f"{DEVICE}/shadow")
        assert (status, headers["ETag"]) == (200, '"7"')
        assert msgspec.json.decode(body)["state"] == ["acme", "d0", ""]
        _, _, body = await get(url, f"{DEVICE}/shadow?name=climate")
        assert msgspec.json.decode(body)["state"] == ["acme", "d0", "climate"]
        status, _, body = await get(url, f"{DEVICE}/shadow", **{"If-None-Match": '"7"'})
        assert (status, body) == (304, b"")
        status, _, _ = await get(url, f"{DEVICE}/shadow", **{"If-None-Match": '"6"'})
        assert status == 200


async def test_what_the_answerer_raises_is_the_devices_answer(client: PulseClient) -> None:
    errors: list[Exception] = [Refusal(Reason.NOT_FOUND, "there is no such shadow"), Outage("postgresql", "away")]

    async def answer(_tenant_id: str, _device_id: str, _body: bytes) -> bytes:
        raise errors.pop(0)

    async with answering(client, "shadow", answer), serving(client, settings()) as url:
        status, headers, body = await get(url, f"{DEVICE}/shadow")
        assert (status, headers["Content-Type"]) == (404, "application/problem+json")
        assert msgspec.json.decode(body)["reason"] == "not_found"
        status, headers, _ = await get(url, f"{DEVICE}/shadow")
        assert (status, headers["Retry-After"]) == (503, "1")


async def test_where_nobody_answers_the_device_is_told_to_come_again(client: PulseClient) -> None:
    async with serving(client, settings()) as url:
        for path in ("shadow", "commands?wait=20"):
            status, headers, body = await get(url, f"{DEVICE}/{path}")
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "is not available" in msgspec.json.decode(body)["detail"]


async def test_an_answer_that_takes_too_long_is_a_503(client: PulseClient) -> None:
    async def answer(_tenant_id: str, _device_id: str, _body: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    async with (
        answering(client, "shadow", answer, answer_s_max=0.1, concurrency_max=1),
        serving(client, settings()) as url,
    ):
        answers = await asyncio.gather(*[get(url, f"{DEVICE}/shadow") for _ in range(3)])
    assert [status for status, *_ in answers] == [503] * 3


async def test_commands_that_are_open_come_at_once_and_are_reported_as_sent(client: PulseClient) -> None:
    commands = Commands({"d0": ["c1", "c2"]})
    async with answering(client, "commands", commands.answer), serving(client, settings()) as url:
        status, headers, body = await get(url, f"{DEVICE}/commands?wait=20")
        assert (status, headers["Cache-Control"]) == (200, "no-store")
        assert [each["commandId"] for each in msgspec.json.decode(body)["commands"]] == ["c1", "c2"]
        assert sorted(await sent(client)) == [("d0", "c1"), ("d0", "c2")]


async def test_what_is_handed_out_again_and_again_is_reported_now_and_then(
    client: PulseClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(open={"d0": ["c1", "c2"]})
    async with answering(client, "commands", commands.answer), serving(client, settings()) as url:
        for _ in range(5):
            _, _, body = await get(url, f"{DEVICE}/commands")
            assert [each["commandId"] for each in msgspec.json.decode(body)["commands"]] == ["c1", "c2"]
        assert sorted(await sent(client)) == [("d0", "c1"), ("d0", "c2")]
        commands.open["d0"].append("c3")
        await get(url, f"{DEVICE}/commands")
        assert sorted(await sent(client)) == [("d0", "c1"), ("d0", "c2"), ("d0", "c3")]
        monkeypatch.setattr(polling, "REPORTED_S", 0.0)
        await get(url, f"{DEVICE}/commands")
        assert len(await sent(client)) == 6


async def test_a_command_wakes_the_poll_of_its_device_and_no_other(client: PulseClient) -> None:
    commands = Commands()
    async with answering(client, "commands", commands.answer), serving(client, settings()) as url:
        polls = {
            device: asyncio.create_task(get(url, f"/device/v1/tenant/acme/device/{device}/commands?wait=20"))
            for device in ("d0", "d1")
        }
        await until(lambda: commands.questions == 2, "both wait")
        commands.open["d0"] = ["c1"]
        await client.jetstream().publish("down.acme.d0.commands", b'{"commandId":"c1"}')
        _, _, body = await polls["d0"]
        assert [each["commandId"] for each in msgspec.json.decode(body)["commands"]] == ["c1"]
        assert commands.questions == 3
        assert not polls["d1"].done()
        polls["d1"].cancel()
        assert await sent(client) == [("d0", "c1")]


async def test_a_device_that_polls_hears_once_which_of_its_answers_are_rejected(client: PulseClient) -> None:
    """Before it asks, while it waits, and beside commands."""
    commands = Commands()
    subject, document = "down.acme.d0.commands.ack.rejected", {"code": 404, "message": "no", "commandId": "c9"}

    async def reject() -> None:
        await client.jetstream().publish(subject, msgspec.json.encode(document))

    async def polled(wait: str = "") -> dict[str, list[object]]:
        return msgspec.json.decode((await get(url, f"{DEVICE}/commands{wait}"))[2], type=dict[str, list[object]])

    async with answering(client, "commands", commands.answer), serving(client, settings()) as url:
        poll = asyncio.create_task(polled("?wait=20"))
        await until(lambda: commands.questions == 1, "it waits")
        await reject()
        assert await poll == {"commands": [], "rejected": [document]}
        assert await polled() == {"commands": []}
        commands.open["d0"] = ["c1"]
        await reject()
        await reject()
        await client.flush()
        told: list[dict[str, list[object]]] = []

        async def both() -> bool:
            told.append(await polled())
            return sum(len(each.get("rejected", ())) for each in told) == 2

        await until(both, "both rejections")
        assert all(each["commands"] == [{"commandId": "c1", "name": "reboot"}] for each in told)
        assert (await get(url, "/device/v1/tenant/acme/device/d1/commands"))[2] == b'{"commands":[]}'


async def test_a_poll_ends_empty_and_nothing_is_reported(client: PulseClient) -> None:
    commands = Commands()
    async with answering(client, "commands", commands.answer), serving(client, settings()) as url:
        for wait in ("commands", "commands?wait=0", "commands?wait=0.1"):
            assert (await get(url, f"{DEVICE}/{wait}"))[::2] == (200, b'{"commands":[]}')
        assert commands.questions == 3
        assert await sent(client) == []


async def test_a_device_that_goes_away_frees_its_place(client: PulseClient) -> None:
    commands = Commands()
    async with (
        answering(client, "commands", commands.answer),
        serving(client, settings(gateway_polls_max=1)) as url,
    ):
        first = asyncio.create_task(get(url, f"{DEVICE}/commands?wait=20"))
        await until(lambda: commands.questions == 1, "it waits")
        status, headers, body = await get(url, f"{DEVICE}/commands?wait=20")
        assert (status, headers["Retry-After"], msgspec.json.decode(body)["reason"]) == (503, "1", "overloaded")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

        async def is_free() -> bool:
            return (await get(url, f"{DEVICE}/commands"))[0] == 200

        await until(is_free, "its place is free")


async def test_no_device_takes_the_places_of_others(client: PulseClient) -> None:
    commands = Commands()
    async with (
        answering(client, "commands", commands.answer),
        serving(client, settings(gateway_polls_max=3, gateway_device_reads_max=2)) as url,
    ):
        polls = [asyncio.create_task(get(url, f"{DEVICE}/commands?wait=20")) for _ in range(2)]
        await until(lambda: commands.questions == 2, "both wait")
        for path in ("commands?wait=20", "commands", "shadow"):
            status, headers, body = await get(url, f"{DEVICE}/{path}")
            assert (status, headers["Retry-After"]) == (429, "1")
            assert msgspec.json.decode(body)["limit"] == "gateway_device_reads_max"
        assert (await get(url, "/device/v1/tenant/acme/device/d1/commands"))[0] == 200
        polls[0].cancel()

        async def is_free() -> bool:
            return (await get(url, f"{DEVICE}/commands"))[0] == 200

        await until(is_free, "a place is free")
        polls[1].cancel()
        await asyncio.gather(*polls, return_exceptions=True)


async def test_a_stop_ends_the_polls_with_an_answer(client: PulseClient) -> None:
    commands = Commands()
    async with answering(client, "commands", commands.answer):
        async with serving(client, settings()) as url:
            poll = asyncio.create_task(get(url, f"{DEVICE}/commands?wait=20"))
            await until(lambda: commands.questions == 1, "it waits")
        assert (await poll)[::2] == (200, b'{"commands":[]}')


async def test_a_poll_outlives_a_lost_connection_to_nats(client: PulseClient, nats: NatsServer) -> None:
    commands = Commands()
    async with answering(client, "commands", commands.answer), serving(client, settings()) as url:
        poll = asyncio.create_task(get(url, f"{DEVICE}/commands?wait=25"))
        await until(lambda: commands.questions == 1, "it waits")
        await asyncio.to_thread(nats.kill)
        await asyncio.to_thread(nats.start)
        commands.open["d0"] = ["c1"]

        async def wake() -> bool:
            if client.is_connected:
                await client.publish("down.acme.d0.commands", b"{}")
            return poll.done()

        await until(wake, "it is woken")
        assert (await poll)[0] == 200
        assert await sent(client) == [("d0", "c1")]


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        (f"{DEVICE}/commands?wait=soon", 422, "wait"),
        (f"{DEVICE}/commands?wait=-1", 422, "wait"),
        (f"{DEVICE}/commands?wait=nan", 422, "wait"),
        (f"{DEVICE}/commands?wait=inf", 422, "wait"),
        (f"{DEVICE}/commands?wait=", 422, "wait"),
        (f"{DEVICE}/commands?until=1", 422, "until"),
        (f"{DEVICE}/shadow?name=a%20b", 422, "name"),
        (f"{DEVICE}/shadow?wait=1", 422, "wait"),
        (f"{DEVICE}/telemetry", 404, ""),
        ("/device/v1/tenant/acme", 404, ""),
        ("/device/", 404, ""),
        ("/device/v1/tenant/acme/device/nobody/shadow", 401, ""),
        ("/device/v1/tenant/other/device/d0/shadow", 401, ""),
        ("/device/v1/tenant/a%2Fb/device/d0/shadow", 422, "tenant_id"),
        ("/device/v1/tenant/acme/device/d.0/commands", 422, "device_id"),
        ("/device/v1/tenant/acme/device/*/commands", 422, "device_id"),
    ],
)
async def test_a_request_at_fault_is_told_so(client: PulseClient, path: str, status: int, field: str) -> None:
    async with serving(client, settings()) as url:
        got, headers, body = await get(url, path)
        assert (got, headers["Content-Type"]) == (status, "application/problem+json")
        assert msgspec.json.decode(body).get("field", "") == field


async def test_only_a_token_and_only_a_get_opens_it_and_rates_hold(client: PulseClient) -> None:
    limited = settings(device_messages_per_s=0.01, device_messages_burst=1)
    commands = Commands()
    async with (
        answering(client, "commands", commands.answer),
        serving(client, limited) as url,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{url}{DEVICE}/commands") as answer:
            assert answer.status == 401
        async with session.post(f"{url}{DEVICE}/commands", headers=AUTH) as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET")
        assert (await get(url, f"{DEVICE}/commands"))[0] == 200
        status, headers, _ = await get(url, f"{DEVICE}/commands")
        assert status == 429
        assert int(headers["Retry-After"]) >= 1


async def test_a_question_of_many_goes_to_one_and_more_than_may_wait_are_told(client: PulseClient) -> None:
    release = asyncio.Event()
    asked: list[str] = []

    async def answer(_tenant_id: str, device_id: str, _body: bytes) -> bytes:
        asked.append(device_id)
        await release.wait()
        return b'{"version":1}'

    async with (
        answering(client, "shadow", answer, concurrency_max=1, waiting_max=2, answer_s_max=30.0),
        answering(client, "shadow", answer, concurrency_max=1, waiting_max=2, answer_s_max=30.0),
        serving(client, settings(gateway_ask_s_max=30.0, gateway_device_reads_max=99)) as url,
    ):
        asking = [asyncio.create_task(get(url, f"{DEVICE}/shadow")) for _ in range(30)]
        await until(lambda: sum(each.done() for each in asking) == 26, "all but four are told to come again")
        assert len(asked) == 2
        release.set()
        answers = await asyncio.gather(*asking)
    assert sorted(status for status, *_ in answers) == [200] * 4 + [503] * 26


async def test_a_bug_in_an_answer_is_told_as_an_outage_and_ends_the_service(client: PulseClient) -> None:
    async def answer(_tenant_id: str, _device_id: str, _body: bytes) -> bytes:
        raise ZeroDivisionError

    answering_ends = asyncio.create_task(Answerer(client, kind="shadow", answer=answer).run(asyncio.Event()))
    async with serving(client, settings()) as url:
        await client.flush()
        assert (await get(url, f"{DEVICE}/shadow"))[0] == 503
        with pytest.raises(ExceptionGroup) as caught:
            await answering_ends
    assert caught.group_contains(ZeroDivisionError)


async def test_a_question_about_what_is_no_id_is_refused(client: PulseClient) -> None:
    commands = Commands()
    async with answering(client, "commands", commands.answer):
        with pytest.raises(Refusal) as caught:
            await Asker(client, timeout_s=10.0).ask("commands", "acme", "d$0")
    assert (caught.value.reason, commands.questions) == (Reason.INVALID_IDENTITY, 0)
