"""Every service of `compose/docker-compose.yml`, by the command and with the environment that stand there.

With nats-server under compose's nats.conf and accounts, a PostgreSQL that compose's init.sql has prepared, and a real
PgBouncer under compose's pgbouncer.ini. There are no containers: tests/compose_stack.py says what is different.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager

import asyncpg
import pytest

from compose_client import (
    STOP_S_MAX,
    ask,
    audit,
    execute,
    init_environment,
    passwords,
    rows,
    rows_once_there,
    run_init,
    url_of,
)
from compose_files import EXPORTED, NATS_CONF, is_role, metrics_of, nats_users, queries, services
from compose_server import container_environment, program, run
from compose_stack import Stack, start_servers
from mqtt_client import Device, device
from pulse.adapters.embedded.postgres_binaries import find_binaries
from pulse_up import wait_for
from repository import ROOT

ROLES = [name for name, each in services().items() if is_role(each)]
HANDBOOK = (ROOT / "docs" / "operations.md").read_text("utf-8")
DEAD_LETTERS = "SELECT subject, reason, body FROM dead_letters"
REFUSED = "NATS refuses a permission"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All of it, started in the order of depends_on, with a device `t-1` of tenant `acme`."""
    program("pgbouncer", install="apt install pgbouncer")
    made = Stack(folder=tmp_path_factory.mktemp("compose"), passwords=passwords())
    with made.cleanup:
        start_servers(made)
        made.run_once("migrate")
        assert made.ended["migrate"].code == 0, made.ended["migrate"].errors
        # What nats-init does, also where there is no `nats` to run it with; it runs again below, and by itself in
        # test_init_streams.py.
        applied = made.run_once("pulse", "streams", "apply", "--yes")
        assert applied.code == 0, applied.errors
        for role in ROLES:
            made.start(role)
        yield made


@pytest.fixture(scope="module")
def token(stack: Stack) -> str:
    """The token of device `t-1` of tenant `acme`, made by an operator's commands."""
    assert stack.run_once("pulse", "tenant", "add", "acme").code == 0
    done = stack.run_once("pulse", "device", "add", "acme", "t-1", "--json")
    assert (done.code, done.errors) == (0, ""), done.errors
    found = re.findall(r'"token": "([^"]+)"', done.output)
    assert len(found) == 1, done.output
    return str(found[0])


async def test_every_service_of_the_file_runs(stack: Stack) -> None:
    """And every role is healthy by the health check that stands there."""
    started = set(stack.running) | set(stack.ended) - {"init.sql"}
    assert started | {"nats-init"} == set(services())
    for name, process in stack.running.items():
        assert process.alive, stack.log_of(name)
    for role in ROLES:
        assert stack.is_healthy(role), stack.log_of(role)


async def test_the_servers_are_healthy_by_the_checks_of_the_file(stack: Stack) -> None:
    """With busybox's wget, as the image has; the one of pgbouncer is asked when it starts."""
    kind, *check = services()["nats"]["healthcheck"]["test"]
    here = [each.replace("127.0.0.1:8222", f"127.0.0.1:{stack.monitor_port}") for each in check]
    busybox = program("busybox", install="apt install busybox")
    environment = container_environment(stack.folder)
    assert (kind, here == check) == ("CMD", False)
    assert run([busybox, *here], environment, folder=stack.folder).code == 0
    wrong = [each.replace("/healthz", "/nothing") for each in here]
    assert run([busybox, *wrong], environment, folder=stack.folder).code != 0
    kind, name, *arguments = services()["postgres"]["healthcheck"]["test"]
    ready = [find_binaries("", run_as=None).program(name), *arguments]
    assert run(ready, stack.administrator, folder=stack.folder).code == 0


async def test_nats_init_finds_all_as_the_command_line_made_it(stack: Stack) -> None:
    done = run_init(stack)
    assert done.code == 0, done.errors
    assert "(created)" not in done.output
    assert "(updated)" not in done.output


