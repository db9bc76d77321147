"""Dead letters in the console: found, mended, replayed and purged, one or many, told step by step, and cut off."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import pytest

from console import ORIGIN, Site, console
from dead_letter_bench import envelope
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.streams import stream_state
from pulse.adapters.postgres.dead_letters import RescueStore
from pulse.adapters.postgres.pool import transaction
from pulse.domain.dead_letter import Condemned, condemned
from pulse.domain.errors import Reason
from pulse.domain.route import make_job
from pulse.ui.pages.dead_letters import MENDED_BYTES_MAX

GOOD = envelope(b'{"metrics":{"n":1}}', tenant="acme")
STEPS = {"accept": "application/x-ndjson, application/json", "origin": ORIGIN}
MANY = 250


@pytest.fixture
async def site(database: str, nats: NatsServer) -> AsyncIterator[Site]:
    """A browser with the operator's key signed in."""
    async with console(database, nats, secret_keys="k" * 32) as made:
        await made.sign_in(made.operator)
        yield made


async def bury(
    site: Site,
    *bodies: bytes,
    tenant: str = "acme",
    device: str | None = "boiler",
    stream: str = "TELEMETRY",
    reason: Reason = Reason.INVALID_PAYLOAD,
) -> list[int]:
    """Have these be dead letters that never came into their stream."""
    store = RescueStore(site.pool, probe=lambda _: None)
    epoch = await store.epoch("DEAD_LETTERS", 1)
    async with transaction(site.pool) as database:
        last = await database.fetchval("SELECT coalesce(max(position), 0) FROM dead_letters")
    for number, body in enumerate(bodies, start=1):
        letter = Condemned(
            stream=stream,
            subject=f"{stream.lower()}.{tenant}",
            reason=reason,
            error="no",
            body=body,
            tenant_id=tenant,
            device_id=device,
            published_ns=1,
        )
        await store.bury(stream, condemned((epoch << 46) + ((last + number) & (2**46 - 1)), letter))
    async with transaction(site.pool) as database:
        rows = await database.fetch("SELECT id FROM dead_letters ORDER BY id DESC LIMIT $1", len(bodies))
    return [row["id"] for row in reversed(rows)]


async def bury_many(site: Site, count: int = MANY) -> None:
    """The same of one, so often, at once."""
    await bury(site, GOOD)
    async with transaction(site.pool) as database:
        await database.execute(
            "INSERT INTO dead_letters (stream, position, subject, tenant_id, device_id, reason, error, headers, body,"
            " attempts, published_at, died_at, in_stream)"
            " SELECT stream, position + n, subject, tenant_id, device_id, reason, error, headers, body, attempts,"
            " published_at, died_at, in_stream FROM dead_letters, generate_series(1, $1) AS n",
            count - 1,
        )


def job(route_id: str) -> bytes:
    return make_job(envelope(b'{"metrics":{"n":1}}', tenant="acme", device="boiler"), route_id=route_id, position=7)


async def shown(site: Site, query: str = "") -> list[int]:
    """The ids that the page lists."""
    page = (await site.get(f"/dead-letters{query}")).text
    return [int(found) for found in re.findall(r'<td class="number"><a href="/dead-letters/(\d+)">', page)]


async def accepted(site: Site, stream: str = "TELEMETRY") -> int:
    return (await stream_state(site.nats, stream)).last_seq


async def test_letters_are_found_by_each_filter(site: Site) -> None:
    (first,) = await bury(site, b"1")
    second, third = await bury(site, job("hot"), job("cold"), stream="ROUTES", reason=Reason.DELIVERY_ATTEMPTS)
    (theirs,) = await bury(site, b"5", tenant="other", device="pump")
    for query, found in (
        ("", [theirs, third, second, first]),
        ("?tenant=other", [theirs]),
        ("?stream=ROUTES", [third, second]),
        ("?route=hot", [second]),
        ("?reason=delivery_attempts&device=boiler", [third, second]),
        ("?since=2020-01-01T00:00:00Z&state=waiting", [theirs, third, second, first]),
        ("?until=2020-01-01T00:00:00Z", []),
        ("?state=replayed", []),
    ):
        assert await shown(site, query) == found, query
    assert "route hot" in (await site.get("/dead-letters")).text
    assert "Its route is gone" in (await site.get(f"/dead-letters/{second}")).text


async def test_a_letter_is_mended_and_replayed_and_the_letter_says_so(site: Site) -> None:
    (letter,) = await bury(site, b'{"metrics":')
    page = (await site.get(f"/dead-letters/{letter}")).text
    assert "Mend and replay" in page
    refused = await site.post(f"/dead-letters/{letter}", {"action": "mend", "body": '{"metrics": 1}'})
    assert refused.status_code == 422
    assert "Not replayed" in refused.text
    assert "{&#34;metrics&#34;: 1}" in refused.text
    before = await accepted(site)
    text = json.dumps(json.loads(GOOD), indent=2).replace("\n", "\r\n")
    mended = await site.post(f"/dead-letters/{letter}", {"action": "mend", "body": text})
    assert mended.status_code == 303
    assert await accepted(site) == before + 1
    message = await site.nats.jetstream().get_msg("TELEMETRY", before + 1)
    assert json.loads(message.data or b"") == json.loads(GOOD)
    assert "replayed mended as message" in (await site.get(mended.headers["location"])).text
    assert "mended: true" in (await site.get("/settings/log")).text


