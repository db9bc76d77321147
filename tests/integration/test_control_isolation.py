"""P8: a key sees its tenant alone, and PostgreSQL enforces it whatever the statement says."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from control_api import NOW, Api, control_api
from pulse.adapters.embedded import ports
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.postgres.access import ChangeLog, KeyStore
from pulse.adapters.postgres.identity import IdentityStore
from pulse.adapters.postgres.migrate import available, migrate
from pulse.adapters.postgres.pool import Scoped, open_connection, transaction
from pulse.adapters.postgres.rollups import RollupStore
from pulse.domain.access import ChangeRecord
from pulse.domain.errors import ConfigurationError, Refusal
from pulse.domain.identity import NewDevice
from pulse.domain.presence import PRESENCE_AFTER

TENANT_TABLES = {"tenants", "devices", "device_tokens", "telemetry", "device_state", "dead_letters", "audit_log"}
TENANT_TABLES |= {"telemetry_minutes", "telemetry_hours"}
TENANT_TABLES |= {"shadows", "shadow_changes", "commands", "command_moves", "fleet_commands"}
TENANT_TABLES |= {"routes", "route_secrets", "route_health", "route_attempts", "route_matches", "ordered_lines"}


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


async def fill(api: Api) -> None:
    """Something of both tenants in every table that has a tenant."""
    for tenant in ("acme", "other"):
        await api.store([(NOW, {"temp": 1}), (NOW + timedelta(days=1), {"temp": 2})], tenant=tenant)
        async with transaction(api.pool) as database:
            await database.execute("INSERT INTO device_state VALUES ($1, 'boiler', now())", tenant)
            await database.execute(
                "INSERT INTO dead_letters"
                " (stream, position, subject, tenant_id, reason, error, headers, body, attempts, published_at)"
                " SELECT 'T', count(*), 's', $1, 'r', 'e', '', '', 1, now() FROM dead_letters",
                tenant,
            )
        record = ChangeRecord(key_id=None, actor="test", action="device.create", tenant_id=tenant, target="kettle")
        await IdentityStore(Scoped(pool=api.pool, record=record), presence_after=PRESENCE_AFTER).add_devices(
            tenant, [NewDevice(device_id="kettle")]
        )
        path = f"/tenants/{tenant}"
        await api.patch(f"{path}/devices/boiler/shadow", {"desired": {"power": "on"}})
        await api.post(f"{path}/devices/boiler/commands", {"name": "reboot"})
        await api.post(f"{path}/fleet-commands", {"name": "reboot", "filter": {"all": True}})
        to = {"kind": "webhook", "url": "https://hooks.test/"}
        assert (await api.post(f"{path}/routes", {"route_id": "r", "destination": to})).status_code == 201
        async with transaction(api.pool) as database:
            await database.execute("INSERT INTO route_matches (tenant_id, route_id) VALUES ($1, 'r')", tenant)
            await database.execute(
                "INSERT INTO ordered_lines (tenant_id, route_id, device_id, epoch, jobs)"
                " VALUES ($1, 'r', 'boiler', 1, 1)",
                tenant,
            )
            await database.execute(
                "INSERT INTO route_attempts"
                " (tenant_id, route_id, slot, number, at, webhook_id, device_id, attempt, outcome)"
                " VALUES ($1, 'r', 1, 1, now(), '1:r', 'boiler', 1, 'dead')",
                tenant,
            )
    await RollupStore(api.pool).add()


async def test_a_statement_without_any_filter_shows_one_tenants_rows_alone(api: Api) -> None:
    await fill(api)
    for table in sorted(TENANT_TABLES):
        async with transaction(Scoped(pool=api.pool, tenant_id="acme")) as database:
            rows = await database.fetch(f"SELECT tenant_id FROM {table}")  # noqa: S608
        assert {row["tenant_id"] for row in rows} == {"acme"}, table
        async with transaction(api.pool) as database:
            everything = await database.fetch(f"SELECT tenant_id FROM {table}")  # noqa: S608
        assert {row["tenant_id"] for row in everything} == {"acme", "other"}, table


async def test_every_table_of_tenants_has_row_level_security(api: Api) -> None:
    """Fails where a later migration adds a table with a tenant_id and forgets its policy."""
    async with transaction(api.pool) as database:
        rows = await database.fetch(
            """
            SELECT relname, relrowsecurity, EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid) AS has_policy
            FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'tenant_id'
            WHERE relkind IN ('r', 'p') AND NOT relispartition AND relnamespace = 'public'::regnamespace
            """
        )
    assert {row["relname"] for row in rows} >= TENANT_TABLES | {"api_keys", "outbox"}
    assert [row["relname"] for row in rows if not row["relrowsecurity"]] == []
    assert {row["relname"] for row in rows if not row["has_policy"]} == {"api_keys", "ordered_jobs"}


FORBIDDEN = (
    "SELECT * FROM api_keys",
    "SELECT * FROM ledger",
    "SELECT * FROM stream_epochs",
    "SELECT * FROM schema_migrations",
    "SELECT * FROM telemetry_20260301",
    "SELECT * FROM telemetry_minutes_20260301",
    "SELECT * FROM telemetry_hours_202603",
    "SELECT * FROM telemetry_retired",
    "SELECT * FROM telemetry_dropped",
    "SELECT positions FROM rollup_pending",
    "DELETE FROM rollup_pending",
    "INSERT INTO telemetry SELECT * FROM telemetry",
    "UPDATE tenants SET enabled = false",
    "DELETE FROM devices",
    "DELETE FROM audit_log",
    "UPDATE audit_log SET actor = 'somebody else'",
    "INSERT INTO devices (tenant_id, device_id) VALUES ('other', 'mine')",
    "UPDATE devices SET tenant_id = 'other'",
    "INSERT INTO audit_log (actor, action, tenant_id) VALUES ('a', 'b', 'other')",
    "INSERT INTO shadows (tenant_id, device_id) VALUES ('other', 'boiler')",
    "INSERT INTO outbox (tenant_id, device_id, topic, body) VALUES ('other', 'boiler', 'commands', '{}')",
    "SELECT * FROM outbox",
    "DELETE FROM shadow_changes",
    "DELETE FROM commands",
    "UPDATE command_moves SET who = 'somebody else'",
    "INSERT INTO routes (tenant_id, route_id, definition) VALUES ('other', 'mine', '{}')",
    "INSERT INTO route_secrets (tenant_id, route_id, current) VALUES ('other', 'r', '')",
    "DELETE FROM route_attempts",
    "UPDATE route_matches SET jobs = 0",
    "UPDATE ordered_lines SET jobs = 0",
    "SELECT * FROM ordered_jobs",
    "UPDATE dead_letters SET body = ''",
    "CREATE TABLE mine (a int)",
)


async def execute_as_acme(api: Api, statement: str) -> None:
    async with transaction(Scoped(pool=api.pool, tenant_id="acme")) as database:
        await database.execute(statement)
        pytest.fail(f"this was done: {statement}")


async def test_what_is_not_a_tenants_to_do_is_refused_by_postgresql(api: Api) -> None:
    await fill(api)
    for statement in FORBIDDEN:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await execute_as_acme(api, statement)


async def test_changing_everything_changes_ones_own(api: Api) -> None:
    async with transaction(Scoped(pool=api.pool, tenant_id="acme")) as database:
        assert await database.execute("UPDATE devices SET enabled = false") == "UPDATE 1"
    assert (await IdentityStore(api.pool, presence_after=PRESENCE_AFTER).device("other", "boiler")).enabled


async def test_the_role_and_the_tenant_end_with_the_transaction(api: Api) -> None:
    """All four connections of the pool have worked for a tenant; none of them still does."""

    async def hold(barrier: asyncio.Barrier) -> None:
        async with transaction(Scoped(pool=api.pool, tenant_id="acme")) as database:
            assert await database.fetchval("SELECT current_user") == "pulse_tenant"
            await barrier.wait()

    barrier = asyncio.Barrier(4)
    await asyncio.gather(*(hold(barrier) for _ in range(4)))
    for _ in range(4):
        async with transaction(api.pool) as database:
            row = await database.fetchrow("SELECT current_user, current_setting('pulse.tenant', true)")
        assert row is not None
        assert tuple(row) == ("pulse", "")


async def test_without_a_tenant_the_tenants_role_sees_nothing(api: Api) -> None:
    await fill(api)
    async with transaction(api.pool) as database:
        await database.execute("SET LOCAL ROLE pulse_tenant")
        for table in TENANT_TABLES:
            assert await database.fetchval(f"SELECT count(*) FROM {table}") == 0  # noqa: S608


async def test_a_key_reaches_its_tenant_and_no_other_on_every_path(api: Api) -> None:
    await fill(api)
    readable = [
        "",
        "/devices",
        "/commands",
        "/fleet-commands",
        "/devices/boiler",
        "/dead-letters",
        "/dead-letters/count",
    ]
    readable += [f"/routes{what}" for what in ("", "/r", "/r/attempts", "/r/health")]
    readable += [f"/devices/boiler/{what}" for what in ("telemetry", "latest", "shadow", "shadows", "commands")]
    for path in readable:
        assert (await api.get(f"/tenants/acme{path}", key=api.acme)).status_code == 200, path
        for tenant in ("other", "nobody"):
            refused = await api.get(f"/tenants/{tenant}{path}", key=api.acme)
            assert refused.status_code == 403, path
            # The same words for a tenant that is there and one that is not.
            assert refused.json()["detail"] == "this key reaches tenant acme alone"
    changes: list[tuple[str, str, object]] = [
        ("POST", "/devices", {"device_id": "x"}),
        ("POST", "/devices/boiler/rotate", {}),
        ("POST", "/devices/boiler/disable", None),
        ("PATCH", "/devices/boiler", {"name": "x"}),
        ("PATCH", "/devices/boiler/shadow", {"desired": {}}),
        ("POST", "/devices/boiler/commands", {"name": "x"}),
        ("POST", "/fleet-commands", {"name": "x", "filter": {"all": True}}),
    ]
    for method, path, body in changes:
        given = {} if body is None else {"json": body}
        for key, tenant in ((api.acme, "other"), (api.acme_reader, "acme")):
            assert (await api.call(method, f"/tenants/{tenant}{path}", key=key, **given)).status_code == 403, path
    for path in ("/streams", "/audit", "/keys"):
        assert (await api.get(path, key=api.acme)).status_code == 403, path
        assert (await api.get(path)).status_code == 200, path
    for path, body in (("/tenants", {"tenant_id": "x"}), ("/keys", {"name": "x", "tenant_id": "acme"})):
        assert (await api.post(path, body, key=api.acme)).status_code == 403
    assert (await api.post("/tenants/acme/disable", key=api.acme)).status_code == 403
    assert [tenant["tenant_id"] for tenant in (await api.get("/tenants", key=api.acme)).json()["tenants"]] == ["acme"]
    seen = (await api.get("/audit-log", key=api.acme)).json()["changes"]
    assert {change["tenant_id"] for change in seen} == {"acme"}


async def test_a_key_that_does_not_open_is_told_the_same_whatever_is_wrong(api: Api) -> None:
    keys = KeyStore(api.pool)
    revoked, revoked_secret = await keys.add(name="revoked", tenant_id=None)
    await keys.revoke(revoked.key_id)
    _, expired = await keys.add(name="expired", tenant_id=None, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    never = "pulsekey_" + secrets.token_urlsafe(32)
    told = set()
    for secret in (revoked_secret, expired, never, "", "pulse_x", "pulsekey_", never + "x", "é" * 10):
        headers = {b"Authorization": f"Bearer {secret}".encode()}
        answer = await api.client.get("/api/v1/tenants", headers=headers)
        assert answer.status_code == 401, secret
        assert answer.headers["www-authenticate"] == 'Bearer realm="pulse"'
        told.add(answer.text)
    answer = await api.client.get("/api/v1/tenants", headers={"Authorization": f"Basic {api.operator}"})
    assert answer.status_code == 401
    assert len(told) == 1


async def test_a_key_ends_with_its_revocation_and_its_secret_is_nowhere_in_the_database(api: Api) -> None:
    made = (await api.post("/keys", {"name": "mine", "tenant_id": "acme", "expires_in_s": 60})).json()
    assert (await api.get("/tenants", key=made["secret"])).status_code == 200
    listed = {key["key_id"]: key for key in (await api.get("/keys")).json()["keys"]}
    assert listed[made["key"]["key_id"]]["last_used_at"] is not None
    assert (await api.post(f"/keys/{made['key']['key_id']}/revoke")).status_code == 200
    assert (await api.get("/tenants", key=made["secret"])).status_code == 401
    async with transaction(api.pool) as database:
        rows = await database.fetch("SELECT api_keys::text FROM api_keys")
        rows += await database.fetch("SELECT audit_log::text FROM audit_log")
    assert made["secret"] not in repr(rows)
    assert (await api.post("/keys", {"name": "x", "tenant_id": "nobody"})).status_code == 404


async def test_a_change_and_its_record_are_there_together_or_not_at_all(api: Api) -> None:
    record = ChangeRecord(key_id=7, actor="me", action="device.create", tenant_id="acme", target="b", details={"a": 1})
    scoped = Scoped(pool=api.pool, tenant_id="acme", record=record)
    with pytest.raises(Refusal):
        await IdentityStore(scoped, presence_after=PRESENCE_AFTER).add_devices("acme", [NewDevice(device_id="boiler")])
    assert await ChangeLog(api.pool).changes() == []
    await IdentityStore(scoped, presence_after=PRESENCE_AFTER).add_devices("acme", [NewDevice(device_id="b")])
    [logged] = await ChangeLog(api.pool).changes()
    assert (logged.key_id, logged.actor, logged.action, logged.target, logged.details) == (
        7, "me", "device.create", "b", {"a": 1},
    )  # fmt: skip
    # A record that cannot be written takes the change with it.
    wrong = Scoped(
        pool=api.pool, tenant_id="acme", record=ChangeRecord(key_id=7, actor="me", action="x", tenant_id="other")
    )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await IdentityStore(wrong, presence_after=PRESENCE_AFTER).add_devices("acme", [NewDevice(device_id="c")])
    with pytest.raises(Refusal):
        await IdentityStore(api.pool, presence_after=PRESENCE_AFTER).device("acme", "c")


async def test_the_migration_says_what_an_administrator_has_to_do(
    postgres_server_factory: object, nats: NatsServer
) -> None:
    """On a server whose owner of the database may not make roles, and where nobody has made ours."""
    server = postgres_server_factory()  # type: ignore[operator]
    assert isinstance(server, PostgresServer)
    server.start()
    administrator = await asyncpg.connect(server.url_of("postgres", superuser=True))
    try:
        await administrator.execute("DROP ROLE pulse_tenant")
        with pytest.raises(ConfigurationError) as missing:
            await migrate_all(server.url)
        assert "CREATE ROLE pulse_tenant NOLOGIN; GRANT pulse_tenant TO pulse;" in missing.value.hint
        await administrator.execute("CREATE ROLE pulse_tenant")
        with pytest.raises(ConfigurationError, match="may not work as the role pulse_tenant"):
            await migrate_all(server.url)
        await administrator.execute("GRANT pulse_tenant TO pulse; ALTER ROLE pulse_tenant BYPASSRLS")
        with pytest.raises(ConfigurationError, match="not bound by row-level security"):
            await migrate_all(server.url)
        await administrator.execute("DROP ROLE pulse_tenant; ALTER ROLE pulse CREATEROLE")
        await migrate_all(server.url)
        assert await administrator.fetchval("SELECT pg_has_role('pulse', 'pulse_tenant', 'SET')")
    finally:
        await administrator.close()
    async with control_api(server.url, nats) as api:
        assert (await api.get("/tenants/acme/devices", key=api.acme)).status_code == 200


async def test_a_cluster_from_before_there_was_the_tenants_role_gets_it_at_its_next_start(
    postgres_server_factory: object,
) -> None:
    server = postgres_server_factory()  # type: ignore[operator]
    assert isinstance(server, PostgresServer)
    server.start()
    administrator = await asyncpg.connect(server.url_of("postgres", superuser=True))
    await administrator.execute("DROP ROLE pulse_tenant")
    await administrator.close()
    server.stop()
    (server.data_dir / "passwords.sha256").write_text("of a version that knew two roles", "ascii")
    server.start()
    await migrate_all(server.url)


async def migrate_all(url: str) -> None:
    async with open_connection(url, timeout_s=10, application_name="test") as connection:
        await migrate(connection, available())


@pytest.fixture
def pgbouncer(database: str) -> Iterator[str]:
    """The URL of PgBouncer in transaction mode before `database`, with one connection to it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    url = urlsplit(database)
    port = ports.free_port()
    with tempfile.TemporaryDirectory(prefix="pulse pgbouncer ", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "users.txt").write_text(f'"{url.username}" "{url.password}"\n')
        (folder / "users.txt").chmod(0o644)
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={url.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {folder}/users.txt\n"
            "pool_mode = transaction\ndefault_pool_size = 1\nlogfile =\n"
        )
        run_as = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        process = subprocess.Popen([program, str(folder / "pgbouncer.ini")], stderr=subprocess.DEVNULL, **run_as)  # type: ignore[call-overload]
        try:
            yield f"postgresql://{url.username}:{url.password}@127.0.0.1:{port}{url.path}?sslmode=disable"
        finally:
            process.kill()
            process.wait()


async def test_through_pgbouncer_in_transaction_mode_tenants_stay_apart(
    pgbouncer: str, database: str, nats: NatsServer
) -> None:
    """One connection behind it serves both tenants and the owner in turn."""
    async with asyncio.timeout(20):
        while True:
            try:
                await (await asyncpg.connect(pgbouncer, statement_cache_size=0)).close()
                break
            except OSError:
                await asyncio.sleep(0.05)
    async with control_api(database, nats, pool_url=pgbouncer) as api:

        async def seen(key: str) -> list[str]:
            return [tenant["tenant_id"] for tenant in (await api.get("/tenants", key=key)).json()["tenants"]]

        for _ in range(5):
            found = await asyncio.gather(seen(api.acme), seen(api.operator), seen(api.other))
            assert list(found) == [["acme"], ["acme", "other"], ["other"]]
