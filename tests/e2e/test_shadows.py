"""What a device should be reaches it, what it is comes back: over MQTT and HTTP, with `pulse up` as it is."""

from __future__ import annotations

import json
import secrets
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import Any

import pytest

from device_words import BAD_ANSWERS, BAD_UPDATES
from mqtt_client import Device, device
from pulse_up import Instance, wait_for

Json = dict[str, Any]
REQUEST_S_MAX = 40.0
TRIES_MAX = 20


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A device of the test's own."""

    running: Instance
    tenant_id: str
    device_id: str
    token: str

    @property
    def user(self) -> str:
        return f"{self.tenant_id}/{self.device_id}"

    def topic(self, kind: str) -> str:
        return f"tenant/{self.tenant_id}/device/{self.device_id}/{kind}"

    def mqtt(self, *, clean: bool = False) -> Any:
        return device(port=self.running.ports.mqtt, user=self.user, token=self.token, clean=clean)

    def ask(self, kind: str, body: bytes | None = None) -> tuple[int, Json | list[Json]]:
        """A POST to the gateway of `body`, a GET without one."""
        way = "device" if body is None else "ingest"
        request = urllib.request.Request(  # noqa: S310 - our own http URL
            f"{self.running.gateway_url}/{way}/v1/tenant/{self.tenant_id}/device/{self.device_id}/{kind}",
            data=body,
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_S_MAX) as answer:  # noqa: S310 - as above
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def shadow(self, *, name: str = "") -> Json:
        """As the gateway tells the device; empty while there is none."""
        status, told = self.ask(f"shadow?name={name}")
        for _ in range(TRIES_MAX):  # as its Retry-After tells a device
            if status != 503:
                break
            time.sleep(1.0)
            status, told = self.ask(f"shadow?name={name}")
        assert status in (200, 404), told
        assert isinstance(told, dict)
        return told if status == 200 else {}

    def desire(self, desired: Json) -> None:
        done = self.running.pulse("shadow", "patch", self.tenant_id, self.device_id, json.dumps(desired))
        assert done.returncode == 0, done.stderr

    def send(self, name: str, payload: Json) -> str:
        """The id of a command that was made."""
        done = self.running.pulse(
            "command", "send", self.tenant_id, self.device_id, name, json.dumps(payload), "--json"
        )
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["command"]["command_id"])

    def state_of(self, command_id: str) -> str:
        done = self.running.pulse("command", "show", self.tenant_id, command_id, "--json", check=True)
        return str(json.loads(done.stdout)["command"]["state"])


@pytest.fixture
def thing(running: Instance) -> Thing:
    """One that the edge knows."""
    tenant_id = f"shadow-{secrets.token_hex(4)}"
    running.pulse("tenant", "add", tenant_id, check=True)
    done = running.pulse("device", "add", tenant_id, "d-1", "--json", check=True)
    token = json.loads(done.stdout)["devices"][0]["token"]
    made = Thing(running=running, tenant_id=tenant_id, device_id="d-1", token=token)
    wait_for(lambda: made.ask("heartbeat", b"{}")[0] == 202, "the edge knows the device")
    return made


def heard(by: Device, topic: str) -> list[Json]:
    return [json.loads(body) for name, body in by.heard.messages if name == topic]


def answered(by: Device, topic: str, client_token: str) -> int | None:
    """The version in the answer that brings back this token."""
    return next((each["version"] for each in heard(by, topic) if each.get("clientToken") == client_token), None)


def listen(to: Device, on: Thing, *kinds: str) -> None:
    assert to.connect()
    for kind in kinds:
        assert to.subscribe(on.topic(kind)), kind