async def test_a_body_that_was_not_changed_is_replayed_byte_for_byte(site: Site) -> None:
    (letter,) = await bury(site, GOOD)
    page = (await site.get(f"/dead-letters/{letter}")).text
    found = re.search(r"<textarea name=\"body\"[^>]*>\n(.*?)</textarea>", page, re.DOTALL)
    assert found
    text = found[1].replace("&#34;", '"').replace("\n", "\r\n")
    before = await accepted(site)
    assert (await site.post(f"/dead-letters/{letter}", {"action": "mend", "body": text})).status_code == 303
    assert (await site.nats.jetstream().get_msg("TELEMETRY", before + 1)).data == GOOD


@pytest.mark.parametrize("body", [b"\xff\xfe", b'"' + b"x" * MENDED_BYTES_MAX + b'"'])
async def test_what_is_no_text_or_too_large_is_not_offered_to_be_mended(site: Site, body: bytes) -> None:
    (letter,) = await bury(site, body)
    page = (await site.get(f"/dead-letters/{letter}")).text
    assert "Mend and replay" not in page
    assert "too large to be mended here" in page


async def test_all_that_match_and_wait_are_replayed_and_none_twice(site: Site) -> None:
    await bury(site, GOOD, GOOD, GOOD)
    page = (await site.get("/dead-letters?tenant=acme")).text
    assert "Replay 3<" in page
    before = await accepted(site)
    done = await site.post("/dead-letters/all", {"action": "replay", "tenant": "acme"})
    assert "done=3+replayed" in done.headers["location"]
    assert await accepted(site) == before + 3
    await bury(site, GOOD)
    assert "Replay 1 that wait" in (await site.get("/dead-letters?tenant=acme")).text
    again = await site.post("/dead-letters/all", {"action": "replay", "tenant": "acme"})
    assert "done=1+replayed" in again.headers["location"]
    assert await accepted(site) == before + 4
    assert "Replay 4 again" in (await site.get("/dead-letters?state=replayed")).text


async def test_a_replay_of_many_is_told_step_by_step_and_leads_back(site: Site) -> None:
    await bury_many(site)
    await site.get("/dead-letters")
    form = {"form_token": site.token, "action": "replay", "tenant": "acme"}
    answer = await site.client.post("/dead-letters/all", data=form, headers=STEPS)
    assert answer.headers["content-type"] == "application/x-ndjson"
    told = [json.loads(line) for line in answer.text.splitlines()]
    done = [each["done"] for each in told[:-1]]
    assert done == sorted(done)
    assert (done[-1], {each["total"] for each in told[:-1]}) == (MANY, {MANY})
    assert len(done) > 2
    assert told[-1] == {"go": f"/dead-letters?tenant=acme&done={MANY}+replayed"}
    assert await accepted(site) == MANY


async def test_a_purge_of_many_asks_first_and_is_told_step_by_step(site: Site) -> None:
    await bury_many(site)
    await site.get("/dead-letters")
    asked = await site.post("/dead-letters/all", {"action": "purge", "tenant": "acme"})
    assert f"Purge {MANY} dead letters?" in asked.text
    form = {"form_token": site.token, "action": "purge", "tenant": "acme", "sure": "yes"}
    answer = await site.client.post("/dead-letters/all", data=form, headers=STEPS)
    assert json.loads(answer.text.splitlines()[-1]) == {"go": f"/dead-letters?done={MANY}+purged"}
    assert "No dead letters" in (await site.get("/dead-letters")).text


async def test_a_tenants_key_replays_its_own_alone_and_a_reader_nothing(site: Site) -> None:
    (mine,) = await bury(site, GOOD)
    (theirs,) = await bury(site, GOOD, tenant="other")
    tenant = site.another()
    await tenant.sign_in(site.acme)
    assert await shown(tenant) == [mine]
    assert (await tenant.get(f"/dead-letters/{theirs}")).status_code == 404
    assert (await tenant.post(f"/dead-letters/{theirs}", {"action": "replay"})).status_code == 404
    assert (await tenant.post("/dead-letters/all", {"action": "replay", "tenant": "other"})).status_code == 403
    reader = site.another()
    await reader.sign_in(site.acme_reader)
    assert "Replay" not in (await reader.get(f"/dead-letters/{mine}")).text.replace("Replayed", "")
    for path in (f"/dead-letters/{mine}", "/dead-letters/all"):
        assert (await reader.post(path, {"action": "replay", "body": ""})).status_code == 403
