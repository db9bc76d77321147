"""PostgreSQL for a command: one connection, made when it is first needed."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from pulse.adapters.postgres.pool import Pool, open_pool
from pulse.runtime.settings import Settings


def open_database(settings: Settings, *, command: str = "cli") -> AbstractAsyncContextManager[Pool]:
    """The database of `settings`, where `command` is what it is told of who asks."""
    return open_pool(
        settings.database_url, size_max=1, timeout_s=settings.database_timeout_s, application_name=f"pulse {command}"
    )