def test_a_delta_waits_for_a_device_that_is_offline_and_goes_when_it_reports(thing: Thing) -> None:
    """Its session is with the broker; what is said meanwhile comes when it is back."""
    kinds = ("shadow/update/delta", "shadow/update/accepted", "shadow/get/accepted")
    with thing.mqtt() as before:
        listen(before, thing, *kinds)
    thing.desire({"mode": "eco", "target": {"low": 17.5}})
    with thing.mqtt() as back:
        assert back.connect()
        back.wait(lambda: bool(heard(back, thing.topic(kinds[0]))), "the delta of the time offline")
        (delta,) = heard(back, thing.topic(kinds[0]))
        assert (delta["state"], delta["version"]) == ({"mode": "eco", "target": {"low": 17.5}}, 1)

        report = {"state": {"reported": delta["state"]}, "version": delta["version"], "clientToken": "r-1"}
        back.publish(thing.topic("shadow/reported"), json.dumps(report).encode())
        back.wait(lambda: answered(back, thing.topic(kinds[1]), "r-1") == 2, "the update is accepted as version 2")

        back.publish(thing.topic("shadow/get"), b"")
        back.wait(lambda: bool(heard(back, thing.topic(kinds[2]))), "the shadow")
        (shadow,) = heard(back, thing.topic(kinds[2]))
        assert shadow["state"] == {"desired": delta["state"], "reported": delta["state"], "delta": {}}
        assert len(heard(back, thing.topic(kinds[0]))) == 1, "no delta is left to tell"
    assert thing.shadow()["state"]["delta"] == {}


def test_a_device_that_has_never_listened_gets_its_delta_when_it_asks(thing: Thing) -> None:
    thing.desire({"on": True})
    with thing.mqtt(clean=True) as new:
        listen(new, thing, "shadow/get/accepted")
        new.publish(thing.topic("shadow/get"), b'{"clientToken":"g"}')
        topic = thing.topic("shadow/get/accepted")
        new.wait(lambda: bool(heard(new, topic)), "the shadow")
        (shadow,) = heard(new, topic)
    assert (shadow["state"]["delta"], shadow["clientToken"]) == ({"on": True}, "g")


def test_the_same_by_http(thing: Thing) -> None:
    thing.desire({"on": True, "level": 3})
    assert thing.shadow()["state"]["delta"] == {"on": True, "level": 3}
    status, told = thing.ask("shadow", b'{"state":{"reported":{"on":true,"level":2}},"version":1}')
    assert (status, told["stream"]) == (202, "SHADOW")  # type: ignore[call-overload]
    wait_for(lambda: thing.shadow()["version"] == 2, "the report is in the shadow")
    assert thing.shadow()["state"]["delta"] == {"level": 3}
    assert thing.ask("shadow", b'{"state":{"reported":{"level":3}}}')[0] == 202
    wait_for(lambda: thing.shadow()["state"]["delta"] == {}, "no delta is left")

    assert thing.ask("shadow?name=config", b'{"state":{"reported":{"a":1}}}')[0] == 202
    wait_for(lambda: thing.shadow(name="config") != {}, "the named shadow")
    assert thing.shadow(name="config")["state"]["reported"] == {"a": 1}
    assert "a" not in thing.shadow()["state"]["reported"]


def test_a_stale_report_is_rejected_with_the_version_that_there_is(thing: Thing) -> None:
    thing.desire({"on": True})
    with thing.mqtt(clean=True) as stale:
        listen(stale, thing, "shadow/update/rejected")
        stale.publish(
            thing.topic("shadow/update"), b'{"state":{"reported":{"on":false}},"version":0,"clientToken":"s"}'
        )
        topic = thing.topic("shadow/update/rejected")
        stale.wait(lambda: bool(heard(stale, topic)), "the rejection")
        (told,) = heard(stale, topic)
    assert (told["code"], told["version"], told["clientToken"]) == (409, 1, "s")
    assert thing.shadow()["state"]["reported"] == {}


def test_bad_input_is_told_apart_over_mqtt_and_http(thing: Thing) -> None:
    """Done when 5: each with a code and a message, and nothing of it is in the shadow."""
    with thing.mqtt(clean=True) as bad:
        topic = thing.topic("shadow/update/rejected")
        listen(bad, thing, "shadow/update/rejected")
        expected = []
        for payload, status, _, field in BAD_UPDATES.values():
            bad.publish(thing.topic("shadow/update"), payload)
            expected.append((status, field))
            status_by_http, told = thing.ask("shadow", payload)
            assert isinstance(told, dict)
            assert (status_by_http, told.get("field", "")) == (status, field)
            assert told["detail"]
        bad.wait(lambda: len(heard(bad, topic)) >= len(expected), "each is rejected")
        rejections = heard(bad, topic)
    assert sorted(each["code"] for each in rejections) == sorted(status for status, _ in expected)
    assert all(each["message"] for each in rejections)
    assert thing.shadow() == {}


