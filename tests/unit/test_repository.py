"""What may stand in this repository, and that its lock files belong to its pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from repository import ROOT, files

FILE_BYTES_MAX = 1_000_000
SCRIPT_LINE_MAX = 1_000
"""Columns; what is longer is minified."""

LOCKS = ("requirements.lock", "requirements-dev.lock", "web.lock")
ADDRESS = re.compile(r"\w+://|^\s*(?:-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b", re.MULTILINE)
# A folder of somebody's account or machine; /home/user and the like, which stand for anybody's, are let be.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|Users|home/(?!user\b|you\b|pulse\b)\w+)/\w[\w./-]*")


def texts() -> dict[str, str]:
    """Path → text of every text file, this one excepted: it has to name what it looks for."""
    found = {}
    for path in files():
        if path.is_symlink() or path.name == "test_repository.py":
            continue
        try:
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


def pins(lock: str) -> dict[str, str]:
    """Distribution → exact version of each pin in a lock file."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def addresses(text: str) -> list[str]:
    return ADDRESS.findall(text)


def machine_paths(text: str) -> list[str]:
    return MACHINE_PATH.findall(text)


def minified_lines(text: str) -> list[str]:
    return [line[:40] for line in text.splitlines() if len(line) > SCRIPT_LINE_MAX]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_package_index(lock: str) -> None:
    assert addresses((ROOT / lock).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_a_hash(lock: str) -> None:
    lines = (ROOT / lock).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    assert lines
    pinned = [line for line in lines if line.strip() and not line.startswith("#")]
    assert [line.split()[0] for line in pinned if "--hash=sha256:" not in line] == []


def test_the_locks_satisfy_pyproject() -> None:
    """Fails where a dependency was changed and `./pulse lock` forgotten."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    runtime = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["embedded"]]
    wanted = {"requirements.lock": runtime, "requirements-dev.lock": [*runtime, *project["dependency-groups"]["dev"]]}
    for lock, requirements in wanted.items():
        locked = pins(lock)
        for requirement in map(Requirement, requirements):
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_development_lock_repeats_every_pin_of_the_runtime_lock() -> None:
    """`./pulse test` in a fresh clone installs the development lock alone and marks both as done."""
    assert pins("requirements.lock").items() <= pins("requirements-dev.lock").items()


def test_no_file_names_a_folder_of_some_machine() -> None:
    assert {path: found for path, text in texts().items() if (found := machine_paths(text))} == {}


def test_no_file_is_large() -> None:
    assert [str(path) for path in files() if path.lstat().st_size > FILE_BYTES_MAX] == []


def test_no_script_or_style_is_minified() -> None:
    web = {path: text for path, text in texts().items() if path.endswith((".js", ".mjs", ".css"))}
    assert {path: found for path, text in web.items() if ".min." in path or (found := minified_lines(text))} == {}


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (addresses, "--index-url https://packages.example/simple\nclick==8.5.1", "click==8.5.1 ; python_version < '4'"),
        (addresses, "click @ https://packages.example/click.whl", "    --hash=sha256:065665c0"),
        (addresses, "-f wheels/", "markdown-it-py==4.3.0"),
        (machine_paths, "see /home/jane/notes.txt", "see /home/user/notes.txt"),
        (machine_paths, "cd /root/pulse", "/srv/root/pulse and docs/root/pulse"),
        (minified_lines, "x" * 1001, "x" * 1000),
    ],
)
def test_each_rule_can_fail(check: Callable[[str], list[str]], bad: str, good: str) -> None:
    assert check(bad) != []
    assert check(good) == []
