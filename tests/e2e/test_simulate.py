"""`pulse simulate` on a running instance: its table is the truth, and it says so where it is not a good one."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg

from pulse_up import Instance, wait_for

LIMIT_S = 150.0


def simulate(on: Instance, *arguments: str) -> list[str]:
    return on.command("simulate", "--json", "--devices", "20", *arguments)


@contextmanager
def simulating(on: Instance, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run under way, on a tenant of its own; the first of its rows are stored."""
    tenant = arguments[arguments.index("--tenant") + 1]
    process = subprocess.Popen(
        simulate(on, *arguments),
        cwd=on.folder,
        env=on.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: rows(on, tenant) > 0 or process.poll() is not None, "rows of the run are stored")
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    output, error = process.communicate(timeout=LIMIT_S)
    assert output, error
    return process.returncode, json.loads(output), error


def fetch(on: Instance, sql: str, *arguments: object) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(on.database_url)
        try:
            return await connection.fetchval(sql, *arguments)
        finally:
            await connection.close()

    return asyncio.run(run())


def rows(on: Instance, tenant: str) -> int:
    return int(fetch(on, "SELECT count(*) FROM telemetry WHERE tenant_id = $1", tenant))


def test_accepted_is_stored_each_message_once_and_the_audit_agrees(running: Instance) -> None:
    done = subprocess.run(
        simulate(
            running,
            "--tenant",
            "sim-1",
            "--rate",
            "100",
            "--duration",
            "6",
            "--heartbeats",
            "0.1",
            "--duplicates",
            "0.2",
        ),
        cwd=running.folder,
        env=running.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["sent"] + report["never_sent"] == 600
    assert report["accepted"] + report["heartbeats"] == report["sent"]
    assert report["heartbeats"] > 0
    assert report["recognised_as_duplicate"] == report["sent_twice"] > 0
    assert report["storage"] == {
        "accepted": report["accepted"],
        "stored": report["accepted"],
        "missing": 0,
        "unexpected": 0,
        "duplicates": 0,
    }
    assert rows(running, "sim-1") == report["accepted"]
    assert report["latency"]["count"] == report["answers"]["202"]
    assert report["stored_after"]["count"] > 0
    assert running.pulse("audit").returncode == 0


def test_a_row_that_is_missing_is_found(running: Instance) -> None:
    with simulating(running, "--tenant", "sim-2", "--rate", "50", "--duration", "600") as process:
        fetch(
            running,
            "DELETE FROM telemetry WHERE tenant_id = $1 AND (tableoid, ctid) IN "
            "(SELECT tableoid, ctid FROM telemetry WHERE tenant_id = $1 LIMIT 1)",
            "sim-2",
        )
        process.send_signal(signal.SIGINT)  # which ends the sending and not the check
        code, report, error = ended(process)
    assert (code, report["ok"], report["storage"]["missing"]) == (1, False, 1)
    assert error.endswith("pulse: 1 accepted messages are not stored\n")


def test_a_row_that_is_there_twice_is_found(running: Instance) -> None:
    with simulating(running, "--tenant", "sim-3", "--rate", "50", "--duration", "600") as process:
        # as another position, so that only a comparison message by message can tell
        fetch(
            running,
            "INSERT INTO telemetry SELECT ts, tenant_id, device_id, seq, site_id, metrics, 0 "
            "FROM telemetry WHERE tenant_id = $1 LIMIT 1",
            "sim-3",
        )
        process.send_signal(signal.SIGINT)
        code, report, _ = ended(process)
    assert (code, report["ok"], report["storage"]["missing"], report["storage"]["duplicates"]) == (1, False, 0, 1)
    fetch(running, "DELETE FROM telemetry WHERE tenant_id = $1 AND position = 0", "sim-3")


def test_ctrl_c_ends_the_sending_and_not_the_check(running: Instance) -> None:
    with simulating(running, "--tenant", "sim-4", "--rate", "100", "--duration", "600") as process:
        process.send_signal(signal.SIGINT)
        code, report, _ = ended(process)
    assert (code, report["ok"], report["interrupted"]) == (0, True, True)
    assert 0 < report["accepted"] == report["sent"] < report["planned"] == 60_000
    assert rows(running, "sim-4") == report["accepted"]


def test_devices_that_take_part_do_what_commands_and_their_shadows_say(running: Instance) -> None:
    devices = ("--tenant", "sim-9", "--protocol", "mqtt", "--commands", "--rate", "20", "--duration", "600")
    with simulating(running, *devices) as process:
        assert running.pulse("shadow", "patch", "sim-9", "thermostat-00001", '{"target":21}').returncode == 0
        sent = running.pulse("command", "send", "sim-9", "thermostat-00001", "blink", "{}", "--wait")
        assert (sent.returncode, sent.stderr) == (0, "")
        assert "succeeded" in sent.stdout

        def state() -> Any:
            shown = running.pulse("shadow", "get", "sim-9", "thermostat-00001", "--json", check=True)
            return json.loads(shown.stdout)["state"]

        wait_for(lambda: state()["reported"] == {"target": 21}, "the device reports what it should be")
        assert state()["delta"] == {}
        process.send_signal(signal.SIGINT)
        code, report, _ = ended(process)
    assert (code, report["ok"]) == (0, True)


def test_devices_take_part_over_mqtt_alone(running: Instance) -> None:
    refused = running.pulse("simulate", "--commands", "--tenant", "sim-9")
    assert refused.returncode == 2
    assert "--protocol mqtt" in refused.stderr


def test_a_second_ctrl_c_ends_it_at_once(running: Instance) -> None:
    """It is held in its check by a lock, so the second signal cannot come too late."""

    async def press_twice(process: subprocess.Popen[str]) -> None:
        connection = await asyncpg.connect(running.database_url)
        async with connection.transaction():
            await connection.execute("LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE")
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            while "Ctrl-C again" not in await asyncio.to_thread(process.stderr.readline):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(LIMIT_S):
                assert await asyncio.to_thread(process.wait) == 130
        await connection.close()

    with simulating(running, "--tenant", "sim-5", "--rate", "100", "--duration", "600") as process:
        asyncio.run(press_twice(process))


def test_a_killed_gateway_costs_retries_and_no_message(instance: Instance) -> None:
    instance.start()
    with simulating(instance, "--tenant", "sim", "--rate", "200", "--duration", "10") as process:
        instance.child(["serve", "gateway"]).kill()
        code, report, error = ended(process)
    assert (code, report["ok"]) == (0, True), error
    assert report["retried"] > 0
    assert report["accepted"] == report["sent"]
    assert report["answers"]["no answer"] > 0


def test_over_mqtt_confirmed_is_stored_each_message_once_and_the_audit_agrees(running: Instance) -> None:
    """Each device has a connection, also where a process may at first have fewer open files than there are devices."""
    arguments = ["--protocol", "mqtt", "--tenant", "sim-mqtt-1", "--rate", "100", "--duration", "3"]
    command = simulate(running, *arguments, "--devices", "60", "--heartbeats", "0.1", "--duplicates", "0.2")
    done = subprocess.run(
        ["sh", "-c", 'ulimit -Sn 50; exec "$@"', "sh", *command],
        cwd=running.folder,
        env=running.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["protocol"]) == (True, "mqtt")
    assert report["accepted"] + report["heartbeats"] == report["sent"] > 0
    assert report["answers"] == {"puback": report["sent"] + report["sent_twice"]}
    assert report["storage"]["stored"] == report["accepted"] == rows(running, "sim-mqtt-1")
    assert report["storage"]["missing"] == report["storage"]["duplicates"] == 0


def test_over_mqtt_a_killed_nats_server_costs_retries_and_no_message(instance: Instance) -> None:
    """With every connection of a device, which comes back by itself."""
    instance.start()
    arguments = ["--protocol", "mqtt", "--tenant", "sim", "--rate", "50", "--duration", "8"]
    with simulating(instance, *arguments) as process:
        instance.child(["nats-server"]).kill()
        code, report, error = ended(process)
    assert (code, report["ok"]) == (0, True), error
    assert report["retried"] > 0
    assert report["accepted"] == report["sent"]
    assert report["storage"]["duplicates"] == 0


def test_over_mqtt_ctrl_c_ends_the_sending_and_not_the_check(running: Instance) -> None:
    arguments = ["--protocol", "mqtt", "--tenant", "sim-mqtt-2", "--rate", "50", "--duration", "600"]
    with simulating(running, *arguments) as process:
        process.send_signal(signal.SIGINT)
        code, report, error = ended(process)
    assert (code, report["ok"], report["interrupted"]) == (0, True, True), error
    assert 0 < report["accepted"] == report["sent"] < report["planned"]


def test_no_broker_is_one_line_and_makes_no_tenant(running: Instance, free_port: int) -> None:
    url = f"mqtt://127.0.0.1:{free_port}"
    done = running.pulse("simulate", "--protocol", "mqtt", "--tenant", "sim-mqtt-3", "--broker", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"pulse: no broker answers at 127.0.0.1:{free_port}")
    assert "sim-mqtt-3" not in running.pulse("tenant", "list").stdout


def test_no_gateway_is_one_line_and_makes_no_tenant(running: Instance, free_port: int) -> None:
    done = running.pulse("simulate", "--tenant", "sim-6", "--gateway", f"http://127.0.0.1:{free_port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"pulse: no gateway answers at http://127.0.0.1:{free_port}")
    assert "sim-6" not in running.pulse("tenant", "list").stdout


def test_a_tenant_that_is_disabled_is_told_before_anything_is_sent(running: Instance) -> None:
    assert running.pulse("tenant", "add", "sim-7").returncode == 0
    assert running.pulse("tenant", "disable", "sim-7").returncode == 0
    done = running.pulse("simulate", "--tenant", "sim-7")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pulse: tenant sim-7 is disabled")
