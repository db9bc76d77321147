"""The users of `compose/nats/nats.conf`: each may do what its role does, and is told plainly what it may not."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose_files import NATS_CONF, nats_users
from compose_server import ComposeNats, compose_nats, container_environment, run
from pulse.adapters.embedded.ports import free_port
from pulse.adapters.nats.browse import MessageBrowser
from pulse.adapters.nats.connection import PulseClient, connection
from pulse.adapters.nats.follow import follow
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.stream_levels import StreamLevelReader
from pulse.adapters.nats.stream_status import StreamStatusReader
from pulse.domain.browse import Start
from pulse.domain.errors import ConfigurationError
from pulse.topology.declared import load
from repository import ROOT

API = "$JS.API."
REGISTRY = "maintenance ui provisioner"
FOLLOWS_REGISTRY = "bridge commands gateway ingest maintenance rescue shadow ui provisioner"

MAY_PUBLISH = {
    # messages
    "telemetry.acme": "bridge gateway ui provisioner",
    "telemetry.acme.more": "",
    "shadow.acme": "bridge gateway ui provisioner",
    "shadow.acme.more": "",
    "commands.acme": "bridge gateway ui provisioner",
    "routes.acme": "commands ingest rescue shadow ui provisioner",
    "dead.TELEMETRY": "bridge",
    "dead.ROUTES": "bridge commands delivery ingest rescue shadow",
    "later.at.acme.1-r": "delivery",
    "later.due.acme": "",
    # what is said to devices, and questions about them
    "down.acme.t-1.shadow.update.delta": "bridge shadow",
    "down.acme.t-1.shadow.name.main.get.accepted": "bridge shadow",
    "down.acme.t-1.commands": "commands",
    "down.acme.t-1.commands.ack.rejected": "bridge commands",
    "down.acme.t-1.telemetry": "",
    "ask.shadow.acme.t-1": "gateway",
    "ask.commands.acme.t-1": "gateway",
    "ask.delivery.acme.r-1": "provisioner ui",
    "_INBOX.gateway.abc.def": "commands shadow provisioner",
    "_INBOX.ui.abc.def": "delivery provisioner",
    "_INBOX.provisioner.abc.def": "delivery provisioner",
    # the registry at the edge
    "$KV.registry.device.acme.t-1": REGISTRY,
    "$KV.registry.route.acme.r-1": f"delivery {REGISTRY}",
    f"{API}DIRECT.GET.KV_registry": f"delivery {REGISTRY}",
    f"{API}DIRECT.GET.TELEMETRY": "ui provisioner",
    f"{API}CONSUMER.CREATE.KV_registry.abc": FOLLOWS_REGISTRY,
    "$JS.FC.KV_registry.abc.def": FOLLOWS_REGISTRY,
    # taking messages out, and settling them
    f"{API}CONSUMER.MSG.NEXT.TELEMETRY.ingest-workers": "ingest provisioner",
    "$JS.ACK.TELEMETRY.ingest-workers.1.2.3.4.5": "ingest",
    f"{API}CONSUMER.MSG.NEXT.SHADOW.shadow-workers": "shadow provisioner",
    "$JS.ACK.SHADOW.shadow-workers.1.2.3.4.5": "shadow",
    f"{API}CONSUMER.MSG.NEXT.COMMANDS.command-workers": "commands provisioner",
    "$JS.ACK.COMMANDS.command-workers.1.2.3.4.5": "commands",
    f"{API}CONSUMER.MSG.NEXT.DOWN.bridge-down": "bridge provisioner",
    "$JS.ACK.DOWN.bridge-down.1.2.3.4.5": "bridge",
    f"{API}CONSUMER.MSG.NEXT.DEAD_LETTERS.rescue-workers": "rescue provisioner",
    "$JS.ACK.DEAD_LETTERS.rescue-workers.1.2.3.4.5": "rescue",
    f"{API}CONSUMER.MSG.NEXT.ROUTES.route-delivery": "delivery provisioner",
    "$JS.ACK.ROUTES.route-delivery.1.2.3.4.5": "delivery",
    f"{API}CONSUMER.MSG.NEXT.LATER.later-delivery": "delivery provisioner",
    "$JS.ACK.LATER.later-delivery.1.2.3.4.5": "delivery",
    f"{API}STREAM.MSG.GET.LATER": "rescue ui provisioner",
    f"{API}STREAM.MSG.DELETE.LATER": "rescue provisioner",
    f"{API}STREAM.INFO.LATER": "delivery rescue ui provisioner",
    f"{API}CONSUMER.CREATE.TELEMETRY.abc": "provisioner",
    f"{API}STREAM.MSG.GET.TELEMETRY": "rescue ui provisioner",
    f"{API}STREAM.MSG.GET.COMMANDS": "maintenance rescue ui provisioner",
    f"{API}STREAM.MSG.GET.SHADOW": "rescue ui provisioner",
    f"{API}STREAM.MSG.DELETE.ROUTES": "rescue provisioner",
    f"{API}STREAM.MSG.DELETE.TELEMETRY": "provisioner",
    # looking
    f"{API}STREAM.INFO.TELEMETRY": "bridge delivery gateway ingest maintenance rescue ui provisioner",
    f"{API}STREAM.INFO.SHADOW": "bridge delivery maintenance rescue shadow ui provisioner",
    f"{API}STREAM.INFO.COMMANDS": "bridge commands delivery maintenance rescue ui provisioner",
    f"{API}STREAM.INFO.DOWN": "bridge ui provisioner",
    f"{API}STREAM.LIST": "ui provisioner",
    f"{API}CONSUMER.INFO.TELEMETRY.ingest-workers": "delivery maintenance ui provisioner",
    f"{API}CONSUMER.INFO.SHADOW.shadow-workers": "delivery maintenance ui provisioner",
    f"{API}CONSUMER.INFO.COMMANDS.command-workers": "delivery maintenance ui provisioner",
    f"{API}CONSUMER.INFO.DOWN.bridge-down": "ui provisioner",
    # making and removing
    f"{API}STREAM.CREATE.TELEMETRY": "provisioner",
    f"{API}STREAM.UPDATE.TELEMETRY": "provisioner",
    f"{API}STREAM.DELETE.TELEMETRY": "provisioner",
    f"{API}STREAM.PURGE.TELEMETRY": "provisioner",
    f"{API}CONSUMER.DELETE.TELEMETRY.ingest-workers": "provisioner",
    "anything.else": "",
}
"""Who may publish to what. Pulling and acknowledging are publishes as well."""
MAY_SUBSCRIBE = {
    "_INBOX.>": "provisioner",
    "telemetry.>": "provisioner",
    "$KV.registry.>": "",
    "down.>": "",
    "down.*.*.commands": "gateway",
    "down.*.*.commands.ack.rejected": "gateway",
    "ask.>": "",
    ">": "",
    **{
        f"_INBOX.{user}.abc.>": f"{user} provisioner"
        for user in ("bridge", "commands", "delivery", "gateway", "ingest", "maintenance", "rescue", "shadow", "ui")
    },
}
MAY_SHARE = {
    "ask.shadow.*.*": "shadow",
    "ask.commands.*.*": "commands",
    "ask.delivery.*.*": "delivery",
}
"""Who may subscribe to what in the queue group of that name, and only there: nobody listens to questions beside."""
USERS = sorted(nats_users(NATS_CONF.read_text("utf-8")))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeNats]:
    """One for all: nothing here leaves anything behind."""
    with compose_nats(tmp_path_factory.mktemp("nats")) as running:
        yield running


async def refused(client: PulseClient, subject: str, *, queue: str = "") -> bool:
    """Whether the server has refused `subject`, in a queue group, by the time that it has answered a PING behind it."""
    before = time.monotonic()
    await client.flush()  # nats-py's PING overtakes what waits to be sent
    await client.flush()
    denied = client.denied_since(before - 60)
    assert not denied or denied.startswith("permissions violation for ")
    named = f'"{subject.lower()}"' + (f' using queue "{queue}"' if queue else "")
    return denied.endswith(named)  # nats-py hands on what the server says in small letters


@pytest.mark.parametrize("user", USERS)
async def test_a_user_may_publish_what_its_role_does_and_nothing_else(server: ComposeNats, user: str) -> None:
    found = {}
    async with connection(server.url(user), name="test") as client:
        for subject in MAY_PUBLISH:
            await client.publish(subject, b"")
            found[subject] = not await refused(client, subject)
    assert found == {subject: user in who.split() for subject, who in MAY_PUBLISH.items()}


@pytest.mark.parametrize("user", USERS)
async def test_a_user_hears_what_is_for_him_and_nothing_else(server: ComposeNats, user: str) -> None:
    found = {}
    async with connection(server.url(user), name="test") as client:
        for subject in MAY_SUBSCRIBE:
            subscription = await client.subscribe(subject)
            found[subject] = not await refused(client, subject)
            await subscription.unsubscribe()
    assert found == {subject: user in who.split() for subject, who in MAY_SUBSCRIBE.items()}


@pytest.mark.parametrize("user", USERS)
async def test_a_user_shares_the_questions_that_are_for_his_group_and_hears_no_others(
    server: ComposeNats, user: str
) -> None:
    async with connection(server.url(user), name="test") as client:
        for subject, group in MAY_SHARE.items():
            for queue, allowed in (("", False), (group, user == group), ("others", False)):
                subscription = await client.subscribe(subject, queue=queue)
                assert await refused(client, subject, queue=queue) is not allowed, (subject, queue)
                await subscription.unsubscribe()


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("password", ["", "p0"], ids=["no password", "a wrong one"])
async def test_nobody_comes_in_without_the_right_password(server: ComposeNats, user: str, password: str) -> None:
    with pytest.raises(ConfigurationError, match="refuses these credentials"):
        async with connection(server.url(user, password=password), name="test"):
            pass


async def test_nobody_comes_in_without_a_name(server: ComposeNats) -> None:
    with pytest.raises(ConfigurationError, match="refuses these credentials"):
        async with connection(f"nats://127.0.0.1:{server.port}", name="test"):
            pass


async def test_answers_come_to_an_inbox_of_the_user_s_own(server: ComposeNats) -> None:
    async with connection(server.url("gateway"), name="test") as client:
        assert client.new_inbox().startswith("_INBOX.gateway.")


@pytest.mark.parametrize("user", ["gateway", "maintenance"])
async def test_a_registry_of_many_devices_is_read_to_its_end(tmp_path: Path, user: str) -> None:
    """After some megabytes the server waits for a word of flow control, which needs a permission of its own."""
    entries, entry = 120, bytes(100_000)
    with compose_nats(tmp_path) as server:
        async with connection(server.url("provisioner"), name="test") as client:
            await Provisioner(client).apply(load(), await Provisioner(client).plan(load()))
            for number in range(entries):
                await client.request(f"$KV.registry.device.acme.t-{number}", entry, timeout=30)
        async with connection(server.url(user), name="test") as client:
            read = 0
            async with asyncio.timeout(20), follow(client, stream="KV_registry") as following:
                while read < entries:
                    read += len(await following.read())
            assert client.denied_since(0) == ""


async def test_the_console_reads_all_that_it_shows_as_its_own_user(tmp_path: Path) -> None:
    declared = load()
    names = [stream.name for stream in declared.streams if not stream.name.startswith("KV_")]
    consumer_of = {consumer.stream: consumer.config.name for consumer in declared.consumers}
    with compose_nats(tmp_path) as server:
        async with connection(server.url("provisioner"), name="test") as client:
            await Provisioner(client).apply(declared, await Provisioner(client).plan(declared))
            await client.jetstream().publish("telemetry.acme", b"{}")
        async with connection(server.url("ui"), name="test") as client:
            status = await StreamStatusReader(client, declared).status()
            assert {each.name for each in status.streams} >= set(names)
            levels = await StreamLevelReader(client, [(name, consumer_of.get(name)) for name in names]).levels()
            assert set(levels) == set(names)
            browser = MessageBrowser(client)
            for name in names:
                last = await browser.last_sequence(name)
                assert len(await browser.read(name, Start(sequence=1), limit=10)) == last, name
            assert len(await browser.read("TELEMETRY", Start(sequence=1, subject="telemetry.acme"), limit=10)) == 1
            assert client.denied_since(0) == ""


@pytest.mark.parametrize(
    ("user", "command", "subject"),
    [
        ("ingest", "streams apply", "$JS.API.INFO"),
        ("ui", "streams apply", "$JS.API.STREAM.CREATE.COMMANDS"),
        ("shadow", "serve gateway", "$JS.API.STREAM.INFO.TELEMETRY"),
    ],
)
async def test_a_process_that_tries_what_is_not_its_own_ends_and_says_which_permission_it_lacks(
    tmp_path: Path, user: str, command: str, subject: str
) -> None:
    with compose_nats(tmp_path) as server:
        if command.startswith("serve"):
            async with connection(server.url("provisioner"), name="test") as client:
                await Provisioner(client).apply(load(), await Provisioner(client).plan(load()))
        ports_here = {"PULSE_HEALTH_PORT": str(free_port()), "PULSE_GATEWAY_PORT": str(free_port())}
        environment = container_environment(
            tmp_path, NATS_URL=server.url(user), PYTHONPATH=str(ROOT / "src"), **ports_here
        )
        done = run([sys.executable, "-m", "pulse", *command.split()], environment, folder=tmp_path)
    last = done.errors.splitlines()[-1]
    assert done.code == 2, done.errors
    assert last.startswith("pulse: cannot ")
    assert f'permissions violation for publish to "{subject.lower()}' in last
    assert last.endswith("(give the user of nats_url this permission)")
