"""What a device says of its shadow and of commands, without sockets: by HTTP, in a batch, and over a broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_words import BAD_ANSWERS, BAD_UPDATES, GOOD_ANSWERS, GOOD_UPDATES, SHADOW_BYTES_MAX, SHADOW_DEPTH_MAX
from edge import BATCH, PATH, Publisher, Registry, ask, make_app, make_gateway, past_asgi
from pulse.domain.device_words import check_update, client_token
from pulse.domain.downward import read_downward
from pulse.domain.envelope import unwrap
from pulse.domain.errors import LimitExceeded, Reason, Refusal
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.mqtt import Arrival
from pulse.domain.shadow import Shadow, ShadowBounds, apply, read_update
from pulse.domain.subjects import MessageType
from pulse.services.bridge_admission import Admission, Dropped, Publication

BOUNDS = ShadowBounds(shadow_bytes_max=SHADOW_BYTES_MAX, shadow_depth_max=SHADOW_DEPTH_MAX)
SHADOW, ACK = PATH.replace("telemetry", "shadow"), PATH.replace("telemetry", "commands-ack")
GOOD = GOOD_UPDATES["reported"]


@pytest.fixture(params=["through ASGI", "past ASGI"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    with past_asgi() if request.param == "past ASGI" else nullcontext():
        yield


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", GOOD_UPDATES)
async def test_an_update_is_published_whole(name: str) -> None:
    publisher = Publisher()
    answer = await ask(make_app(publisher), SHADOW, GOOD_UPDATES[name])
    assert answer.status == 202
    (published,) = publisher.published
    envelope = unwrap(published.subject, published.body)
    assert (published.subject, envelope.msg_type, envelope.name) == ("shadow.acme", MessageType.SHADOW, msgspec.UNSET)
    assert GOOD_UPDATES[name].strip() in published.body


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", BAD_UPDATES)
async def test_what_can_be_no_update_is_refused_and_says_why(name: str) -> None:
    body, *expected = BAD_UPDATES[name]
    publisher = Publisher()
    answer = await ask(make_app(publisher), SHADOW, body)
    assert [answer.status, answer.told["reason"], answer.told.get("field", "")] == expected
    assert answer.told["detail"]
    assert publisher.published == []


@pytest.mark.usefixtures("way")
async def test_a_section_beyond_its_bound_names_the_limit() -> None:
    answer = await ask(make_app(Publisher()), SHADOW, BAD_UPDATES["too large"][0])
    assert (answer.told["limit"], answer.told["limit_value"]) == ("shadow_bytes_max", SHADOW_BYTES_MAX)
    answer = await ask(make_app(Publisher()), SHADOW, BAD_UPDATES["too deep"][0])
    assert (answer.told["limit"], answer.told["limit_value"]) == ("shadow_depth_max", SHADOW_DEPTH_MAX)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab:"\\', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab:"', max_size=2), inner, max_size=3),
    max_leaves=12,
)
sections = st.dictionaries(st.text("abc", max_size=2), json, max_size=4)


@given(first=sections, patch=sections, reported=sections | st.none())
def test_what_the_edge_refuses_no_shadow_could_take(
    first: dict[str, Any], patch: dict[str, Any], reported: dict[str, Any] | None
) -> None:
    """The bound is known for the patch alone, whatever shadow it will meet."""
    tight = ShadowBounds(shadow_bytes_max=40, shadow_depth_max=2)
    update = {"state": {"desired": patch, "reported": reported}}
    text = msgspec.json.encode(update)
    roomy = ShadowBounds(shadow_bytes_max=10_000, shadow_depth_max=100)
    met = apply(Shadow(), read_update(msgspec.json.encode({"state": {"desired": first}})), at_ms=1, bounds=roomy)
    check_update(text, bounds=roomy)
    if is_refused(lambda: check_update(text, bounds=tight)):
        assert is_refused(lambda: apply(met, read_update(text), at_ms=2, bounds=tight))


def is_refused(doing: Callable[[], object]) -> bool:
    try:
        doing()
    except LimitExceeded:
        return True
    return False


@pytest.mark.parametrize(("query", "name"), [("", ""), ("?name=config", "config"), ("?name=", "")])
async def test_a_query_names_a_shadow(query: str, name: str) -> None:
    publisher = Publisher()
    assert (await ask(make_app(publisher), SHADOW + query, GOOD)).status == 202
    envelope = unwrap("shadow.acme", publisher.published[0].body)
    assert (envelope.name or "") == name


@pytest.mark.parametrize(
    ("query", "field"),
    [("?name=a%2Fb", "name"), ("?name=a.b", "name"), ("?name=" + "x" * 65, "name"), ("?name=%00", "name"),
     ("?name=a&name=b", "name"), ("?nam=a", "nam"), ("?name=a&b=1&c=1", "name"), ("?name=%ff", "name")],
)  # fmt: skip
async def test_a_slip_in_the_query_changes_no_shadow(query: str, field: str) -> None:
    publisher = Publisher()
    answer = await ask(make_app(publisher), SHADOW + query, GOOD)
    assert (answer.status, answer.told["field"]) == (422, field)
    assert publisher.published == []


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", GOOD_ANSWERS)
async def test_an_answer_to_a_command_is_published_whole(name: str) -> None:
    publisher = Publisher()
    assert (await ask(make_app(publisher), ACK, GOOD_ANSWERS[name])).status == 202
    (published,) = publisher.published
    assert published.subject == "commands.acme"
    assert unwrap(published.subject, published.body).msg_type is MessageType.COMMANDS_ACK
    assert GOOD_ANSWERS[name].strip() in published.body


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_what_can_be_no_answer_is_refused_and_says_why(name: str) -> None:
    body, *expected = BAD_ANSWERS[name]
    publisher = Publisher()
    answer = await ask(make_app(publisher), ACK, body)
    assert [answer.status, answer.told["reason"], answer.told.get("field", "")] == expected
    assert publisher.published == []


async def test_no_device_answers_on_the_path_of_another() -> None:
    class OneToken(Registry):
        def authenticate(self, tenant_id: str, device_id: str, token: str, now_ms: int) -> bool:
            return device_id == "t-1" and super().authenticate(tenant_id, device_id, token, now_ms)

    publisher = Publisher()
    app = make_app(publisher, registry=OneToken())
    assert (await ask(app, ACK, GOOD_ANSWERS["acknowledged"])).status == 202
    publisher.published.clear()
    answer = await ask(app, ACK.replace("/t-1/", "/t-2/"), GOOD_ANSWERS["acknowledged"])
    assert (answer.status, answer.told["reason"]) == (401, "unauthenticated")
    assert publisher.published == []


async def test_a_batch_carries_all_that_a_device_says() -> None:
    rows = [
        {"payload": {"metrics": {"a": 1}}},
        {"msg_type": "shadow", "payload": {"state": {"reported": {"a": 1}}}},
        {"msg_type": "shadow", "name": "config", "payload": {"state": {"reported": {"a": 1}}}},
        {"msg_type": "commands-ack", "payload": {"commandId": "c-1", "state": "succeeded"}},
        {"msg_type": "shadow", "payload": {"state": {"reported": 7}}},
        {"msg_type": "shadow", "name": "a.b", "payload": {"state": {"reported": {}}}},
        {"name": "config", "payload": {"metrics": {"a": 1}}},
        {"msg_type": "commands-sent", "payload": {"commandId": "c-1"}},
        {"msg_type": "shadow-get", "payload": {}},
    ]
    publisher = Publisher()
    body = msgspec.json.encode({"tenant_id": "acme", "device_id": "t-1", "messages": rows})
    answer = await ask(make_app(publisher), BATCH, body)
    assert [each.subject for each in publisher.published] == [
        "telemetry.acme", "shadow.acme", "shadow.acme", "commands.acme",
    ]  # fmt: skip
    names = [unwrap(each.subject, each.body).name for each in publisher.published[1:3]]
    assert names == [msgspec.UNSET, "config"]
    refused = [(each["index"], each["status"], each["field"]) for each in answer.told["results"][4:]]
    assert refused == [
        (4, 422, "payload.state.reported"), (5, 422, "name"), (6, 422, "name"), (7, 422, "msg_type"),
        (8, 422, "msg_type"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [MessageType.COMMANDS_SENT])
def test_no_device_says_what_is_ours_to_say(kind: MessageType) -> None:
    with pytest.raises(Refusal) as refused:
        make_gateway(Publisher()).prepare(
            tenant_id="acme", device_id="t-1", message_type=kind, payload=b'{"commandId":"c-1"}', source="http"
        )
    assert refused.value.reason is Reason.UNSUPPORTED_TYPE


class Devices:
    ready = True

    def may_speak(self, tenant_id: str, device_id: str) -> bool:
        return device_id == "t-1"


def admission(*, letters: int = 100, per_s: float = 0) -> Admission:
    return Admission(
        gateway=make_gateway(Publisher(), limits=RateLimits(device=Rate(per_s, 1), tenant=Rate(0, 1))),
        devices=Devices(),
        letters=RateLimits(device=Rate(0, 1), tenant=Rate(0.001, letters)),
        session="s",
        body_bytes_max=64 * 1024,
        clock_ns=lambda: 1_800_000_000_000_000_000,
    )


def arrive(kind: str, payload: bytes, *, packet_id: int = 7, device: str = "t-1", size: int | None = None) -> Arrival:
    topic = f"tenant/acme/device/{device}/{kind}".encode()
    return Arrival(topic, payload, len(payload) if size is None else size, packet_id)


def decided(arrival: Arrival, **how: Any) -> Publication:
    decision = admission(**how).decide(arrival, limited=False)
    assert isinstance(decision, Publication)
    return decision


KINDS = ["shadow/update", "shadow/reported", "shadow/name/config/update", "shadow/name/config/reported"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD_UPDATES)
def test_an_update_over_a_broker_goes_to_its_stream(kind: str, name: str) -> None:
    payload = GOOD_UPDATES[name]
    decision = decided(arrive(kind, payload))
    if b"desired" in payload and kind.endswith("/reported"):
        assert decision.stream == "DOWN"
        return
    assert (decision.stream, decision.subject, decision.refusal) == ("SHADOW", "shadow.acme", None)
    envelope = unwrap(decision.subject, decision.body)
    assert (envelope.msg_type, envelope.source) == (MessageType.SHADOW, "mqtt")
    assert envelope.name == ("config" if "config" in kind else msgspec.UNSET)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD_UPDATES)
def test_what_can_be_no_update_is_answered_rejected_to_its_device(kind: str, name: str) -> None:
    payload, status, reason, field = BAD_UPDATES[name]
    decision = decided(arrive(kind, payload))
    assert (decision.stream, decision.refused_as) == ("DOWN", "rejected")
    said = read_downward(decision.subject, decision.body)
    named = "name/config/" if "config" in kind else ""
    assert said.full_topic == f"tenant/acme/device/t-1/shadow/{named}update/rejected"
    told = msgspec.json.decode(said.body)
    assert told["timestamp"] == 1_800_000_000_000
    if not (kind.endswith("/reported") and b"desired" in payload):
        assert decision.refusal is not None
        assert told["code"] == status
        assert (decision.refusal.reason.value, decision.refusal.field) == (reason, field)
        assert told["message"].startswith(f"{field}: " if field else decision.refusal.message)


def test_reported_says_nothing_of_what_is_desired() -> None:
    decision = decided(arrive("shadow/reported", b'{"state":{"desired":{"a":1}},"clientToken":"t"}'))
    told = msgspec.json.decode(decision.body)
    assert (told["code"], told["message"].split(":")[0], told["clientToken"]) == (422, "state.desired", "t")


def test_a_rejection_gives_the_token_back_where_it_can_be_read() -> None:
    assert client_token(b'{"state":7,"clientToken":"t"}') == "t"
    for unreadable in (b"", b"\xff", b'{"clientToken":7}', b'{"clientToken":"%b"}' % (b"x" * 65), b"[" * 100_000):
        assert client_token(unreadable) is msgspec.UNSET


@pytest.mark.parametrize(("payload", "stream"), [(b"", "SHADOW"), (b"{}", "SHADOW"), (b'{"clientToken":"t"}', "SHADOW"),
                                                 (b"7", "DOWN"), (b'{"x":1}', "DOWN"), (b"{", "DOWN")])  # fmt: skip
def test_a_get_over_a_broker_is_asked_or_rejected(payload: bytes, stream: str) -> None:
    for kind in ("shadow/get", "shadow/name/config/get"):
        decision = decided(arrive(kind, payload))
        assert decision.stream == stream
        if stream == "DOWN":
            assert decision.subject.endswith("get.rejected")
        else:
            assert unwrap(decision.subject, decision.body).msg_type is MessageType.SHADOW_GET


def test_an_update_larger_than_a_payload_may_be_is_rejected_even_where_it_was_not_kept() -> None:
    for arrival in (arrive("shadow/update", b"x" * 70_000), arrive("shadow/update", b"", size=2_000_000)):
        decision = decided(arrival)
        assert (decision.stream, msgspec.json.decode(decision.body)["code"]) == ("DOWN", 413)


def test_a_rejection_that_is_sent_again_is_one_answer_and_another_is_another() -> None:
    one = admission()
    bad, worse = b'{"state":7}', b'{"state":8}'
    ids = [
        one.decide(arrive("shadow/update", payload, packet_id=packet_id), limited=False).message_id  # type: ignore[union-attr]
        for payload, packet_id in ((bad, 7), (bad, 7), (bad, 8), (worse, 7), (bad, 0), (bad, 0))
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 5


def test_who_is_not_known_gets_no_answer_and_who_is_too_fast_none_either() -> None:
    decision = decided(arrive("shadow/update", b"{", device="nobody"))
    assert (decision.stream, decision.refused_as) == ("DEAD_LETTERS", "dead_letter")
    limited = admission(per_s=0.001)
    assert isinstance(limited.decide(arrive("shadow/update", GOOD), limited=True), Publication)
    dropped = limited.decide(arrive("shadow/update", b"{"), limited=True)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == Reason.RATE_LIMITED


def test_rejections_are_not_bounded_as_dead_letters_are() -> None:
    one = admission(letters=1)
    streams = [one.decide(arrive("shadow/update", b"{", packet_id=n), limited=False) for n in range(1, 6)]
    assert [each.stream for each in streams if isinstance(each, Publication)] == ["DOWN"] * 5


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_what_can_be_no_answer_is_rejected_over_a_broker(name: str) -> None:
    payload, status, reason, field = BAD_ANSWERS[name]
    decision = decided(arrive("commands/ack", payload))
    assert (decision.stream, decision.refused_as) == ("DOWN", "rejected")
    assert decision.subject == "down.acme.t-1.commands.ack.rejected"
    assert decision.refusal is not None
    assert decision.refusal.reason == reason
    said = msgspec.json.decode(decision.body)
    assert said["code"] == status
    assert field in said["message"]


@pytest.mark.parametrize("name", GOOD_ANSWERS)
def test_an_answer_over_a_broker_goes_to_its_stream(name: str) -> None:
    decision = decided(arrive("commands/ack", GOOD_ANSWERS[name]))
    assert (decision.stream, decision.subject) == ("COMMANDS", "commands.acme")
    assert unwrap(decision.subject, decision.body).msg_type is MessageType.COMMANDS_ACK
