"""What `pulse up` does between its servers and its roles: streams, schema, and a demo device to send with."""

from __future__ import annotations

from pathlib import Path

from pulse.adapters.embedded.files import write_private
from pulse.adapters.nats.connection import connection
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.registry import RegistryBucket
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import open_connection
from pulse.adapters.postgres.registry import RegistryTruth
from pulse.cli.context import as_async
from pulse.cli.database import open_database
from pulse.domain.errors import CheckFailed
from pulse.domain.identity import NewDevice
from pulse.domain.registry import device_key, tenant_key
from pulse.runtime.settings import Settings
from pulse.topology.declared import load

DEMO_TENANT = "demo"
DEMO_DEVICE = "demo-1"
TOKEN_FILE = "demo-token"  # noqa: S105 - a file name
MIGRATION_TIMEOUT_S = 3600.0


@as_async
async def prepare(settings: Settings, folder: Path) -> str | None:
    """Converge streams and schema; returns the demo device's token, None where there are tenants but no demo.

    Raises CheckFailed for a change of the streams that would cost messages or cannot be made in place.
    """
    async with connection(settings.nats_url, name="pulse up", wait_s=10.0) as client:
        declared = load(stream_replicas=settings.stream_replicas)
        provisioner = Provisioner(client)
        plan = await provisioner.plan(declared)
        if plan.blocked or plan.costly:
            raise CheckFailed(
                "the streams in this data folder differ from what is declared, and changing them has a price",
                hint="start once with the version that made them, and see `pulse streams plan`",
            )
        await provisioner.apply(declared, plan)
        async with open_connection(
            settings.database_url, timeout_s=MIGRATION_TIMEOUT_S, application_name="pulse up"
        ) as database:
            await migrate(database, available())
        async with open_database(settings, command="up") as pool:
            store = IdentityStore(pool, presence_after=settings.presence_after())
            token_path = folder / TOKEN_FILE
            known = token_path.read_text("ascii").strip() if token_path.exists() else None
            token = known or await _make_demo(store)
            if token is not None:
                write_private(token_path, token + "\n")
                keys = [tenant_key(DEMO_TENANT), device_key(DEMO_TENANT, DEMO_DEVICE)]
                await RegistryBucket(client).project(keys, RegistryTruth(pool).load)
            return token


async def _make_demo(store: IdentityStore) -> str | None:
    """Make the demo device in a database that has no other tenants; returns its token.

    A start that was cut short before the token was written leaves the demo behind: its device gets a new token.
    """
    tenants = await store.tenants(limit=2)
    if not tenants:
        await store.add_tenant(DEMO_TENANT, name="Demo")
    elif [tenant.tenant_id for tenant in tenants] != [DEMO_TENANT]:
        return None
    device = NewDevice(device_id=DEMO_DEVICE, name="Demo device")
    return (await store.add_devices(DEMO_TENANT, [device], reissue=True))[DEMO_DEVICE]
