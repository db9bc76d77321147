"""A route that is tried with one message: what is sent, how it is marked, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import pytest

from pulse.domain.delivery import Attempted, Failure
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.route import DestinationSpec, DeviceFilter, Job, Match, Republish, Route, Webhook
from pulse.domain.route_trial import EXAMPLE_DEVICE, TrialJob
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType
from pulse.domain.webhook import SigningSecrets, make_secret
from pulse.domain.webhook_url import PUBLIC
from pulse.services import route_trials
from pulse.services.route_book import Found, RouteKey, Sendable
from pulse.services.route_trials import RouteTrials

HOOK = Webhook(url="https://hooks.example.com/x", headers={"X-Own": "1"})
STORED = RoutedMessage(
    tenant_id="acme",
    device_id="lamp",
    message_type=MessageType.TELEMETRY,
    source="mqtt",
    ts_ms=7,
    payload={"metrics": {"temp": 3.5}},
    position=99,
)


class OnRecord(msgspec.Struct, frozen=True):
    route: Route
    secrets: SigningSecrets | None = None
    is_sealed: bool = False


def made(destination: DestinationSpec = HOOK, *, is_sealed: bool = False, **more: object) -> OnRecord:
    route = msgspec.structs.replace(Route(tenant_id="acme", route_id="hot", destination=destination), **more)
    return OnRecord(route, SigningSecrets(make_secret(b"s" * 32)), is_sealed)


class World:
    """The database, and a sender that says what it is told to."""

    def __init__(
        self, found: OnRecord | None, *says: Attempted | Outage | Refusal, stored: Sequence[RoutedMessage] = ()
    ):
        self.found = found
        self.says = list(says) or [Attempted(status=200)]
        self.stored = stored
        self.sent: list[tuple[Job, Sendable]] = []
        self.asked: list[DeviceFilter] = []
        self.trials = RouteTrials(routes=self, messages=self, sender=self, allowed=PUBLIC)

    async def load(self, known: Mapping[RouteKey, int | None]) -> Mapping[RouteKey, Found | None]:
        assert known == {RouteKey("acme", "hot"): None}
        return dict.fromkeys(known, self.found)

    async def recent(self, tenant_id: str, devices: DeviceFilter, *, limit: int) -> Sequence[RoutedMessage]:
        self.asked.append(devices)
        return self.stored[:limit]

    async def attempt(self, job: Job, sendable: Sendable) -> Attempted:
        self.sent.append((job, sendable))
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, Attempted):
            return said
        raise said


async def test_what_is_sent_is_like_the_last_stored_message_and_says_that_it_is_a_test() -> None:
    devices = DeviceFilter(prefix="la")
    world = World(made(match=Match(devices=devices)), stored=[STORED])
    trial = await world.trials.run("acme", "hot")
    assert (trial.delivered, trial.status, trial.to) == (True, 200, "https://hooks.example.com/x")
    ((job, to),) = world.sent
    assert world.asked == [devices]
    assert (job.device_id, job.msg_type, job.message_id) == ("lamp", "telemetry", trial.message_id)
    assert msgspec.json.decode(job.payload) == {"metrics": {"temp": 3.5}, "test": True}
    assert isinstance(to.route.destination, Webhook)
    assert dict(to.route.destination.headers) == {"X-Own": "1", "Pulse-Test": "true"}
    assert trial.message_id != (await world.trials.run("acme", "hot")).message_id


@pytest.mark.parametrize("types", [(MessageType.TELEMETRY,), (MessageType.HEARTBEAT,)])
async def test_without_a_stored_message_it_is_an_example(types: tuple[MessageType, ...]) -> None:
    world = World(made(match=Match(message_types=types), enabled=False))
    assert (await world.trials.run("acme", "hot")).delivered
    ((job, _),) = world.sent
    assert (job.device_id, job.msg_type) == (EXAMPLE_DEVICE, types[0])
    assert msgspec.json.decode(job.payload)["test"] is True
    assert len(world.asked) == (types[0] is MessageType.TELEMETRY)


@pytest.mark.parametrize(
    ("said", "status", "failure", "error"),
    [
        (Attempted(status=503, excerpt=b"busy"), 503, "", ""),
        (Attempted(status=302), 302, "", ""),
        (Attempted(failure=Failure.TIMEOUT, error="no answer"), None, "timeout", "no answer"),
        (Refusal(Reason.INVALID_TOPIC, "a place is empty"), None, "refused", "a place is empty"),
    ],
)
async def test_what_is_no_2xx_is_told_as_it_is(
    said: Attempted | Refusal, status: int | None, failure: str, error: str
) -> None:
    trial = await World(made(), said).trials.run("acme", "hot")
    assert (trial.delivered, trial.status, trial.failure, trial.error) == (False, status, failure, error)
    if isinstance(said, Attempted):
        assert trial.excerpt == said.excerpt.decode()


@pytest.mark.parametrize(
    ("found", "why"),
    [(made(is_sealed=True), "the key"), (made(Webhook(url="http://10.1.2.3/")), "webhook_networks_allowed")],
)
async def test_what_cannot_be_sent_says_why_and_nothing_is(found: OnRecord, why: str) -> None:
    world = World(found)
    trial = await world.trials.run("acme", "hot")
    assert (trial.delivered, trial.failure, why in trial.error) == (False, "refused", True)
    assert world.sent == []


async def test_a_broker_is_waited_for_as_long_as_a_connection_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Outage("mqtt", "there is no connection to the broker")
    monkeypatch.setattr(route_trials, "CONNECT_POLL_S", 0.0)
    world = World(made(Republish(topic="alerts/${device.id}")), away, away, Attempted(status=200))
    trial = await world.trials.run("acme", "hot")
    assert (trial.delivered, trial.to, len(world.sent)) == (True, "tenant/acme/route/alerts/${device.id}", 3)
    assert len({id(job) for job, _ in world.sent if isinstance(job, TrialJob)}) == 1
    monkeypatch.setattr(route_trials, "CONNECT_S_MAX", 0.0)
    with pytest.raises(Outage):
        await World(made(), away).trials.run("acme", "hot")


async def test_a_route_is_tried_a_few_times_and_what_is_not_there_not_at_all() -> None:
    world = World(made())
    for _ in range(route_trials.ROUTE_RATE.burst):
        await world.trials.run("acme", "hot")
    with pytest.raises(Refusal) as raised:
        await world.trials.run("acme", "hot")
    assert (raised.value.reason, len(world.sent)) == (Reason.RATE_LIMITED, route_trials.ROUTE_RATE.burst)
    with pytest.raises(Refusal) as raised:
        await World(None).trials.run("acme", "hot")
    assert raised.value.reason is Reason.NOT_FOUND
