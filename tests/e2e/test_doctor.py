"""`pulse doctor` beside a running `pulse up`: it finds the systems, the roles and the disk by itself."""

from __future__ import annotations

import json
import time

from pulse_up import READY_S_MAX, Instance

ROLES = {"role gateway", "role ingest", "role maintenance", "role ui"}


def examined(running: Instance) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the last finding of each check."""
    done = running.pulse("doctor", "--json")
    assert done.stdout, done.stderr
    return done.returncode, {each["check"]: each for each in json.loads(done.stdout)["findings"]}


def until_well(running: Instance) -> dict[str, dict[str, str]]:
    """The findings once nothing fails: others have used the instance, some have held up a role of it."""
    deadline = time.monotonic() + READY_S_MAX
    while True:
        code, findings = examined(running)
        if code == 0:
            return findings
        assert time.monotonic() < deadline, findings


def test_beside_pulse_up_it_finds_everything_by_itself_and_all_is_well(running: Instance) -> None:
    findings = until_well(running)
    assert findings.keys() >= {*ROLES, "disk", "nats sync", "registry", "audit"}
    assert {findings[role]["text"] for role in ROLES} == {"ready"}
    assert str(running.data_dir) in findings["disk"]["text"]


def test_a_role_that_stands_still_is_named(running: Instance) -> None:
    until_well(running)
    child = running.child(["serve", "maintenance"])
    child.suspend()
    try:
        code, findings = examined(running)
    finally:
        child.resume()
    assert code == 1
    assert [check for check, each in findings.items() if each["status"] == "failing"] == ["role maintenance"]
    assert "no answer in time" in findings["role maintenance"]["text"]
