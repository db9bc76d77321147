"""The control API on dead letters: filters, pages, one whole, mended and replayed, many at a rate, purged; by whom."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from control_api import Api, control_api, lines, served
from dead_letter_bench import envelope
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.dead_letters import RescueStore
from pulse.adapters.postgres.pool import transaction
from pulse.api.control.entrance import Entrance
from pulse.domain.dead_letter import Condemned, condemned
from pulse.domain.errors import Reason
from pulse.domain.route import make_job, read_job
from worker_bench import until

LETTERS = "/dead-letters"
MINE = "/tenants/acme/dead-letters"


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


async def bury(
    api: Api,
    *bodies: bytes,
    tenant: str | None = "acme",
    device: str | None = "boiler",
    stream: str = "TELEMETRY",
    reason: Reason = Reason.INVALID_PAYLOAD,
) -> list[int]:
    """Have these be dead letters that never came into their stream, as a bridge or a full queue makes them."""
    store = RescueStore(api.pool, probe=lambda _: None)
    epoch = await store.epoch("DEAD_LETTERS", 1)
    for body in bodies:
        letter = Condemned(
            stream=stream,
            subject=f"{stream.lower()}.{tenant}",
            reason=reason,
            error="no",
            body=body,
            headers=b"NATS/1.0\r\nTrace: abc\r\n\r\n",
            tenant_id=tenant,
            device_id=device,
            published_ns=1,
        )
        async with transaction(api.pool) as database:
            position = await database.fetchval("SELECT coalesce(max(position), 0) + 1 FROM dead_letters")
        await store.bury(stream, condemned((epoch << 46) + (position & (2**46 - 1)), letter))
    async with transaction(api.pool) as database:
        rows = await database.fetch("SELECT id FROM dead_letters ORDER BY id DESC LIMIT $1", len(bodies))
    return [row["id"] for row in reversed(rows)]


def job(route_id: str, payload: bytes = b'{"metrics":{"n":1}}') -> bytes:
    return make_job(envelope(payload, tenant="acme", device="boiler"), route_id=route_id, position=7)


async def accepted(api: Api, stream: str = "TELEMETRY") -> int:
    return (await stream_state(api.nats, stream)).last_seq


async def ids(api: Api, path: str = LETTERS, **options: Any) -> list[int]:
    return [each["id"] for each in (await api.get(path, **options)).json()["dead_letters"]]


async def test_letters_are_found_by_filter_and_page_and_shown_whole(api: Api) -> None:
    first, second = await bury(api, b"1", b"\xff")
    third, fourth = await bury(api, job("r-1"), job("r-2"), stream="ROUTES", reason=Reason.ROUTES_FULL)
    (theirs,) = await bury(api, b"5", tenant="other", device="pump")
    for given, found in (
        ({}, [theirs, fourth, third, second, first]),
        ({"tenant_id": "other"}, [theirs]),
        ({"stream": "ROUTES"}, [fourth, third]),
        ({"route_id": "r-1"}, [third]),
        ({"reason": "routes_full", "device_id": "boiler"}, [fourth, third]),
        ({"device_id": "pump"}, [theirs]),
        ({"since": "2020-01-01T00:00:00Z", "state": "waiting"}, [theirs, fourth, third, second, first]),
        ({"until": "2020-01-01T00:00:00Z"}, []),
        ({"state": "replayed"}, []),
        ({"limit": 2, "before": fourth}, [third, second]),
    ):
        assert await ids(api, params=given) == found, given
        if "limit" not in given:
            assert (await api.get(f"{LETTERS}/count", params=given)).json()["count"] == len(found), given
    page = (await api.get(LETTERS, params={"limit": 2})).json()
    assert page["next"] == fourth
    shown = (await api.get(f"{LETTERS}/{third}")).json()
    assert (shown["encoding"], json.loads(shown["body"])["route_id"]) == ("text", "r-1")
    assert shown["headers"] == {"Trace": "abc"}
    assert (shown["dead_letter"]["sequence"], shown["dead_letter"]["route_id"]) == (None, "r-1")
    binary = (await api.get(f"{LETTERS}/{second}")).json()
    assert (binary["encoding"], base64.b64decode(binary["body"])) == ("base64", b"\xff")


async def test_a_tenant_sees_and_changes_its_own_alone(api: Api) -> None:
    (mine,) = await bury(api, envelope(b"{}", tenant="acme"))
    (theirs,) = await bury(api, b"5", tenant="other")
    (nobodys,) = await bury(api, b"6", tenant=None, device=None)
    assert await ids(api, MINE, key=api.acme) == [mine] == await ids(api, MINE)
    for method, path in (
        ("GET", LETTERS),
        ("GET", f"{LETTERS}/count"),
        ("GET", f"{LETTERS}/{mine}"),
        ("POST", f"{LETTERS}/{mine}/replay"),
        ("DELETE", f"{LETTERS}/{mine}"),
        ("GET", "/tenants/other/dead-letters"),
        ("GET", f"/tenants/other/dead-letters/{theirs}"),
    ):
        assert (await api.call(method, path, key=api.acme)).status_code == 403, (method, path)
    everything = {"filter": {}, "confirm": True}
    for path in (f"{LETTERS}/replay", f"{LETTERS}/purge", "/tenants/other/dead-letters/purge"):
        body: object = everything if "purge" in path else {"filter": {}}
        assert (await api.post(path, body, key=api.acme)).status_code == 403
    for letter in (theirs, nobodys):
        for key in (api.acme, api.operator):
            for method, path in (("GET", ""), ("POST", "/replay"), ("DELETE", "")):
                assert (await api.call(method, f"{MINE}/{letter}{path}", key=key)).status_code == 404
    for path, given in (("/replay", {"filter": {}}), ("/purge", everything), (f"/{mine}/replay", None)):
        assert (await api.post(f"{MINE}{path}", given, key=api.acme_reader)).status_code == 403
    assert (await api.call("DELETE", f"{MINE}/{mine}", key=api.acme_reader)).status_code == 403
    assert (await api.post(f"{MINE}/purge", {"filter": {"tenant_id": "other"}, "confirm": True})).status_code == 422
    purged = await api.post(f"{MINE}/purge", everything, key=api.acme)
    assert lines(purged)[-1] == {"summary": {"done": 1, "failed": 0, "total": 1, "stopped": ""}}
    assert await ids(api) == [nobodys, theirs]
    assert (await api.get("/tenants/nobody/dead-letters")).status_code == 404


async def test_one_is_mended_and_replayed_and_what_would_only_die_again_is_refused(api: Api) -> None:
    (letter,) = await bury(api, b"bad")
    for wrong in (
        {"body": '{"metrics":{"n":1}}'},
        {"body": envelope(tenant="other").decode()},
        {"body": "not base64!", "encoding": "base64"},
        {"body": "\ud800"},
    ):
        refused = await api.call(
            "POST", f"{MINE}/{letter}/replay", key=api.acme,
            content=json.dumps(wrong), headers={"Content-Type": "application/json"},
        )  # fmt: skip
        assert refused.status_code in (400, 422), wrong
    assert await accepted(api) == 0
    mended = envelope(tenant="acme", device="boiler")
    sent = await api.post(f"{MINE}/{letter}/replay", {"body": mended.decode()}, key=api.acme)
    assert sent.json() == {"id": letter, "stream": "TELEMETRY", "sequence": 1}
    message = await api.nats.jetstream().get_msg("TELEMETRY", 1)
    assert (message.data, (message.headers or {})["Pulse-Replay-Of"]) == (mended, str(letter))
    encoded = {"body": base64.b64encode(mended).decode(), "encoding": "base64"}
    assert (await api.post(f"{LETTERS}/{letter}/replay", encoded)).json()["sequence"] == 2
    assert (await api.get(f"{MINE}/{letter}")).json()["dead_letter"]["replays"] == 2
    logged = (await api.get("/audit-log", key=api.acme)).json()["changes"]
    assert [(each["action"], each["target"], each["actor"]) for each in logged] == [
        ("dead-letters.replay", str(letter), "operator"), ("dead-letters.replay", str(letter), "acme's"),
    ]  # fmt: skip


async def test_a_job_goes_back_to_its_queue_under_a_new_id_and_a_mended_one_is_still_a_job(api: Api) -> None:
    (letter,) = await bury(api, job("r-1"), stream="ROUTES", reason=Reason.ROUTES_FULL)
    refused = await api.post(f"{MINE}/{letter}/replay", {"body": envelope(tenant="acme").decode()})
    assert (refused.status_code, refused.json()["reason"]) == (422, "invalid_envelope")
    assert (await api.post(f"{MINE}/{letter}/replay")).json()["stream"] == "ROUTES"
    message = await api.nats.jetstream().get_msg("ROUTES", 1)
    assert message.subject == "routes.acme"
    assert read_job("routes.acme", message.data or b"").message_id == "7:r-1"
    assert (message.headers or {})["Nats-Msg-Id"] == f"dead-letter-{letter}-1"
    assert (message.headers or {})["Pulse-Replay-Of"] == str(letter)


async def test_all_that_match_are_replayed_with_their_progress_and_once(api: Api) -> None:
    bodies = [b"%d" % number for number in range(250)]
    await bury(api, *bodies[:100])
    await bury(api, *bodies[100:], reason=Reason.INVALID_JSON)
    wanted = {"reason": "invalid_json", "since": "2020-01-01T00:00:00Z"}
    answer = await api.post(f"{MINE}/replay", {"filter": wanted, "rate_per_s": 10_000}, key=api.acme)
    assert answer.headers["content-type"] == "application/x-ndjson"
    told = lines(answer)
    assert told[:-1] == [
        {"progress": {"done": 100, "failed": 0, "total": 150}}, {"progress": {"done": 150, "failed": 0, "total": 150}},
    ]  # fmt: skip
    assert told[-1] == {"summary": {"done": 150, "failed": 0, "total": 150, "stopped": ""}}
    again = lines(await api.post(f"{LETTERS}/replay", {"filter": {}}))
    assert again[-1]["summary"]["done"] == 100
    assert await accepted(api) == 250
    assert lines(await api.post(f"{LETTERS}/replay", {"filter": {}}))[-1]["summary"]["done"] == 0
    logged = (await api.get("/audit-log")).json()["changes"]
    assert [(each["action"], each["tenant_id"], each["details"]["matching"]) for each in logged] == [
        ("dead-letters.replay", None, 100), ("dead-letters.replay", "acme", 150),
    ]  # fmt: skip
    assert logged[1]["details"]["filter"] == wanted


async def test_those_that_no_stream_takes_are_told_and_kept(api: Api) -> None:
    bad, good = await bury(api, b"1", b"2")
    async with transaction(api.pool) as database:
        await database.execute("UPDATE dead_letters SET stream = 'SHADOW' WHERE id = $1", bad)
    told = lines(await api.post(f"{LETTERS}/replay", {"filter": {}}))
    assert (told[0]["failed"]["id"], told[0]["failed"]["reason"]) == (bad, "conflict")
    assert told[-1] == {"summary": {"done": 2, "failed": 1, "total": 2, "stopped": ""}}
    assert await ids(api, params={"state": "replayed"}) == [good]


async def test_who_closes_the_connection_ends_the_replay(api: Api) -> None:
    await bury(api, *[b"%d" % number for number in range(50)])
    asked = {"filter": {}, "rate_per_s": 5}
    async with served(api) as base, httpx.AsyncClient() as client:
        request = client.build_request(
            "POST", f"{base}{LETTERS}/replay", json=asked, headers={"Authorization": f"Bearer {api.operator}"}
        )
        answer = await client.send(request, stream=True)
        async for line in answer.aiter_lines():
            if json.loads(line)["progress"]["done"] >= 2:
                break
        await answer.aclose()

        async def ended() -> bool:
            assert isinstance(api.app, Entrance)
            return not api.app._requests

        await until(ended)
    assert 2 <= await accepted(api) < 50
    async with transaction(api.pool) as database:
        replayed = await database.fetchval("SELECT count(*) FROM dead_letters WHERE replays > 0")
    assert replayed == await accepted(api)


async def test_a_purge_has_to_be_confirmed_and_leaves_what_has_died_since(api: Api) -> None:
    first, second = await bury(api, b"1", b"2")
    counted = (await api.get(f"{LETTERS}/count")).json()
    assert counted == {"count": 2, "replayed": 0, "last_id": second}
    (late,) = await bury(api, b"3")
    unconfirmed: list[dict[str, Any]] = [{"filter": {}}, {"filter": {}, "confirm": False}, {"confirm": True}]
    for wrong in (*unconfirmed, {"filter": {"all": True}, "confirm": True}):
        assert (await api.post(f"{LETTERS}/purge", wrong)).status_code == 422
    told = lines(await api.post(f"{LETTERS}/purge", {"filter": {}, "confirm": True, "last_id": counted["last_id"]}))
    assert told[-1]["summary"]["done"] == 2
    assert await ids(api) == [late]
    assert (await api.call("DELETE", f"{MINE}/{late}", key=api.acme)).status_code == 204
    assert (await api.get(f"{LETTERS}/{first}")).status_code == 404
    actions = [(each["action"], each["target"]) for each in (await api.get("/audit-log")).json()["changes"]]
    assert actions == [("dead-letters.purge", str(late)), ("dead-letters.purge", "")]


async def test_a_filter_that_says_nothing_sensible_is_refused(api: Api) -> None:
    for given in ({"reason": "boredom"}, {"since": "yesterday"}, {"route_id": "a.b"}, {"before": 0}, {"colour": "red"}):
        assert (await api.get(LETTERS, params=given)).status_code == 422, given
    for path in (f"{LETTERS}/{2**63}", f"{LETTERS}/0"):
        assert (await api.get(path)).status_code == 422
    assert (await api.get(f"{LETTERS}/{2**62}")).status_code == 404
    for rate in (0, 1e9, "fast"):
        assert (await api.post(f"{LETTERS}/replay", {"filter": {}, "rate_per_s": rate})).status_code == 422
    assert (await api.get(f"{LETTERS}/replay")).status_code == 405


async def test_a_replay_without_nats_is_503_and_changes_nothing(api: Api, nats: NatsServer) -> None:
    (letter,) = await bury(api, b"1")
    nats.kill()
    for path, body in ((f"{LETTERS}/replay", {"filter": {}}), (f"{LETTERS}/{letter}/replay", None)):
        assert (await api.post(path, body)).status_code == 503
    assert (await api.get(f"{LETTERS}/{letter}")).json()["dead_letter"]["replays"] == 0
    assert (await api.get("/audit-log")).json()["changes"] == []
