"""EMQX's questions: what is answered, what is not, and that no question gets more than the decision gives."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from pulse.api.mqtt_hooks import ACL_PATH, AUTH_PATH, MqttHooks, OwnUser
from pulse.domain.identity import Device, Tenant, TokenDigest, digest, make_token
from pulse.domain.mqtt_access import Action, Denial, bridge_may, down_filters, may, up_filters
from pulse.domain.registry import Complete, Put, Reading
from pulse.runtime.metrics import MqttAccessMetrics
from pulse.services.mqtt_access import MqttAccess
from pulse.services.registry import DeviceRegistry

SECRET = "a-shared-secret-of-32-characters"
OWN_PASSWORD = secrets.token_urlsafe(24)
TOKEN = make_token(secrets.token_bytes(32))
USER = "acme/t-1"
SESSION_S = 3600.0


class Answered(msgspec.Struct):
    status: int
    headers: dict[bytes, bytes]
    body: Any


def registry(*, complete: bool = True) -> DeviceRegistry:
    made = DeviceRegistry()
    made.apply(Reading(from_scratch=True))
    made.apply(Put(Tenant("acme", enabled=True)))
    made.apply(Put(Device("acme", "t-1", True, (TokenDigest(digest(TOKEN)),))))
    made.apply(Put(Device("acme", "off", False, (TokenDigest(digest(TOKEN)),))))
    made.apply(Put(Tenant("closed", enabled=False)))
    made.apply(Put(Device("closed", "t-1", True, (TokenDigest(digest(TOKEN)),))))
    if complete:
        made.apply(Complete())
    return made


async def elsewhere(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def hooks(*, complete: bool = True, own_user: OwnUser | None = None) -> MqttHooks:
    metrics = MqttAccessMetrics(CollectorRegistry())
    access = MqttAccess(registry=registry(complete=complete), metrics=metrics, session_s_max=SESSION_S)
    own_user = own_user or OwnUser(name="pulse-bridge", password=OWN_PASSWORD)
    return MqttHooks(access=access, secret=SECRET, own_user=own_user, other=elsewhere)


def ask(
    path: str,
    question: object,
    *,
    app: MqttHooks | None = None,
    authorization: str | None = f"Bearer {SECRET}",
    method: str = "POST",
) -> Answered:
    body = question if isinstance(question, bytes) else msgspec.json.encode(question)
    headers = [(b"content-length", str(len(body)).encode())]
    if authorization is not None:
        headers.append((b"authorization", authorization.encode("latin-1")))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(event: Any) -> None:
        sent.append(event)

    scope = {"type": "http", "path": path, "method": method, "headers": headers}
    asyncio.run((app or hooks())(scope, receive, send))
    return Answered(sent[0]["status"], dict(sent[0]["headers"]), msgspec.json.decode(sent[1]["body"]))


def connecting(**more: object) -> dict[str, object]:
    return {"username": USER, "password": TOKEN, "clientid": USER, "cert_common_name": "", **more}


def test_a_device_is_let_in_until_its_session_ends() -> None:
    found = ask(AUTH_PATH, connecting())
    assert found.status == 200
    assert found.headers[b"content-type"] == b"application/json"
    assert found.body.keys() == {"result", "expire_at", "acl"}
    assert found.body["result"] == "allow"
    assert abs(found.body["expire_at"] - time.time() - SESSION_S) < 60


def allows(rules: list[dict[str, str]], action: Action, topic: str) -> bool:
    """What EMQX 5.8 makes of rules: it knows no other keys needed, and matches a subscription like a topic."""
    assert all(rule.keys() == {"permission", "action", "topic"} for rule in rules)
    assert {rule["permission"] for rule in rules} == {"allow"}
    assert not [rule for rule in rules if "$" in rule["topic"] or rule["topic"].startswith("eq ")]
    return any(rule["action"] == action and emqx_matches(rule["topic"], topic) for rule in rules)


def emqx_matches(pattern: str, topic: str) -> bool:
    """`emqx_topic:match`: `+` takes any one word, `#` among them; a last `#` takes the rest, and nothing."""
    ours, theirs = pattern.split("/"), topic.split("/")
    if ours[-1] == "#":
        ours.pop()
        theirs = theirs[: len(ours)]
    return len(ours) == len(theirs) and all(our in ("+", their) for our, their in zip(ours, theirs, strict=True))


def shared(topic: str) -> str:
    """What EMQX asks about a shared subscription: the filter in it."""
    return topic.split("/", 2)[2] if topic.startswith("$share/") and topic.count("/") >= 2 else topic


parts = st.sampled_from(["tenant", "acme", "beta", "device", "t-1", "t-2", "telemetry", "commands", "+", "#", "shadow"])
topics = st.lists(parts, max_size=7).map("/".join) | st.text()
own_topics = st.sampled_from([*up_filters("acme", "t-1", named=True), *down_filters("acme", "t-1", named=True)])


@given(action=st.sampled_from(Action), topic=topics | own_topics | topics.map("tenant/acme/device/t-1/".__add__))
def test_the_answer_brings_every_topic_of_the_device_and_none_of_another(action: Action, topic: str) -> None:
    """So nothing that it may do is a question, which an outage of ours would leave without an answer."""
    rules = ask(AUTH_PATH, connecting()).body["acl"]
    if may("acme", "t-1", action, topic):
        assert allows(rules, action, topic)
    if allows(rules, action, topic):
        is_of_routes = action is Action.SUBSCRIBE and topic.startswith("tenant/acme/route")
        assert is_of_routes or topic.startswith("tenant/acme/device/t-1/")
        assert not allows(rules, Action.PUBLISH, topic) or not may("acme", "t-1", Action.SUBSCRIBE, topic)


@given(action=st.sampled_from(Action), topic=topics | topics.map("$share/pulse/".__add__) | own_topics)
def test_the_bridge_has_its_rules_with_the_answer_and_no_end(action: Action, topic: str) -> None:
    found = ask(AUTH_PATH, connecting(username="pulse-bridge", password=OWN_PASSWORD, clientid="pulse-bridge")).body
    assert found.keys() == {"result", "acl"}
    if bridge_may(action, topic):
        assert allows(found["acl"], action, shared(topic))
    if allows(found["acl"], action, topic):
        assert topic.split("/", maxsplit=1)[0] == "tenant"


@pytest.mark.parametrize(
    "more",
    [
        {"password": "wrong"},
        {"password": ""},
        {"password": None},
        {"username": ""},
        {"username": None},
        {"username": "acme/nobody"},
        {"username": "acme/off", "clientid": "acme/off"},
        {"username": "pulse-bridge"},
        {"clientid": "acme/t-2"},
        {"clientid": "pulse-bridge"},
        {"clientid": ""},
        {"clientid": None},
        {"cert_common_name": "acme/t-2"},
        {"cert_common_name": "*"},
    ],
)
def test_nobody_else_is(more: dict[str, object]) -> None:
    found = ask(AUTH_PATH, connecting(**more))
    assert (found.status, found.body) == (200, {"result": "deny"})


@pytest.mark.parametrize("name", ["", "undefined", None, USER])
def test_a_certificate_need_not_be_there_but_has_to_be_the_device_s(name: str | None) -> None:
    assert ask(AUTH_PATH, connecting(cert_common_name=name)).body["result"] == "allow"


@given(
    username=st.sampled_from([USER, "acme/off", "acme/t-2", "beta/t-1", "pulse-bridge", "", "acme"]) | st.text(),
    password=st.sampled_from([TOKEN, OWN_PASSWORD, ""]) | st.text(),
    clientid=st.sampled_from([USER, "acme/t-1/x", "pulse-bridge", "A1b2C3d4E5f6G7h8I9j0K1"]) | st.text(),
    certificate=st.sampled_from(["", "undefined", USER]) | st.text(),
)
def test_no_question_lets_in_more_than_the_decision(
    username: str, password: str, clientid: str, certificate: str
) -> None:
    question = {"username": username, "password": password, "clientid": clientid, "cert_common_name": certificate}
    found = ask(AUTH_PATH, question)
    own = (username, password) == ("pulse-bridge", OWN_PASSWORD)
    is_device = (username, password) == (USER, TOKEN)
    its_session = clientid == USER or clientid.startswith(USER + "/") or clientid == "A1b2C3d4E5f6G7h8I9j0K1"
    allowed = own or (is_device and its_session and certificate in ("", "undefined", USER))
    assert (found.status, found.body["result"]) == (200, "allow" if allowed else "deny")


@given(
    username=st.sampled_from([USER, "acme/off", "acme/t-2", "pulse-bridge", ""]) | st.text(),
    action=st.sampled_from(Action),
    topic=topics | topics.map("tenant/acme/device/t-1/".__add__) | topics.map("$share/pulse/".__add__),
)
def test_no_topic_is_allowed_that_the_decision_does_not_allow(username: str, action: Action, topic: str) -> None:
    found = ask(ACL_PATH, {"username": username, "action": action, "topic": topic})
    allowed = (username == "pulse-bridge" and bridge_may(action, topic)) or (
        username == USER and may("acme", "t-1", action, topic)
    )
    assert (found.status, found.body) == (200, {"result": "allow" if allowed else "deny"})


@pytest.mark.parametrize("username", ["acme/off", "acme/nobody", "closed/t-1"])
def test_whoever_was_disabled_since_it_came_in_may_do_nothing_any_more(username: str) -> None:
    tenant_id, device_id = username.split("/")
    own = f"tenant/{tenant_id}/device/{device_id}/"
    for action, topic in ((Action.PUBLISH, own + "telemetry"), (Action.SUBSCRIBE, own + "commands")):
        assert may(tenant_id, device_id, action, topic)
        question = {"username": username, "action": action, "topic": topic}
        assert ask(ACL_PATH, question).body == {"result": "deny"}


@pytest.mark.parametrize("path", [AUTH_PATH, ACL_PATH])
@pytest.mark.parametrize(
    "authorization", [None, "", SECRET, "Bearer", "Bearer ", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", "Bearer é"]
)
def test_nobody_asks_without_the_secret(path: str, authorization: str | None) -> None:
    found = ask(path, connecting(), authorization=authorization)
    assert found.status == 401
    assert "result" not in found.body


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"{", b'{"action":"all","topic":"x"}', b'{"topic":1}', b"\xff", b'{"username":"\\udc00"}'],
)
def test_a_question_that_cannot_be_read_is_no_yes(body: bytes) -> None:
    """An empty object asks for a client without a name, who is nobody."""
    for path in (AUTH_PATH, ACL_PATH):
        found = ask(path, body)
        assert found.status == 400 or found.body == {"result": "deny"}


def test_a_question_is_bounded() -> None:
    assert ask(AUTH_PATH, b" " * 300_000).status == 413


def test_only_a_post_is_a_question() -> None:
    assert ask(AUTH_PATH, connecting(), method="GET").status == 405


def test_another_path_of_the_same_prefix_is_not_there() -> None:
    assert ask("/internal/mqtt/other", {}).status == 404


def test_all_other_paths_are_somebody_else_s() -> None:
    for path in ("/readyz", "/api/v1/tenants", "/internal/", "/"):
        assert ask(path, {}, authorization=None).status == 418


@pytest.mark.parametrize(
    ("path", "question"),
    [
        (AUTH_PATH, connecting()),
        (ACL_PATH, {"username": USER, "action": "publish", "topic": "tenant/acme/device/t-1/telemetry"}),
        (ACL_PATH, {"username": USER, "action": "subscribe", "topic": "tenant/acme/device/t-2/commands"}),
    ],
)
def test_before_the_devices_are_read_the_answer_is_to_ask_again(path: str, question: dict[str, object]) -> None:
    found = ask(path, question, app=hooks(complete=False))
    assert found.status == 503
    assert b"retry-after" in found.headers


def test_the_bridge_is_answered_before_the_devices_are_read() -> None:
    app = hooks(complete=False)
    question = {"username": "pulse-bridge", "action": "subscribe", "topic": "tenant/#"}
    assert ask(ACL_PATH, question, app=app).body == {"result": "allow"}


def test_a_user_without_a_password_is_none() -> None:
    app = hooks(own_user=OwnUser(name="pulse-bridge", password=""))
    question = connecting(username="pulse-bridge", password="")
    assert ask(AUTH_PATH, question, app=app).body == {"result": "deny"}
    assert ask(ACL_PATH, {"username": "pulse-bridge", "action": "subscribe", "topic": "tenant/#"}, app=app).body == {
        "result": "deny"
    }


def test_every_denial_has_its_own_series() -> None:
    counted = CollectorRegistry()
    MqttAccessMetrics(counted)
    assert all(counted.get_sample_value("pulse_mqtt_connections_total", {"outcome": each}) == 0 for each in Denial)
