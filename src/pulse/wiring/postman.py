"""The postman of a role: from its part of the outbox to DOWN."""

from __future__ import annotations

from pulse.adapters.postgres.outbox import Outbox
from pulse.runtime.metrics import PostmanMetrics
from pulse.services.postman import Postman
from pulse.wiring.process import Process


def postman_of(process: Process, kind: str) -> Postman:
    """A service that posts what is of `kind` (`shadow`, `commands`); its `tell` says that there is something."""
    settings = process.settings
    return Postman(
        kind=kind,
        outbox=Outbox(process.pool, kind),
        publisher=process.committer,
        metrics=PostmanMetrics(process.metrics, kind=kind),
        retry_delay_s_min=settings.retry_delay_s_min,
        retry_delay_s_max=settings.retry_delay_s_max,
        probe=process.probe,
    )
