"""The streams and consumers that the roles work on, by the names under which `topology/` declares them."""

from __future__ import annotations

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.streams import StreamState, stream_state
from pulse.domain.errors import ConfigurationError, Outage
from pulse.domain.topics import UPWARD

TELEMETRY = "TELEMETRY"
INGEST_WORKERS = "ingest-workers"
DEAD_LETTERS = "DEAD_LETTERS"
DOWN = "DOWN"
BRIDGE_DOWN = "bridge-down"
RESCUE_WORKERS = "rescue-workers"
COMMANDS = "COMMANDS"
COMMAND_WORKERS = "command-workers"
SHADOW = "SHADOW"
SHADOW_WORKERS = "shadow-workers"
ROUTES = "ROUTES"
ROUTE_DELIVERY = "route-delivery"
LATER = "LATER"
LATER_DELIVERY = "later-delivery"
WORKERS = {TELEMETRY: INGEST_WORKERS, SHADOW: SHADOW_WORKERS, COMMANDS: COMMAND_WORKERS}
"""The streams whose messages the ledger settles, and the consumer that hands them out: what is audited."""
SERVED = {kind.stream: kind.subject_prefix for kind in UPWARD.values()}
"""The streams that messages of devices go to, with the first token of their subjects."""


async def state_of(client: PulseClient, stream: str) -> StreamState:
    """The state of a stream; its absence is an Outage.

    Whoever makes it anew removes it first, and a worker that died of that would lose what it holds.
    """
    try:
        return await stream_state(client, stream)
    except ConfigurationError as error:
        raise Outage("nats", error.message, hint=error.hint) from error