def test_an_answer_that_cannot_be_is_rejected_over_mqtt_and_a_status_over_http(thing: Thing) -> None:
    """Done when 5 again, of commands."""
    with thing.mqtt(clean=True) as bad:
        topic = thing.topic("commands/ack/rejected")
        listen(bad, thing, "commands/ack/rejected")
        for payload, status, _, _ in BAD_ANSWERS.values():
            bad.publish(thing.topic("commands/ack"), payload)
            assert thing.ask("commands-ack", payload)[0] == status
        bad.wait(lambda: len(heard(bad, topic)) >= len(BAD_ANSWERS), "each is rejected")
        rejections = heard(bad, topic)
    assert sorted(each["code"] for each in rejections) == sorted(status for _, status, *_ in BAD_ANSWERS.values())
    assert all(each["message"] for each in rejections)


def test_an_answer_to_the_command_of_another_device_is_rejected_and_moves_nothing(
    thing: Thing, running: Instance
) -> None:
    done = running.pulse("device", "add", thing.tenant_id, "d-2", "--json", check=True)
    other = replace(thing, device_id="d-2", token=json.loads(done.stdout)["devices"][0]["token"])
    wait_for(lambda: other.ask("heartbeat", b"{}")[0] == 202, "the edge knows the other device")
    command_id = other.send("reboot", {})
    answer = json.dumps({"commandId": command_id, "state": "succeeded"}).encode()

    assert replace(thing, device_id="d-2").ask("commands-ack", answer)[0] == 401, "not on its path"
    with thing.mqtt(clean=True) as stranger:
        topic = thing.topic("commands/ack/rejected")
        listen(stranger, thing, "commands/ack/rejected")
        stranger.publish(other.topic("commands/ack"), answer)
        stranger.publish(thing.topic("commands/ack"), answer)
        stranger.wait(lambda: bool(heard(stranger, topic)), "the rejection")
        assert thing.ask("commands-ack", answer)[0] == 202, "whose it is, the role commands knows"
        stranger.wait(lambda: len(heard(stranger, topic)) == 2, "the rejection of what came by HTTP")
        told = heard(stranger, topic)
    assert [(each["code"], each["commandId"]) for each in told] == [(404, command_id)] * 2
    status, asked = thing.ask("commands?wait=20")
    assert status == 200
    assert isinstance(asked, dict)
    assert [each["code"] for each in asked["rejected"]] == [404] * 2, "who polls hears of it as well"
    assert thing.state_of(command_id) in ("queued", "sent")


def test_a_command_is_heard_over_mqtt_once_the_device_is_there_and_its_answer_is_its_end(thing: Thing) -> None:
    with thing.mqtt() as before:
        listen(before, thing, "commands")
    command_id = thing.send("reboot", {"delay_s": 5})
    with thing.mqtt() as back:
        assert back.connect()
        topic = thing.topic("commands")
        back.wait(lambda: bool(heard(back, topic)), "the command")
        told = heard(back, topic)[0]
        assert (told["commandId"], told["name"], told["payload"]) == (command_id, "reboot", {"delay_s": 5})
        for state in ("acknowledged", "succeeded"):
            back.publish(thing.topic("commands/ack"), json.dumps({"commandId": command_id, "state": state}).encode())
        wait_for(lambda: thing.state_of(command_id) == "succeeded", "the command has succeeded")
        assert {each["commandId"] for each in heard(back, topic)} == {command_id}


def test_a_command_is_heard_by_a_device_that_polls(thing: Thing) -> None:
    command_id = thing.send("blink", {})
    status, told = thing.ask("commands?wait=20")
    assert status == 200
    found = told["commands"] if isinstance(told, dict) else told
    assert [each["commandId"] for each in found] == [command_id]
    answer = json.dumps({"commandId": command_id, "state": "failed", "error": "no lamp"}).encode()
    assert thing.ask("commands-ack", answer)[0] == 202
    wait_for(lambda: thing.state_of(command_id) == "failed", "the command has failed")
