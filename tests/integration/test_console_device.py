"""A device's shadow and commands on its page: what is asked for, by whom, and what becomes of two who ask at once."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest

from console import Site, console
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.commands import CommandStore
from pulse.adapters.postgres.pool import Scoped
from pulse.adapters.postgres.shadows import ShadowStore
from pulse.adapters.postgres.telemetry_query import TelemetryReader
from pulse.domain.command import Command, State
from pulse.domain.shadow import Shadow, ShadowKey
from pulse.runtime.settings import Settings
from pulse.services.device_watch import DeviceWatch
from pulse.services.live_tail import DeviceTail

BOILER = "/devices/acme/boiler"
KEY = ShadowKey("acme", "boiler")
NAMES_MAX, OPEN_MAX = 10, 100


@pytest.fixture
async def site(database: str, nats: NatsServer) -> AsyncIterator[Site]:
    """A browser with the key of the tenant acme signed in."""
    async with console(database, nats) as made:
        await made.sign_in(made.acme)
        yield made


async def shadow_of(site: Site, key: ShadowKey = KEY) -> Shadow:
    return await ShadowStore(Scoped(pool=site.pool), names_max=NAMES_MAX).shadow(key)


async def commands_of(site: Site) -> list[Command]:
    return await CommandStore(Scoped(pool=site.pool), open_max=OPEN_MAX).commands("acme", device_id="boiler")


async def desire(site: Site, text: str, *, version: int, path: str = f"{BOILER}/shadow") -> tuple[int, str]:
    """The status and text of the answer."""
    answer = await site.post(path, {"version": str(version), "desired": text})
    return answer.status_code, answer.text


async def test_what_is_typed_is_what_is_desired_and_what_is_taken_out_no_more(site: Site) -> None:
    assert "Nothing is desired of it" in (await site.get(BOILER)).text
    assert (await desire(site, '{"power":"on","light":{"red":1,"blue":2}}', version=0))[0] == 303
    assert (await desire(site, '{"light":{"red":1}, "power":null}', version=1))[0] == 303
    shadow = await shadow_of(site)
    assert (shadow.desired.state, shadow.version) == ({"light": {"red": 1}}, 2)
    page = (await site.get(BOILER)).text
    assert "&#34;red&#34;: 1" in page
    assert "power" not in page


async def test_of_two_who_edit_one_version_the_second_sees_both_and_decides(site: Site) -> None:
    assert (await desire(site, '{"mode":"eco"}', version=0))[0] == 303
    assert (await desire(site, '{"mode":"day"}', version=1))[0] == 303
    status, page = await desire(site, '{"mode":"night"}', version=1)
    assert status == 409
    assert "You began with version 1; it is at version 2 now" in page
    assert "&#34;day&#34;" in page
    assert "&#34;night&#34;" in page
    assert (await shadow_of(site)).desired.state == {"mode": "day"}
    offered = re.search(r'name="version" value="(\d+)"', page)
    assert offered
    assert (await desire(site, '{"mode":"night"}', version=int(offered[1])))[0] == 303
    assert (await shadow_of(site)).desired.state == {"mode": "night"}


async def test_a_save_that_changes_nothing_makes_no_version(site: Site) -> None:
    await desire(site, '{"mode":"eco"}', version=0)
    assert (await desire(site, ' {"mode" : "eco"} ', version=1))[0] == 303
    assert (await shadow_of(site)).version == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "desired: "),
        ("[]", "Expected `object`"),
        ('{"a":' * 40 + "1" + "}" * 40, "desired"),
        ('{"a":"%s"}' % ("x" * 100_000), "shadow_bytes_max"),
    ],
)
async def test_what_cannot_be_desired_is_kept_in_the_form_and_says_why(site: Site, text: str, said: str) -> None:
    status, page = await desire(site, text, version=0)
    assert status == 422
    assert said in page or "bytes" in page
    assert 'role="alert"' in page
    assert "<textarea" in page
    assert (await shadow_of(site)).version == 0


@pytest.mark.parametrize("version", ["", "-1", "²", "9" * 40])
async def test_a_form_without_a_version_changes_nothing(site: Site, version: str) -> None:
    answer = await site.post(f"{BOILER}/shadow", {"version": version, "desired": '{"a":1}'})
    assert answer.status_code == 422
    assert (await shadow_of(site)).version == 0


async def test_a_named_shadow_has_a_page_of_its_own(site: Site) -> None:
    assert (await desire(site, '{"a":1}', version=0, path=f"{BOILER}/shadow?shadow=lamp"))[0] == 303
    assert (await shadow_of(site)).version == 0
    assert (await shadow_of(site, ShadowKey("acme", "boiler", "lamp"))).desired.state == {"a": 1}
    assert "?shadow=lamp#shadow" in (await site.get(BOILER)).text
    assert "&#34;a&#34;: 1" in (await site.get(f"{BOILER}?shadow=lamp")).text


async def test_a_command_sent_twice_by_one_form_is_one_and_stands_in_the_log(site: Site) -> None:
    await site.get(BOILER)
    fields = {"name": "reboot", "payload": '{"delay_s":5}', "ttl_s": "60", "once": "abc"}
    for _ in range(2):
        assert (await site.post(f"{BOILER}/commands", fields)).status_code == 303
    (made,) = await commands_of(site)
    assert (made.name, made.payload, made.state) == ("reboot", b'{"delay_s":5}', State.QUEUED)
    assert made.expires_ms - made.created_ms == 60_000
    assert made.created_by == "acme's"
    page = (await site.get(f"{BOILER}/commands/{made.command_id}")).text
    assert "queued" in page
    assert "Cancel it" in page
    assert "command.create" in (await site.get("/settings/log")).text


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "", "payload": "{}"},
        {"name": "a b", "payload": "{}"},
        {"name": "a", "payload": "{"},
        {"name": "a", "payload": "{}", "ttl_s": "soon"},
        {"name": "a", "payload": "{}", "ttl_s": "nan"},
        {"name": "a", "payload": "{}", "ttl_s": "inf"},
        {"name": "a", "payload": "{}", "ttl_s": "0"},
    ],
)
async def test_a_command_that_cannot_be_sent_is_kept_in_the_form(site: Site, fields: dict[str, str]) -> None:
    answer = await site.post(f"{BOILER}/commands", fields)
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert await commands_of(site) == []


async def test_cancelling_ends_a_command_of_that_device_alone(site: Site) -> None:
    await site.post(f"{BOILER}/commands", {"name": "reboot", "payload": "", "once": "abc"})
    (made,) = await commands_of(site)
    elsewhere = await site.post(f"/devices/acme/other/commands/{made.command_id}/cancel", {})
    assert elsewhere.status_code == 404
    assert (await site.post(f"{BOILER}/commands/{made.command_id}/cancel", {})).status_code == 303
    assert [each.state for each in await commands_of(site)] == [State.CANCELLED]
    assert (await site.post(f"{BOILER}/commands/{made.command_id}/cancel", {})).status_code == 409


async def test_nobody_changes_what_is_another_tenants_or_may_only_be_read(site: Site) -> None:
    await site.post(f"{BOILER}/commands", {"name": "reboot", "payload": "", "once": "abc"})
    (made,) = await commands_of(site)
    for key in (site.other, site.acme_reader):
        stranger = site.another()
        await stranger.sign_in(key)
        assert (await desire(stranger, '{"a":1}', version=0))[0] == 403
        assert (await stranger.post(f"{BOILER}/commands", {"name": "a", "payload": "{}"})).status_code == 403
        assert (await stranger.post(f"{BOILER}/commands/{made.command_id}/cancel", {})).status_code == 403
    for path in (
        f"{BOILER}/parts",
        f"{BOILER}/commands/{made.command_id}",
        "/events?topic=device&tenant=acme&device=boiler",
    ):
        other = site.another()
        await other.sign_in(site.other)
        assert (await other.get(path)).status_code == 403
    assert (await shadow_of(site)).version == 0
    assert [each.state for each in await commands_of(site)] == [State.QUEUED]


@pytest.mark.parametrize("path", ["shadow", "commands", "commands/x/cancel"])
async def test_a_form_of_a_device_without_its_token_does_nothing(site: Site, path: str) -> None:
    fields = {"version": "0", "desired": '{"a":1}', "name": "a", "payload": "{}"}
    assert (await site.post(f"{BOILER}/{path}", fields, token="")).status_code == 403
    assert (await shadow_of(site)).version == 0
    assert await commands_of(site) == []


async def test_the_mark_moves_with_shadow_and_commands_and_rests_else(site: Site) -> None:
    database = Scoped(pool=site.pool)
    rows = TelemetryReader(database, statement_s_max=5.0, presence_after=Settings().presence_after())
    watch = DeviceWatch(
        DeviceTail(rows, tenant_id="acme", device_id="boiler"),
        shadows=ShadowStore(database, names_max=NAMES_MAX),
        commands=CommandStore(database, open_max=OPEN_MAX),
        key=KEY,
    )
    marks = [await watch.mark(), await watch.mark()]
    assert marks[0] == marks[1]
    await desire(site, '{"a":1}', version=0)
    marks.append(await watch.mark())
    await site.post(f"{BOILER}/commands", {"name": "reboot", "payload": "", "once": "abc"})
    marks.append(await watch.mark())
    (made,) = await commands_of(site)
    await site.post(f"{BOILER}/commands/{made.command_id}/cancel", {})
    marks.append(await watch.mark())
    assert len(set(marks)) == 4
    assert f'data-mark="{marks[-1]}"' in (await site.get(f"{BOILER}/parts")).text
