"""What a process tells of itself: `/livez`, `/readyz` and `/metrics`.

    /livez    200 while the event loop turns. It shares the loop with everything else, so a blocked loop does not answer
              at all, and the prober's own timeout is the verdict; an outage never makes it fail.
    /readyz   200 or 503, and each dependency by name: ok, or what is waited for, and since when
    /metrics  the Prometheus text format, version 0.0.4

A probe reads state that the components keep anyway; it never asks a dependency.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from pulse.runtime.http import Application, Receive, Scope, Send, UvicornService

HEALTH_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
PROBLEM = b"application/problem+json"
_NOT_FOUND = b'{"status":404,"title":"Not Found","detail":"there is nothing at this path"}\n'
_GET_ONLY = b'{"status":405,"title":"Method Not Allowed","detail":"only GET is allowed here"}\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckStatus:
    """Where a dependency stands; `since` is Unix time in seconds, `detail` what is waited for."""

    ok: bool
    since: float
    detail: str = ""


class Check(Protocol):
    """One dependency of a process."""

    @property
    def name(self) -> str:
        """What `/readyz` calls it: `nats`, `postgresql`, `registry`."""

    def status(self) -> CheckStatus:
        """Where it stands now; read from memory."""


class Dependency:
    """A check that its component tells when something changes; it begins as not ok.

    Told the same state again, it keeps its `since`.
    """

    def __init__(self, name: str, *, detail: str = "first connection", clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self._clock = clock
        self._status = CheckStatus(ok=False, since=clock(), detail=detail)

    def status(self) -> CheckStatus:
        """Where it stands now."""
        return self._status

    def up(self) -> None:
        """It works."""
        if not self._status.ok:
            self._status = CheckStatus(ok=True, since=self._clock())

    def down(self, detail: str) -> None:
        """It is away; `detail` says what is waited for."""
        since = self._clock() if self._status.ok else self._status.since
        self._status = CheckStatus(ok=False, since=since, detail=detail)


class NotStopping:
    """The check `process`: not ready from the moment that it is told to stop, so that nobody sends it more."""

    name = "process"

    def __init__(self, stop: asyncio.Event, *, clock: Callable[[], float] = time.time) -> None:
        self._stop = stop
        self._clock = clock
        self._status = CheckStatus(ok=True, since=clock())

    def status(self) -> CheckStatus:
        """Where it stands now."""
        if self._status.ok and self._stop.is_set():
            self._status = CheckStatus(ok=False, since=self._clock(), detail="drain before the stop")
        return self._status


def health_app(*, checks: Sequence[Check], registry: CollectorRegistry) -> Application:
    """The ASGI application for HEALTH_PATHS; any other path is 404. A gateway may hand it just those paths."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        if scope["path"] not in HEALTH_PATHS:
            await _answer(send, 404, PROBLEM, _NOT_FOUND)
        elif scope["method"] not in {"GET", "HEAD"}:
            await _answer(send, 405, PROBLEM, _GET_ONLY, (b"allow", b"GET, HEAD"))
        elif scope["path"] == "/livez":
            await _answer(send, 200, b"application/json", b'{"status":"alive"}\n')
        elif scope["path"] == "/readyz":
            ready, body = readiness(checks)
            await _answer(send, 200 if ready else 503, b"application/json", body)
        else:
            await _answer(send, 200, CONTENT_TYPE_PLAIN_0_0_4.encode(), generate_latest(registry))

    return app


def readiness(checks: Sequence[Check]) -> tuple[bool, bytes]:
    """Whether every check is ok, and the JSON that says so of each by name."""
    statuses = {check.name: check.status() for check in checks}
    ready = all(status.ok for status in statuses.values())
    told = {
        "status": "ready" if ready else "waiting",
        "checks": {
            name: {
                "ok": status.ok,
                **({"waiting_for": status.detail} if not status.ok else {}),
                "since": _utc(status.since),
            }
            for name, status in statuses.items()
        },
    }
    return ready, msgspec.json.encode(told) + b"\n"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _answer(send: Send, status: int, content_type: bytes, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class HealthServer(UvicornService):
    """Serves the health paths on an address of their own; to be given first, so that it answers while others drain."""

    def __init__(
        self, *, host: str, port: int, checks: Sequence[Check], registry: CollectorRegistry, name: str = "health"
    ) -> None:
        super().__init__(
            name=name,
            app=health_app(checks=checks, registry=registry),
            host=host,
            port=port,
            setting="health",
            connections_max=100,
            keep_alive_s=5,
            shutdown_s_max=0.5,
        )
