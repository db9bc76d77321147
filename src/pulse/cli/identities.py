"""What `pulse tenant` and `pulse device` share: PostgreSQL first, with a record of the change, then the registry at
the edge.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import click

from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.pool import Scoped
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.cli.database import open_database
from pulse.domain.access import ChangeRecord
from pulse.domain.errors import ConfigurationError, Outage
from pulse.runtime.settings import Settings

limit_option = click.option(
    "--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many to list."
)
status_option = click.option(
    "--status", type=click.Choice(["enabled", "disabled"]), help="Only those that are; default: both."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identities:
    """The store, and the way from it to the edge."""

    store: IdentityStore
    truth: RegistryTruth
    settings: Settings

    async def project(self, keys: Sequence[str], *, on_progress: Callable[[int], None] | None = None) -> bool:
        """Tell the edge of what was committed under these registry keys; a warning where it cannot be told now."""
        try:
            async with connection(self.settings.nats_url, name="pulse cli") as client:
                await RegistryBucket(client).project(keys, self.truth.load, on_progress=on_progress)
        except (Outage, ConfigurationError) as error:
            click.echo(
                "pulse: warning: this is saved, but the edge has not been told: "
                f"{error}. The maintenance role tells it as soon as it can.",
                err=True,
            )
            return False
        return True


@asynccontextmanager
async def open_identities(settings: Settings, record: ChangeRecord | None = None) -> AsyncIterator[Identities]:
    """The identities in the database of `settings`; each transaction of the store also writes `record`."""
    async with open_database(settings) as pool:
        store = IdentityStore(Scoped(pool=pool, record=record), presence_after=settings.presence_after())
        yield Identities(store=store, truth=RegistryTruth(pool), settings=settings)


def change(action: str, target: str, tenant_id: str | None, **details: object) -> ChangeRecord:
    """The record of a change by the command line, in the name of whoever runs it."""
    return ChangeRecord(key_id=None, actor=_user(), action=action, tenant_id=tenant_id, target=target, details=details)


def _user() -> str:
    """The operating system's name of this process's user; `cli` where it has none, as in many a container."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "cli"


def enabled_of(status: str | None) -> bool | None:
    """What `--status` asks for."""
    return None if status is None else status == "enabled"


def status_of(enabled: bool) -> str:
    """How a table says it."""
    return "enabled" if enabled else "disabled"
