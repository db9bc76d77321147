"""What the roles say of themselves at `/metrics`; RoleMetrics satisfies `services.pipeline.EdgeMetrics`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence

import aiohttp

from pulse.domain.pipeline import Edge

TIMEOUT_S = 1.0
BODY_BYTES_MAX = 1 << 20
HTTP = re.compile(r'^pulse_gateway_requests_total\{[^}]*status="2\d\d"[^}]*\} (\S+)$', re.MULTILINE)
HTTP_KNOWN = "# TYPE pulse_gateway_requests_total"
MQTT = re.compile(r"^pulse_bridge_received_total (\S+)$", re.MULTILINE)
DELIVERED = re.compile(r'^pulse_delivery_jobs_total\{outcome="delivered"\} (\S+)$', re.MULTILINE)
DELIVERED_KNOWN = "# TYPE pulse_delivery_jobs_total"
LATENCY = re.compile(r'^pulse_ingest_end_to_end_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)


class RoleMetrics:
    """Asks each of `addresses` (host:port)."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def edge(self) -> Edge:
        """The sums over those that answered within TIMEOUT_S; nobody's absence is an error."""
        if not self._addresses:
            return Edge()
        # A session for one round: nothing is left open between two looks, and nothing has to be closed at the end.
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            texts = await asyncio.gather(*(self._text(session, address) for address in self._addresses))
        return edge_of([text for text in texts if text is not None])

    async def _text(self, session: aiohttp.ClientSession, address: str) -> str | None:
        try:
            async with session.get(f"http://{address}/metrics") as answer:
                if answer.status != 200:
                    return None
                return (await answer.content.read(BODY_BYTES_MAX)).decode("utf-8", "replace")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None


def edge_of(texts: Sequence[str]) -> Edge:
    """What texts in Prometheus' format 0.0.4 say together."""
    http = [_sum(HTTP.findall(text)) for text in texts if HTTP_KNOWN in text]
    mqtt = [_sum(found) for text in texts if (found := MQTT.findall(text))]
    delivered = [_sum(DELIVERED.findall(text)) for text in texts if DELIVERED_KNOWN in text]
    latency: dict[float, int] = {}
    for text in texts:
        for bound, count in LATENCY.findall(text):
            latency[float(bound)] = latency.get(float(bound), 0) + int(float(count))
    return Edge(
        http=sum(http) if http else None,
        mqtt=sum(mqtt) if mqtt else None,
        delivered=sum(delivered) if delivered else None,
        latency=latency or None,
    )


def _sum(values: Iterable[str]) -> int:
    return sum(int(float(value)) for value in values)
