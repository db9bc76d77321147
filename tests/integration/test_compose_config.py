"""The compose files as compose itself reads them: its schema, its variables, its references."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compose_files import FOLDER, LAYERS, services
from compose_server import container_environment, program, run
from repository import ROOT, copy

COMPOSE_GO = "github.com/compose-spec/compose-go/v2/cmd@v2.16.2, as compose-go"


@pytest.fixture
def checkout(scratch: Path) -> Path:
    """A copy with `compose/.env` made by its script."""
    copy(scratch)
    done = run(["sh", "compose/make-env.sh"], container_environment(scratch), folder=scratch)
    assert (done.code, done.errors) == (0, "")
    return scratch


def docker_compose() -> list[str]:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    return [docker, "compose"]


@pytest.mark.parametrize("files", LAYERS.values(), ids=LAYERS)
def test_docker_compose_takes_the_files(checkout: Path, files: tuple[Path, ...]) -> None:
    options = [option for file in files for option in ("-f", f"compose/{file.name}")]
    command = [*docker_compose(), *options, "--profile", "*", "config", "--format", "json"]
    done = run(command, container_environment(checkout), folder=checkout)
    assert (done.code, done.errors) == (0, "")
    assert set(json.loads(done.output)["services"]) == set(services(*files))


@pytest.mark.parametrize("files", LAYERS.values(), ids=LAYERS)
def test_the_library_that_docker_compose_reads_with_takes_the_files(files: tuple[Path, ...], tmp_path: Path) -> None:
    """It has the schema, so this also runs where there is no docker; and it merges as our tests take it to."""
    compose_go = program("compose-go", install=f"go install {COMPOSE_GO}")
    environment = container_environment(tmp_path)
    command = [compose_go, "-no-interpolation", "-no-path-resolution", "-format", "json"]
    done = run([*command, *map(str, files)], environment, folder=ROOT)
    assert (done.code, done.errors) == (0, "")
    merged = json.loads(done.output)["services"]
    expected = services(*files)
    assert set(merged) == set(expected)
    for name, each in expected.items():
        told = merged[name]
        assert _environment(told) == each.get("environment", {}), name
        mounts = {f"{mount['source']}:{mount['target']}" for mount in told.get("volumes") or []}
        assert mounts == {mount.removesuffix(":ro") for mount in each.get("volumes", [])}, name
        assert set(told.get("depends_on") or {}) == set(each.get("depends_on", {})), name
        assert (told.get("command") or []) == each.get("command", []), name
    broken = tmp_path / "broken.yml"
    broken.write_text(files[0].read_text("utf-8").replace("restart:", "restarts:"), "utf-8")
    assert run([*command, str(broken)], environment, folder=ROOT).code != 0


def _environment(service: dict[str, Any]) -> dict[str, str]:
    """Compose writes what it has merged as a list."""
    found = service.get("environment") or {}
    return dict(line.split("=", 1) for line in found) if isinstance(found, list) else found


def test_compose_names_the_variable_that_is_missing(tmp_path: Path) -> None:
    """And says what to do; it reads no .env here, so all of them are."""
    compose_go = program("compose-go", install=f"go install {COMPOSE_GO}")
    done = run([compose_go, str(FOLDER / "docker-compose.yml")], container_environment(tmp_path), folder=tmp_path)
    assert done.code != 0
    assert "NATS_GATEWAY_PASSWORD is missing a value: run sh compose/make-env.sh" in done.errors


def test_the_environment_file_is_private_random_and_made_once(checkout: Path) -> None:
    path = checkout / "compose" / ".env"
    lines = [line for line in path.read_text("utf-8").splitlines() if "=" in line and not line.startswith("#")]
    passwords = dict(line.split("=", 1) for line in lines)
    assert all(len(each) == 33 and each.isalnum() and each.startswith("p") for each in passwords.values())
    assert len(set(passwords.values())) == len(passwords)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = run(["sh", "compose/make-env.sh"], container_environment(checkout), folder=checkout)
    assert again.code == 1
    assert "is there already" in again.errors
    assert dict(line.split("=", 1) for line in path.read_text("utf-8").splitlines() if line in lines) == passwords
