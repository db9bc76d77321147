"""Whether a webhook may go where its host's name leads now; nothing is sent."""

from __future__ import annotations

import asyncio

from pulse.adapters.webhook.guard import ForbiddenAddress, GuardedResolver, SystemLookup
from pulse.domain.webhook_url import Allowed, WebhookUrl

LOOKUP_S_MAX = 3.0
LOOKUP_THREADS = 4


class DestinationCheck:
    """Looks names up, as the delivery role does before it sends; satisfies `services.dry_run.Destinations`."""

    def __init__(self, *, allowed: Allowed) -> None:
        self._allowed = allowed
        self._lookup = SystemLookup(threads=LOOKUP_THREADS)

    async def why_refused(self, url: WebhookUrl) -> str:
        """Why nothing may be sent there now; empty where it may. No address is named (docs/adr/0017)."""
        host = url.destination.host
        if url.address is not None:
            return ""  # checked when the URL was read
        networks = None if host in self._allowed.hosts else self._allowed.networks
        try:
            async with asyncio.timeout(LOOKUP_S_MAX):
                await GuardedResolver(self._lookup, networks).resolve(host)
        except ForbiddenAddress as error:
            return str(error)
        except TimeoutError:
            return f"{host} could not be looked up within {LOOKUP_S_MAX:g} s"
        except OSError:
            return f"{host} has no address now"
        return ""

    def close(self) -> None:
        """Look up no more."""
        self._lookup.close()