async def test_pulse_is_an_ordinary_role_of_postgresql(stack: Stack) -> None:
    found = await rows(stack, "SELECT rolname, rolsuper, rolcreaterole FROM pg_roles WHERE rolname = current_user")
    assert found == [{"rolname": "pulse", "rolsuper": False, "rolcreaterole": False}]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE DATABASE other",
        "CREATE ROLE other",
        "DROP ROLE pulse_tenant",
        "ALTER ROLE pulse SUPERUSER",
        "ALTER SYSTEM SET work_mem = '1GB'",
        "SET ROLE postgres",
        "SET SESSION AUTHORIZATION postgres",
        "SELECT rolpassword FROM pg_authid",
        "SELECT pg_read_file('PG_VERSION')",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
        "COPY (SELECT 1) TO PROGRAM 'true'",
    ],
)
async def test_pulse_cannot_reach_beyond_its_own_database(stack: Stack, statement: str) -> None:
    """Within it everything is its own: migrations and daily partitions need an owner."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await execute(stack, statement)


async def test_a_reading_goes_from_the_gateway_to_postgresql(stack: Stack, token: str) -> None:
    url = url_of(stack, "gateway", "gateway", "/ingest/v1/tenant/acme/device/t-1/telemetry")
    # The registry follows what the command wrote; a device that is not there yet is refused as one that never was.
    wait_for(lambda: ask(url, body={"metrics": {"probe": 1}}, token=token)[0] == 202, "the gateway knows the device")
    status, answer = ask(url, body={"metrics": {"temperature": 21.5}}, token=token)
    assert status == 202, answer
    assert json.loads(answer)["durability"] == "disk"
    statement = "SELECT tenant_id, device_id FROM telemetry WHERE metrics ? 'temperature'"
    assert await rows_once_there(stack, statement) == [{"tenant_id": "acme", "device_id": "t-1"}]
    assert audit(stack)


async def test_the_checks_of_the_handbook_work_and_the_test_message_becomes_a_dead_letter(stack: Stack) -> None:
    """The requirement's own block, word for word behind `docker exec iot-nats-init`."""
    required = re.findall(r"^docker exec iot-nats-init (nats .*)$", HANDBOOK, re.MULTILINE)
    assert re.findall(r"^    in-nats-init (nats .*)$", HANDBOOK, re.MULTILINE) == required
    assert len(required) == 4
    assert "alias in-nats-init='dc run --rm --no-deps --entrypoint env nats-init'\n" in HANDBOOK
    assert await rows(stack, DEAD_LETTERS) == []
    for command in required:
        done = run(["sh", "-c", f"env {stack.here(command)}"], init_environment(stack), folder=stack.folder)
        assert (done.code, bool(done.output + done.errors)) == (0, True), done.errors
    assert re.search(r"^ +Messages: \d", done.output, re.MULTILINE)
    assert ask(f"http://127.0.0.1:{stack.monitor_port}/healthz") == (200, '{"status":"ok"}')
    subjects = run(["nats", "stream", "subjects", "TELEMETRY", "--json"], init_environment(stack), folder=stack.folder)
    assert json.loads(subjects.output)["telemetry.test-tenant"] == 1
    dead = [{"subject": "telemetry.test-tenant", "reason": "invalid_envelope", "body": b'{"test":1}'}]
    assert await rows_once_there(stack, DEAD_LETTERS) == dead
    _, metrics = ask(url_of(stack, "ingest", "health", "/metrics"))
    assert re.search(r'^pulse_ingest_messages_total\{outcome="dead"\} 1\.0$', metrics, re.MULTILINE), metrics
    assert audit(stack)["ok"]
    # An operator can replay it; this one can only die again.
    replayed = stack.run_once("pulse", "dead-letters", "replay", "--all")
    assert replayed.code == 0, replayed.errors
    await rows_once_there(stack, f"{DEAD_LETTERS} OFFSET 1")


async def test_ingest_can_be_scaled(stack: Stack, token: str) -> None:
    """As `--scale ingest=4` does: more containers of the one service, which share its consumer."""
    for copy in (2, 3, 4):
        stack.start("ingest", copy=copy)
    url = url_of(stack, "gateway", "gateway", "/ingest/v1/tenant/acme/device/t-1/telemetry")
    for number in range(20):
        wait_for(lambda: ask(url, body={"metrics": {"scaled": number}}, token=token)[0] == 202, "accepted")  # noqa: B023
    statement = "SELECT count(*) AS count FROM telemetry WHERE metrics ? 'scaled' HAVING count(*) >= 20"
    assert await rows_once_there(stack, statement) == [{"count": 20}]
    for copy in (2, 3, 4):
        assert stack.is_healthy("ingest", copy=copy)
        stack.running[f"ingest-{copy}"].stop(STOP_S_MAX)
        assert stack.running.pop(f"ingest-{copy}").returncode == 0
    assert audit(stack)["ok"]


