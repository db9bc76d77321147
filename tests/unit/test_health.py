"""Health: what the three paths answer, from memory alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from pulse.runtime.health import HEALTH_PATHS, Check, CheckStatus, Dependency, NotStopping, health_app
from pulse.runtime.metrics import process_registry


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


async def ask(
    path: str, *checks: Check, method: str = "GET", registry: CollectorRegistry | None = None
) -> tuple[int, dict[str, str], bytes]:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("health reads no body")

    app = health_app(checks=checks, registry=registry or CollectorRegistry())
    await app({"type": "http", "method": method, "path": path}, receive, send)
    start, body = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert int(headers["content-length"]) == len(body["body"])
    return start["status"], headers, body["body"]


async def test_livez_is_200_even_while_every_dependency_is_away() -> None:
    status, _, body = await ask("/livez", Dependency("nats"))
    assert (status, json.loads(body)) == (200, {"status": "alive"})


async def test_readyz_says_of_each_dependency_what_is_waited_for_and_since_when() -> None:
    clock = Clock(1_700_000_000.0)
    nats, postgresql = Dependency("nats", clock=clock), Dependency("postgresql", clock=clock)
    nats.up()
    clock.now += 60
    postgresql.down("connection refused")
    status, headers, body = await ask("/readyz", nats, postgresql)
    assert status == 503
    assert headers["content-type"] == "application/json"
    assert headers["cache-control"] == "no-store"
    assert json.loads(body) == {
        "status": "waiting",
        "checks": {
            "nats": {"ok": True, "since": "2023-11-14T22:13:20Z"},
            "postgresql": {"ok": False, "waiting_for": "connection refused", "since": "2023-11-14T22:13:20Z"},
        },
    }


async def test_readyz_is_200_once_every_dependency_is_up() -> None:
    nats = Dependency("nats")
    assert (await ask("/readyz", nats))[0] == 503
    nats.up()
    status, _, body = await ask("/readyz", nats)
    assert (status, json.loads(body)["status"]) == (200, "ready")


def test_a_dependency_keeps_its_since_until_it_changes() -> None:
    clock = Clock(1.0)
    nats = Dependency("nats", clock=clock)
    history = [nats.status()]
    for now, change in ((2.0, nats.up), (3.0, nats.up), (4.0, lambda: nats.down("a")), (5.0, lambda: nats.down("b"))):
        clock.now = now
        change()
        history.append(nats.status())
    assert history == [
        CheckStatus(ok=False, since=1.0, detail="first connection"),
        CheckStatus(ok=True, since=2.0),
        CheckStatus(ok=True, since=2.0),
        CheckStatus(ok=False, since=4.0, detail="a"),
        CheckStatus(ok=False, since=4.0, detail="b"),
    ]


async def test_a_stopping_process_is_not_ready() -> None:
    stop = asyncio.Event()
    check = NotStopping(stop, clock=Clock(0.0))
    assert (await ask("/readyz", check))[0] == 200
    stop.set()
    status, _, body = await ask("/readyz", check)
    assert status == 503
    assert json.loads(body)["checks"]["process"]["waiting_for"] == "drain before the stop"


async def test_metrics_are_prometheus_text() -> None:
    status, headers, body = await ask("/metrics", registry=process_registry(role="ingest"))
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert {"pulse_build", "process_resident_memory_bytes", "python_info"} <= names


@pytest.mark.parametrize("path", sorted(HEALTH_PATHS))
async def test_only_reading_is_allowed(path: str) -> None:
    status, headers, _ = await ask(path, method="POST")
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert (await ask(path, method="HEAD"))[0] == 200


async def test_any_other_path_is_404() -> None:
    assert (await ask("/healthz"))[0] == 404
