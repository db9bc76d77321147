"""`pulse up` as a person runs it: the real command in a real process, on free ports, in a folder of its own.

with started(folder) as instance:
    instance.pulse("audit", "--json")        any other command, which finds the running system
    instance.send({"n": 1})                  a reading of the demo device over HTTP
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from pulse.adapters.embedded import ports

SOURCE = Path(__file__).resolve().parents[1] / "src"
READY_S_MAX = 90.0
COMMAND_S_MAX = 150.0
END_S_MAX = 90.0
"""How long an ending process is waited for; that it ends within five seconds is asserted where it is the claim."""
HEALTH_PORTS = 8


def wait_for(condition: Callable[[], bool], what: str, *, limit_s: float = READY_S_MAX) -> None:
    """Return once `condition` holds; fail, saying `what`, where it does not within `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.05)


def base_environment(**variables: str) -> dict[str, str]:
    """What a child may see of ours: nothing that could lead it to another instance."""
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "VIRTUAL_ENV"}}
    return {**kept, "PYTHONPATH": str(SOURCE), "COLUMNS": "100", **variables}


@dataclass(frozen=True, kw_only=True)
class Ports:
    """All that an instance listens on; `health` is the first of HEALTH_PORTS."""

    gateway: int
    ui: int
    nats: int
    nats_monitor: int
    mqtt: int
    postgres: int
    health: int

    @classmethod
    def free(cls) -> Ports:
        """Places that nobody has now."""
        taken: set[int] = set()

        def take(count: int) -> int:
            while True:
                first = ports.free_port()
                wanted = range(first, first + count)
                if taken.isdisjoint(wanted) and all(_is_free(number) for number in wanted):
                    taken.update(wanted)
                    return first

        return cls(
            gateway=take(1),
            ui=take(1),
            nats=take(1),
            nats_monitor=take(1),
            mqtt=take(1),
            postgres=take(1),
            health=take(HEALTH_PORTS),
        )

    def settings(self) -> dict[str, str]:
        """By the names of the settings."""
        return {
            "gateway_port": str(self.gateway),
            "ui_port": str(self.ui),
            "embedded_nats_port": str(self.nats),
            "embedded_nats_monitor_port": str(self.nats_monitor),
            "embedded_mqtt_port": str(self.mqtt),
            "embedded_postgres_port": str(self.postgres),
            "health_port": str(self.health),
        }

    def listened_on(self) -> list[int]:
        """Those of them that somebody listens on now."""
        health = range(self.health, self.health + HEALTH_PORTS)
        numbers = (self.gateway, self.ui, self.nats, self.nats_monitor, self.mqtt, self.postgres, *health)
        return [number for number in numbers if not _is_free(number)]


def _is_free(number: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


@dataclass(kw_only=True)
class Instance:
    """One `pulse up`: where it runs, and how to talk to it. `folder` is its working directory, `.pulse` is below it."""

    folder: Path
    ports: Ports
    environment: Mapping[str, str]
    run_as: int | None = None
    python: str = sys.executable
    more_settings: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    before_signal: list[psutil.Process] = field(default_factory=list)
    """What ran when the last signal was sent."""

    @property
    def data_dir(self) -> Path:
        return self.folder / ".pulse"

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.gateway}"

    @property
    def ui_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.ui}"

    @property
    def operator_key(self) -> str:
        """The key of the control API that it made for this machine."""
        return (self.data_dir / "operator-key").read_text("ascii").strip()

    @property
    def nats_url(self) -> str:
        """With credentials, as the other commands find it."""
        return str(self._found()["nats_url"])

    @property
    def database_url(self) -> str:
        """With credentials, as the other commands find it."""
        return str(self._found()["database_url"])

    @property
    def token(self) -> str:
        """The token of device `demo-1` of tenant `demo`."""
        return (self.data_dir / "demo-token").read_text("ascii").strip()

    @property
    def output(self) -> str:
        """All that `pulse up` has said so far, on stdout and stderr."""
        return (self.folder / "up.output").read_text("utf-8")

    @property
    def curl(self) -> str:
        """The command that it printed for pasting, with its continuation lines."""
        found = re.search(r"^ +(curl (?:.*\\\n)*.*)$", self.output, re.MULTILINE)
        assert found, self.output
        return found[1]

    @property
    def mosquitto_pub(self) -> str:
        """The other command that it printed for pasting."""
        found = re.search(r"^ +(mosquitto_pub (?:.*\\\n)*.*)$", self.output, re.MULTILINE)
        assert found, self.output
        return found[1]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def command(self, *arguments: str) -> list[str]:
        """The command line of `pulse …` with this instance's settings."""
        assignments = {**self.ports.settings(), **self.more_settings}
        sets = [part for name, value in assignments.items() for part in ("--set", f"{name}={value}")]
        return [self.python, "-m", "pulse", *sets, *arguments]

    def pulse(
        self, *arguments: str, timeout_s: float = COMMAND_S_MAX, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run another command beside it to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=check,
            user=self.run_as,
            group=self.run_as,
        )

    def start(self, *, wait: bool = True) -> None:
        """Run `pulse up`; with `wait`, return when it says that it is up."""
        if self.process is not None:
            self.process.wait(END_S_MAX)
        output = self.folder / "up.output"
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                self.command("up"),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self.run_as,
                group=self.run_as,
                extra_groups=[] if self.run_as is not None else None,
            )
        if wait:
            wait_for(lambda: self.is_up or self.process_ended, f"`pulse up` is up; it said: {self.output}")
            assert self.is_up, self.output

    @property
    def is_up(self) -> bool:
        return "Pulse is up." in self.output

    @property
    def process_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send `number` to `pulse up` alone, as a terminal or `kill` would."""
        assert self.process is not None
        self.before_signal = self.family()
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ctrl-C; returns its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(END_S_MAX)

    def end(self) -> None:
        """Whatever happened: nothing of it is left."""
        if self.process is None:
            return
        # Orphans can be found no more by their parent.
        family = {*self.family(), *self.before_signal}
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(END_S_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(END_S_MAX)
        for each in psutil.wait_procs(family, timeout=END_S_MAX)[1]:
            each.kill()

    def family(self) -> list[psutil.Process]:
        """`pulse up` and all that it has started, down to PostgreSQL's backends."""
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def child(self, words: Sequence[str]) -> psutil.Process:
        """The one direct child whose command line contains all `words`."""
        children = psutil.Process(self.pid).children()
        found = [each for each in children if all(word in " ".join(each.cmdline()) for word in words)]
        assert len(found) == 1, f"{words}: {[each.cmdline() for each in children]}"
        return found[0]

    def send(
        self, metrics: Mapping[str, object], *, key: str | None = None, token: str | None = None
    ) -> tuple[int, dict[str, object]]:
        """A reading of the demo device; returns the status and the body of the answer."""
        headers = {"Authorization": f"Bearer {token or self.token}", "Content-Type": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = key
        request = urllib.request.Request(  # noqa: S310 - our own http URL
            f"{self.gateway_url}/ingest/v1/tenant/demo/device/demo-1/telemetry",
            data=json.dumps({"metrics": metrics}).encode(),
            headers=headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=COMMAND_S_MAX) as answer:  # noqa: S310 - as above
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def _found(self) -> dict[str, object]:
        return tomllib.loads((self.data_dir / "instance.toml").read_text("utf-8"))


def prepare(
    folder: Path,
    *,
    run_as: int | None = None,
    python: str = sys.executable,
    settings: Mapping[str, str] | None = None,
    **variables: str,
) -> Instance:
    """An instance in `folder` that does not run yet; `variables` are added to its environment."""
    return Instance(
        folder=folder,
        ports=Ports.free(),
        environment=base_environment(**variables),
        run_as=run_as,
        python=python,
        more_settings=settings or {},
    )


@contextmanager
def started(folder: Path) -> Iterator[Instance]:
    """An instance in `folder` that is up; at the end nothing of it is left but the folder."""
    instance = prepare(folder)
    try:
        instance.start()
        yield instance
    finally:
        instance.end()
