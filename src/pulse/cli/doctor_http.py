"""One bounded GET, in a thread; and what the health addresses of the roles answer."""

from __future__ import annotations

import asyncio
import http.client
import socket
import urllib.error
import urllib.request
from typing import NamedTuple

import msgspec

from pulse.domain.doctor import Finding, Status, finding

TIMEOUT_S = 2.0
BODY_BYTES_MAX = 1 << 20


class Answer(NamedTuple):
    """Of an HTTP server; status 0 where there is none, `text` then says why."""

    status: int
    body: bytes
    text: str = ""


class _Check(msgspec.Struct, frozen=True):
    ok: bool
    waiting_for: str = ""


class _Readiness(msgspec.Struct, frozen=True):
    checks: dict[str, _Check]


async def ask(url: str) -> Answer:
    """GET `url`, which is a setting of ours, within TIMEOUT_S."""
    return await asyncio.to_thread(_ask, url)


def _ask(url: str) -> Answer:
    try:
        # No proxy of the environment: these are addresses of this installation.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return Answer(answer.status, answer.read(BODY_BYTES_MAX))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read(BODY_BYTES_MAX))
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return Answer(0, b"", "no answer in time" if isinstance(reason, socket.timeout) else str(reason))


async def role(name: str, address: str) -> list[Finding]:
    """Whether a role is alive, and ready; `address` is where its health is."""
    answer = await ask(f"http://{address}/readyz")
    check = f"role {name}"
    try:
        found = msgspec.json.decode(answer.body, type=_Readiness) if answer.status in (200, 503) else None
    except msgspec.MsgspecError:
        found = None
    if found is None:
        why = f"no answer at {address}: {answer.text}" if not answer.status else f"{address} is not of a role of Pulse"
        return [finding(check, Status.FAILING, why, "start it; its log says why it ended")]
    waits = [f"{name} ({each.waiting_for})" for name, each in found.checks.items() if not each.ok]
    if waits:
        return [
            finding(check, Status.FAILING, f"waits for {', '.join(waits)}", "it goes on by itself when that is back")
        ]
    return [finding(check, Status.OK, "ready")]
