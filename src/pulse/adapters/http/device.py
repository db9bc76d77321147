"""A device's side of the gateway.

202, any 4xx but 408 and 429         final
408, 429, 5xx, no answer             to be sent again under the same Idempotency-Key, so that it is stored once
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
from yarl import URL

from pulse.domain.errors import ConfigurationError, Outage
from pulse.domain.simulation import Message
from pulse.domain.tally import NO_ANSWER as NO_ANSWER_NAME

SYSTEM = "gateway"
ACCEPTED = 202
NO_ANSWER = 0
RETRY_AFTER_S_MAX = 20.0
"""What a gateway may ask for; more is not waited."""
REQUEST_S_MAX = 15.0
"""Above the gateway's own limit for a message, so that it is the gateway who says that it takes too long."""
CHECK_S_MAX = 5.0

DUPLICATE = b'"duplicate":true'


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What one try came to; `status` is NO_ANSWER where the connection broke or the answer did not come."""

    status: int
    duplicate: bool = False
    retry_after_s: float = 0.0

    @property
    def name(self) -> str:
        """What it is counted under."""
        return NO_ANSWER_NAME if self.status == NO_ANSWER else str(self.status)

    @property
    def accepted(self) -> bool:
        """Whether the message is on disk."""
        return self.status == ACCEPTED

    @property
    def final(self) -> bool:
        """Whether trying again would change nothing."""
        return self.status == ACCEPTED or (400 <= self.status < 500 and self.status not in (408, 429))


class DeviceClient:
    """Sends for all devices of one tenant, over connections that stay open; made by `open_device_client`."""

    def __init__(self, session: aiohttp.ClientSession, url: URL, *, tenant_id: str) -> None:
        self._session = session
        self._url = url
        self._prefix = f"{url.raw_path.rstrip('/')}/ingest/v1/tenant/{tenant_id}/device/"
        self._targets: dict[tuple[str, str], URL] = {}

    async def send(self, message: Message) -> Answer:
        """One try."""
        headers = {
            "Authorization": f"Bearer {message.token}",
            "Content-Type": "application/json",
            "Idempotency-Key": message.key,
        }
        target = self._targets.get((message.device_id, message.kind))
        if target is None:
            target = self._url.with_path(f"{self._prefix}{message.device_id}/{message.kind}", encoded=True)
            self._targets[message.device_id, message.kind] = target
        try:
            async with self._session.post(target, data=message.body, headers=headers) as response:
                body = await response.read()
                after = response.headers.get("Retry-After", "") if response.status != ACCEPTED else ""
                return Answer(
                    response.status,
                    duplicate=DUPLICATE in body,
                    retry_after_s=min(float(after), RETRY_AFTER_S_MAX) if after.isdecimal() else 0.0,
                )
        except (aiohttp.ClientError, OSError):
            return Answer(NO_ANSWER)

    async def check(self) -> None:
        """Raise Outage where no gateway answers."""
        try:
            async with self._session.get(
                self._url.with_path("/livez"), timeout=aiohttp.ClientTimeout(total=CHECK_S_MAX)
            ) as response:
                await response.read()
        except (aiohttp.ClientError, OSError) as error:
            number = error.errno if isinstance(error, OSError) else None
            why = os.strerror(number) if number else type(error).__name__
            raise Outage(
                SYSTEM, f"no gateway answers at {self._url} ({why})", hint="is it running? `pulse up` starts one"
            ) from error


@asynccontextmanager
async def open_device_client(base_url: str, *, tenant_id: str, connections: int) -> AsyncIterator[DeviceClient]:
    """A client of the gateway at `base_url` with at most so many connections.

    Raises ConfigurationError where that is no http(s) URL.
    """
    try:
        url = URL(base_url)
    except ValueError as error:
        raise ConfigurationError(f"{base_url!r} is not a URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError(f"{base_url!r} is not the URL of a gateway", hint="like http://127.0.0.1:8080")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=REQUEST_S_MAX),
        skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
    ) as session:
        yield DeviceClient(session, url, tenant_id=tenant_id)
