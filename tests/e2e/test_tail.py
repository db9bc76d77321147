"""`pulse tail` in a real process: what it shows, what it leaves alone, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.nats.connection import connection
from pulse_up import Instance, base_environment

LIMIT_S = 150.0
WAITING = "── waiting for messages "


def envelope(tenant: str, device: str, payload: str = '{"metrics":{"t":1}}') -> bytes:
    return (
        f'{{"v":1,"tenant_id":"{tenant}","device_id":"{device}","msg_type":"telemetry","ts":1795435200123,'
        f'"source":"http","payload":{payload}}}'
    ).encode()


class Streams:
    """A nats-server with the declared streams, and nobody who works on them."""

    def __init__(self, folder: Path, nats: NatsServer) -> None:
        self.folder = folder
        self.nats = nats
        self.environment = base_environment(NATS_URL=nats.url)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pulse", *arguments]

    def pulse(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def publish(self, subject: str, *bodies: bytes) -> None:
        async def run() -> None:
            async with connection(self.nats.url, name="test", wait_s=10) as client:
                for body in bodies:
                    await client.jetstream().publish(subject, body)

        asyncio.run(run())

    def consumers(self, stream: str) -> dict[str, dict[str, object]]:
        """Their configurations by name."""

        async def run() -> dict[str, dict[str, object]]:
            async with connection(self.nats.url, name="test", wait_s=10) as client:
                answer = await client.request(f"$JS.API.CONSUMER.LIST.{stream}", b"", timeout=30)
                return {each["name"]: each["config"] for each in json.loads(answer.data)["consumers"]}

        return asyncio.run(run())


@pytest.fixture
def streams(tmp_path: Path, nats: NatsServer) -> Streams:
    made = Streams(tmp_path, nats)
    applied = made.pulse("streams", "apply")
    assert applied.returncode == 0, applied.stderr
    return made


class Tail:
    """A tail under way."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._parts = {"stdout": b"", "stderr": b""}

    def until(self, text: str, *, on: str = "stdout") -> str:
        """All that it has said on that stream, once `text` is in it."""
        stream = getattr(self.process, on)
        deadline = time.monotonic() + LIMIT_S
        while text.encode() not in self._parts[on]:
            assert time.monotonic() < deadline, f"never said {text!r}: {self._parts}"
            if select.select([stream], [], [], 0.5)[0]:
                part = os.read(stream.fileno(), 65536)
                assert part, (
                    f"ended without {text!r}: {self._parts}, {self.process.stderr and self.process.stderr.read()!r}"
                )
                self._parts[on] += part
        return self._parts[on].decode()

    def ctrl_c(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(LIMIT_S)


@contextmanager
def tailing(on: Streams | Instance, *arguments: str, waits: bool = True) -> Iterator[Tail]:
    process = subprocess.Popen(
        on.command("tail", *arguments),
        cwd=on.folder,
        env=on.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    tail = Tail(process)
    try:
        if waits:
            tail.until(WAITING, on="stderr")
        yield tail
    finally:
        process.kill()
        process.communicate()


def records(lines: Sequence[str]) -> list[tuple[str, str]]:
    return [(record["device_id"], record["subject"]) for record in map(json.loads, lines)]


def test_a_reading_that_is_sent_over_http_is_shown_and_still_stored(running: Instance) -> None:
    with tailing(running, "--tenant", "demo") as tail:
        status, _ = running.send({"shown_by_tail": 42, "door": "half open"})
        assert status == 202
        said = tail.until("shown_by_tail=42")
        assert tail.ctrl_c() == 130
    assert 'demo/demo-1  telemetry  shown_by_tail=42 door="half open"\n' in said
    assert running.pulse("audit").returncode == 0


def test_what_it_waits_for_is_told_on_stderr(streams: Streams) -> None:
    with tailing(streams, "--tenant", "acme") as tail:
        said = tail.until("──\n", on="stderr")
        assert said == "── waiting for messages in TELEMETRY on telemetry.acme ──\n"
        assert tail.ctrl_c() == 130
        assert tail.process.communicate() == (b"", b"")


def test_only_what_was_asked_for_is_shown_and_counted(streams: Streams) -> None:
    with tailing(streams, "--tenant", "acme", "--device", "t-1", "--json", "--count", "2") as tail:
        streams.publish("telemetry.other", envelope("other", "t-1"))
        streams.publish("telemetry.acme", b"no envelope", envelope("acme", "t-2"), envelope("acme", "t-1"))
        streams.publish("telemetry.acme", envelope("acme", "t-1"), envelope("acme", "t-1"))
        output, _ = tail.process.communicate(timeout=LIMIT_S)
    assert tail.process.returncode == 0
    assert records(output.decode().splitlines()) == [("t-1", "telemetry.acme")] * 2


def test_since_begins_in_the_past_and_goes_on(streams: Streams) -> None:
    streams.publish("telemetry.acme", envelope("acme", "before"))
    with tailing(streams, "--since", "10m", "--json", "--count", "2", waits=False) as tail:
        tail.until("before")
        streams.publish("telemetry.acme", envelope("acme", "after"))
        output, _ = tail.process.communicate(timeout=LIMIT_S)
    assert [name for name, _ in records(output.decode().splitlines())][-1:] == ["after"]


def test_without_since_the_past_is_not_shown(streams: Streams) -> None:
    streams.publish("telemetry.acme", envelope("acme", "before"))
    with tailing(streams, "--json", "--count", "1") as tail:
        streams.publish("telemetry.acme", envelope("acme", "after"))
        output, _ = tail.process.communicate(timeout=LIMIT_S)
    assert records(output.decode().splitlines()) == [("after", "telemetry.acme")]


def test_json_is_one_line_a_message_and_comes_at_once(streams: Streams) -> None:
    with tailing(streams, "--json") as tail:
        streams.publish("telemetry.acme", envelope("acme", "t-1", '{\n"metrics":{\n"t":"\\u001b[2J"}}'))
        (line,) = tail.until("\n").splitlines()
    assert json.loads(line)["payload"] == {"metrics": {"t": "\x1b[2J"}}


def test_control_characters_of_a_message_do_not_reach_the_terminal(streams: Streams) -> None:
    with tailing(streams, "--stream", "shadow") as tail:
        streams.publish("shadow.acme", b"\x1b]0;evil\x07\x1b[2J\xff")
        said = tail.until("evil")
    assert said.rstrip("\n").isprintable()
    assert said.endswith("shadow.acme  raw  \\x1b]0;evil\\x07\\x1b[2J\\xff\n")


def test_what_is_said_to_the_devices_of_a_tenant_can_be_followed(streams: Streams) -> None:
    with tailing(streams, "--stream", "DOWN", "--tenant", "acme", "--device", "t-1", "--count", "1") as tail:
        for tenant, device in (("beta", "t-1"), ("acme", "t-2"), ("acme", "t-1")):
            streams.publish(f"down.{tenant}.{device}.shadow.update.delta", b'{"state":{"a":1}}')
        output, _ = tail.process.communicate(timeout=LIMIT_S)
    assert output.decode().endswith('acme/t-1  ← shadow/update/delta  state={"a":1}\n')


def test_it_leaves_the_workers_consumer_alone_and_its_own_acknowledges_nothing(streams: Streams) -> None:
    before = streams.consumers("TELEMETRY")
    with tailing(streams) as tail:
        streams.publish("telemetry.acme", envelope("acme", "t-1"))
        tail.until("acme/t-1")
        during = streams.consumers("TELEMETRY")
        assert tail.ctrl_c() == 130
    assert before == {"ingest-workers": during.pop("ingest-workers")}
    (own,) = during.values()
    assert "durable_name" not in own, "the server forgets it by itself"
    assert own["ack_policy"] == "none"


def test_a_work_queue_is_listened_to_without_taking_its_jobs(streams: Streams) -> None:
    with tailing(streams, "--stream", "ROUTES", "--count", "1") as tail:
        streams.publish("routes.acme", envelope("acme", "job"))
        output, _ = tail.process.communicate(timeout=LIMIT_S)
    assert b'routes.acme  raw  {"v":1,"tenant_id":"acme","device_id":"job"' in output
    assert streams.consumers("ROUTES").keys() == {"route-delivery"}
    refused = streams.pulse("tail", "--stream", "ROUTES", "--since", "1h")
    assert refused.returncode == 2
    assert "no --since" in refused.stderr


def test_it_ends_quietly_when_nobody_reads_any_more_even_where_nothing_comes(streams: Streams) -> None:
    with tailing(streams) as tail:
        assert tail.process.stdout is not None
        tail.process.stdout.close()
        assert tail.process.wait(LIMIT_S) == 0
        assert tail.process.stderr is not None
        assert tail.process.stderr.read() == b""


def test_it_follows_again_after_an_outage_and_misses_nothing(streams: Streams) -> None:
    with tailing(streams, "--json") as tail:
        streams.publish("telemetry.acme", envelope("acme", "before"))
        tail.until("before")
        streams.nats.kill()
        tail.until("the connection to NATS is lost", on="stderr")
        streams.nats.restart()
        streams.publish("telemetry.acme", envelope("acme", "meanwhile"))
        said = tail.until("meanwhile")
        tail.until("following again behind message 1", on="stderr")
        assert tail.ctrl_c() == 130
    assert [name for name, _ in records(said.splitlines())] == ["before", "meanwhile"]


def test_messages_that_are_gone_before_they_were_shown_are_told(streams: Streams) -> None:
    async def purge() -> None:
        async with connection(streams.nats.url, name="test", wait_s=10) as client:
            await client.jetstream().purge_stream("TELEMETRY", seq=4)

    with tailing(streams, "--json") as tail:
        streams.publish("telemetry.acme", envelope("acme", "one"))
        tail.until("one")
        tail.process.send_signal(signal.SIGSTOP)
        streams.nats.restart()
        streams.publish("telemetry.acme", *(envelope("acme", name) for name in ("two", "three", "four")))
        asyncio.run(purge())
        tail.process.send_signal(signal.SIGCONT)
        tail.until("four")
        assert "2 messages are gone" in tail.until("are gone", on="stderr")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--tenant", "../x"], 1, "tenant_id must be"),
        (["--since", "soon"], 2, "is not a length of time"),
        (["--stream", "NONE"], 2, "Invalid value for '--stream'"),
    ],
)
def test_a_wrong_call_is_told(arguments: list[str], code: int, said: str, streams: Streams) -> None:
    done = streams.pulse("tail", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_a_stream_that_is_not_there_is_told_with_the_way_out(tmp_path: Path, nats: NatsServer) -> None:
    done = Streams(tmp_path, nats).pulse("tail")
    assert done.returncode == 2
    assert "pulse streams apply" in done.stderr