async def test_a_shadow_and_a_command_go_down_and_up_again_through_the_broker(stack: Stack, token: str) -> None:
    """The device speaks MQTT 3.1.1 to mosquitto, as the one user that this broker knows."""
    account, port = stack.environment("bridge"), int(stack.places["mqtt:1883"].rpartition(":")[2])
    own = "tenant/acme/device/t-1/"

    def thing() -> AbstractContextManager[Device]:
        user, password = account["PULSE_MQTT_USERNAME"], account["PULSE_MQTT_PASSWORD"]
        return device(port=port, user=user, token=password, client_id="acme/t-1", clean=False)

    def speak() -> None:
        with thing() as before:
            assert before.connect()
            for kind in (
                "shadow/update/delta",
                "shadow/name/config/update/accepted",
                "shadow/update/rejected",
                "commands",
            ):
                assert before.subscribe(own + kind)
        patched = stack.run_once("pulse", "shadow", "patch", "acme", "t-1", '{"mode":"eco"}')
        assert patched.code == 0, patched.errors
        sent = stack.run_once("pulse", "command", "send", "acme", "t-1", "blink", "{}", "--json")
        assert sent.code == 0, sent.errors
        command_id = json.loads(sent.output)["command"]["command_id"]
        with thing() as back:
            assert back.connect()
            back.wait(
                lambda: {own + "shadow/update/delta", own + "commands"} <= dict(back.heard.messages).keys(), "both"
            )
            assert json.loads(dict(back.heard.messages)[own + "shadow/update/delta"])["state"] == {"mode": "eco"}
            assert json.loads(dict(back.heard.messages)[own + "commands"])["commandId"] == command_id
            back.publish(own + "shadow/reported", b'{"state":{"reported":{"mode":"eco"}}}')
            back.publish(own + "shadow/name/config/update", b'{"state":{"reported":{"a":1}}}')
            back.publish(own + "shadow/update", b'{"state":7}')
            back.publish(own + "commands/ack", json.dumps({"commandId": command_id, "state": "succeeded"}).encode())
            kinds = {own + "shadow/name/config/update/accepted", own + "shadow/update/rejected"}
            back.wait(lambda: kinds <= dict(back.heard.messages).keys(), "the named shadow, and what is rejected")

    await asyncio.to_thread(speak)
    shadow = url_of(stack, "gateway", "gateway", "/device/v1/tenant/acme/device/t-1/shadow")
    wait_for(lambda: json.loads(ask(shadow, token=token)[1])["state"]["delta"] == {}, "no delta is left")
    statement = "SELECT state FROM commands WHERE state = 'succeeded'"
    assert await rows_once_there(stack, statement) == [{"state": "succeeded"}]
    polled = url_of(stack, "gateway", "gateway", "/device/v1/tenant/acme/device/t-1/commands?wait=0")
    assert ask(polled, token=token)[0] == 200
    assert audit(stack)["ok"]


@pytest.mark.usefixtures("token")  # for its tenant: nobody knows which tests of this module run before
async def test_the_control_api_answers_and_asks_for_a_key(stack: Stack) -> None:
    assert ask(url_of(stack, "ui", "ui", "/api/v1/tenants"))[0] == 401
    added = stack.run_once("pulse", "key", "add", "test", "--operator", "--json")
    assert added.code == 0, added.errors
    secret = next(iter(re.findall(r'"(?:secret|key)": "([^"]{20,})"', added.output)))
    for path in ("/api/v1/tenants", "/api/v1/streams", "/api/v1/audit"):
        status, answer = ask(url_of(stack, "ui", "ui", path), token=secret)
        assert status == 200, answer
    device = url_of(stack, "ui", "ui", "/api/v1/tenants/acme/devices")
    status, answer = ask(device, body={"device_id": "made-by-the-api"}, token=secret)
    assert status in (200, 201), answer


async def test_the_roles_expose_every_metric_that_an_alert_or_a_dashboard_asks_for(stack: Stack) -> None:
    exposed: set[str] = {"up"}
    for role in ROLES:
        status, text = ask(url_of(stack, role, "health", "/metrics"))
        assert status == 200
        exposed |= set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    asked = set().union(*(metrics_of(query) for query in queries().values()))
    assert asked - exposed == set(EXPORTED)


async def test_no_role_was_refused_what_it_needs(stack: Stack) -> None:
    """The permissions of nats.conf are enough for all that has gone on above."""
    assert [role for role in ROLES if REFUSED in stack.log_of(role)] == []


@pytest.mark.parametrize("role", ["gateway", "ingest", "shadow", "commands", "maintenance", "rescue"])
async def test_a_role_with_its_own_user_cannot_do_an_operator_s_work(stack: Stack, role: str) -> None:
    done = stack.run_once(role, "streams", "apply", "--yes")
    assert done.code == 2
    assert 'permissions violation for publish to "$js.api.info"' in done.errors.splitlines()[-1]


async def test_every_user_of_nats_is_connected_as_his_own_role(stack: Stack) -> None:
    port = stack.monitor_port
    _, answer = ask(f"http://127.0.0.1:{port}/connz?auth=1")
    found = {each["name"]: each["authorized_user"] for each in json.loads(answer)["connections"]}
    assert found == {f"pulse {role}": role for role in ROLES}
    assert set(ROLES) < set(nats_users(NATS_CONF.read_text("utf-8")))
