"""What the settings say of routes: which keys seal their secrets, and where webhooks may go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import msgspec

from pulse.adapters.expressions.cel import Compiler
from pulse.adapters.nats.ask import Asker
from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.sealing.box import Sealer
from pulse.adapters.webhook.check import DestinationCheck
from pulse.domain.addresses import read_networks
from pulse.domain.route_trial import Trial
from pulse.domain.webhook_url import Allowed, read_hosts
from pulse.runtime.settings import Settings
from pulse.services.dry_run import DryRuns

TRIALS = "delivery"
"""The kind of the questions to the role delivery: it tries a route."""
TRIAL_S_MAX = 28.0
"""A webhook may take 20 s; beside that, routes are read and a broker is connected to."""


class AskedTrials:
    """Has the role `delivery` try a route; satisfies `services.control_routes.Trials`."""

    def __init__(self, client: PulseClient) -> None:
        self._asker = Asker(client, timeout_s=TRIAL_S_MAX)

    async def run(self, tenant_id: str, route_id: str) -> Trial:
        """What became of one message. Raises Refusal, Outage."""
        return msgspec.json.decode(await self._asker.ask(TRIALS, tenant_id, route_id), type=Trial)


def sealer_of(settings: Settings) -> Sealer | None:
    """Seals the secrets of webhooks; None where no key is set."""
    return Sealer(settings.secret_keys.split()) if settings.secret_keys else None


def webhook_allowed(settings: Settings) -> Allowed:
    """Where webhooks may go beside the public Internet. Raises ConfigurationError for what is no network."""
    return Allowed(
        networks=read_networks(settings.webhook_networks_allowed.split()),
        hosts=read_hosts(settings.webhook_hosts_allowed.split()),
        ports=frozenset(map(int, settings.webhook_ports_allowed.split())),
        plain_http=settings.webhook_plain_http,
    )


@contextmanager
def dry_runs_of(settings: Settings) -> Iterator[DryRuns]:
    """Tries routes, within the bounds of the settings."""
    allowed = webhook_allowed(settings)
    with closing(DestinationCheck(allowed=allowed)) as destinations:
        yield DryRuns(
            expressions=Compiler(),
            destinations=destinations,
            allowed=allowed,
            body_bytes_max=settings.route_body_bytes_max,
        )
