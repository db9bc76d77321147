"""`./pulse` as a newcomer meets it: real processes, a real pip, and whatever state .venv may be in.

Two tests install everything, as the README promises. The others use a small checkout, the same bootstrap over a lock of
one package, because what they are about is .venv and not its contents.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import repository
from pulse import __version__

ORDINARY_USER = 65534
PYTHON_OF_THIS_RUN = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
RUN_S_MAX = 200
INSTALLING = "installing requirements.lock into .venv"
RUN_AS_SCRIPT = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
WAITING = "another ./pulse is making .venv; waiting for it"
NO_NETWORK = "Retrying (Retry("

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run ./pulse as another user")


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A folder with a bootstrap in it, and how to run it: as whom, with which Python first on PATH."""

    folder: Path
    user: int | None = None
    python: Path = PYTHON_OF_THIS_RUN
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What the machine says about its package index, and nothing of the .venv that runs these tests."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("PIP_") or name.lower().endswith("_proxy") or name in ("HOME", "LANG", "SSL_CERT_FILE")
        }
        python3 = self.folder.parent / str(self.python).replace("/", "-") / "python3"
        if not python3.is_symlink():
            python3.parent.mkdir()
            python3.symlink_to(self.python)
        path = {"PATH": f"{python3.parent}:/usr/bin:/bin"}
        home = {"HOME": str(self.folder.parent)} if self.user else {}
        return {**inherited, **path, **home, **self.extra}

    def start(self, *arguments: str, command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*(command or (str(self.folder / "pulse"),)), *arguments],
            env=self.environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
        )

    def run(self, *arguments: str, command: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, command=command)
        out, err = process.communicate(timeout=RUN_S_MAX)
        if NO_NETWORK in err and "PIP_INDEX_URL" not in self.extra:
            pytest.skip("no package index can be reached")
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def make(self) -> None:
        done = self.run("--version")
        assert done.returncode == 0, done.stderr

    def own(self, user: int) -> None:
        """Give the checkout, and the folder that it is in, to `user`."""
        for path in (self.folder.parent, self.folder, *self.folder.rglob("*")):
            os.chown(path, user, user, follow_symlinks=False)


def block(name: str) -> str:
    """The lines of one pin of the real lock."""
    text = (repository.ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = re.search(rf"^{name}==.*\n(?:    --hash.*\n)+", text, re.MULTILINE)
    assert found
    return found.group()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own; its name has a space."""
    with tempfile.TemporaryDirectory(prefix="pulse test ") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def small(place: Path) -> Checkout:
    """One package to install, and a stand-in for each program that the bootstrap hands over to."""
    folder = place / "check out"
    (folder / "src" / "pulse").mkdir(parents=True)
    shutil.copy2(repository.ROOT / "pulse", folder / "pulse")
    (folder / "requirements.lock").write_text(block("idna"))
    (folder / "requirements-dev.lock").write_text(block("idna") + block("h11"))
    (folder / "src" / "pulse" / "__main__.py").write_text(
        "import sys, idna; print('pulse', *sys.argv[1:]); sys.exit('fail' in sys.argv)"
    )
    for tool in ("pytest", "ruff", "mypy"):
        (folder / "src" / f"{tool}.py").write_text(
            f"import os, sys, h11; print('{tool}', *sys.argv[1:], flush=True)\n"
            f"sys.exit(os.environ.get('FAIL') == '{tool}')"
        )
    return Checkout(folder=folder)


def interpreter_for_anyone() -> Path:
    """A Python that an ordinary user may run and that can install; this run's own may lie in root's home."""
    question = (
        "import sys; from importlib.util import find_spec\n"
        "sys.exit(sys.version_info < (3, 11) or not (find_spec('pip') or find_spec('ensurepip')))"
    )
    for folder in ("/usr/bin", "/usr/local/bin", str(PYTHON_OF_THIS_RUN.parent)):
        candidate = Path(folder) / "python3"
        try:
            asked = subprocess.run(
                [candidate, "-c", question],
                user=ORDINARY_USER,
                group=ORDINARY_USER,
                extra_groups=[],
                cwd="/",
                check=False,
            )
        except OSError:
            continue
        if asked.returncode == 0:
            return candidate
    pytest.skip("no Python 3.11 with pip that an ordinary user may run")


@pytest.mark.timeout(400)
def test_a_fresh_clone_installs_itself_then_starts_without_pip(place: Path) -> None:
    checkout = Checkout(folder=place / "pulse")
    repository.copy(checkout.folder)
    first = checkout.run("--version")
    assert (first.returncode, INSTALLING in first.stderr) == (0, True), first.stderr
    assert __version__ in first.stdout
    second = replace(checkout, extra={"PIP_NO_INDEX": "1"}).run("--version")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")


@needs_root
@pytest.mark.timeout(400)
def test_a_fresh_clone_of_an_ordinary_user_installs_itself(place: Path) -> None:
    checkout = Checkout(folder=place / "pulse", user=ORDINARY_USER, python=interpreter_for_anyone())
    repository.copy(checkout.folder)
    checkout.own(ORDINARY_USER)
    done = checkout.run("--version")
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout
    assert {path.lstat().st_uid for path in (checkout.folder / ".venv").rglob("*")} == {ORDINARY_USER}


def test_a_venv_that_cannot_serve_is_made_again(small: Checkout) -> None:
    small.make()
    venv = small.folder / ".venv"
    stamp = venv / "requirements.stamp"

    def replace_python(target: str) -> None:
        (venv / "bin" / "python3").unlink(missing_ok=True)
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").symlink_to(target)

    def made_by_another_tool() -> None:
        shutil.rmtree(venv)
        subprocess.run([PYTHON_OF_THIS_RUN, "-m", "venv", "--without-pip", venv], check=True, timeout=RUN_S_MAX)

    def half_made() -> None:
        stamp.unlink()
        shutil.rmtree(next(venv.glob("lib/python*/site-packages")))

    states: dict[str, Callable[[], object]] = {
        "deleted": lambda: shutil.rmtree(venv),
        "made by another tool": made_by_another_tool,
        "half-made": half_made,
        "its Python removed": lambda: replace_python("/nowhere/python3.11"),
        "its Python another one now": lambda: replace_python("/bin/true"),
        "made in another folder": lambda: stamp.write_bytes(stamp.read_bytes().replace(b"check out", b"elsewhere")),
        "its lock changed": lambda: (small.folder / "requirements.lock").write_text(block("idna") + block("attrs")),
    }
    for state, spoil in states.items():
        spoil()
        done = small.run("hello")
        assert (done.returncode, done.stdout) == (0, "pulse hello\n"), f"{state}: {done.stderr}"
        assert INSTALLING in done.stderr, state
    assert list(venv.glob("lib/python*/site-packages/attrs"))


@pytest.fixture
def silent_index() -> Iterator[socket.socket]:
    """A package index that takes the call and never answers: pip hangs in it for as long as a test likes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(RUN_S_MAX)
        yield server


def at(index: socket.socket) -> dict[str, str]:
    """The environment in which pip asks `index` and nobody else."""
    url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
    return {"PIP_INDEX_URL": url, "PIP_RETRIES": "0", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


@pytest.mark.parametrize(("end", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_bootstrap_takes_its_pip_with_it_and_the_next_one_starts_over(
    small: Checkout, silent_index: socket.socket, end: signal.Signals, status: int
) -> None:
    process = replace(small, extra=at(silent_index)).start("--version")
    with silent_index.accept()[0]:
        process.send_signal(end)
        _, err = process.communicate(timeout=RUN_S_MAX)
        assert process.returncode == status
        assert err.splitlines() == [f"pulse: {INSTALLING}", "pulse: stopped"]
        with (small.folder / ".venv" / "pulse.guard").open() as guard:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done = small.run("--version")
    assert (done.returncode, INSTALLING in done.stderr) == (0, True), done.stderr


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_the_start_is_heeded(small: Checkout, end: signal.Signals) -> None:
    """Sent as soon as it says that it installs: before, while or after pip is started."""
    process = small.start("--version")
    assert process.stderr
    assert INSTALLING in process.stderr.readline()
    process.send_signal(end)
    process.communicate(timeout=RUN_S_MAX)
    assert process.returncode in (-end, 128 + end)
    done = small.run("--version")
    assert (done.returncode, INSTALLING in done.stderr) == (0, True), done.stderr


def test_the_pip_of_a_killed_bootstrap_is_waited_for(small: Checkout, silent_index: socket.socket) -> None:
    first = replace(small, extra=at(silent_index)).start("--version")
    with silent_index.accept()[0]:
        first.kill()
        assert first.wait(RUN_S_MAX) == -signal.SIGKILL
        second = small.start("--version")
        assert second.stderr
        assert WAITING in second.stderr.readline()
    _, err = second.communicate(timeout=RUN_S_MAX)
    first.communicate(timeout=RUN_S_MAX)
    assert (second.returncode, INSTALLING in err) == (0, True), err


def test_of_two_at_once_one_installs_and_the_other_waits(small: Checkout) -> None:
    both = [small.start("--version"), small.start("--version")]
    said = [process.communicate(timeout=RUN_S_MAX)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "".join(said).count(INSTALLING) == 1, said


def test_without_network_it_shows_what_pip_said_and_what_to_do(small: Checkout) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        done = replace(small, extra=at(nobody)).run("--version")
    assert done.returncode == 1
    assert "No matching distribution found for idna" in done.stderr
    assert "pip could not install requirements.lock" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda lock: re.sub(r"sha256:\w{8}", "sha256:00000000", lock), "DO NOT MATCH THE HASHES"),
        (lambda lock: lock.split()[0], "Hashes are required"),
    ],
)
def test_a_package_with_another_hash_or_none_is_refused(
    small: Checkout, spoil: Callable[[str], str], said: str
) -> None:
    (small.folder / "requirements.lock").write_text(spoil(block("idna")))
    done = small.run("--version")
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr


def test_without_a_pip_of_its_own_the_python_uses_ensurepip(small: Checkout) -> None:
    """-S hides site-packages, and with them pip."""
    command = (str(PYTHON_OF_THIS_RUN), "-S", str(small.folder / "pulse"))
    asked = subprocess.run([PYTHON_OF_THIS_RUN, "-c", "import ensurepip"], capture_output=True, check=False)
    if asked.returncode:
        pytest.skip("this Python has no ensurepip")
    done = small.run("--version", command=command)
    assert done.returncode == 0, done.stderr


def test_with_neither_pip_nor_ensurepip_it_says_what_to_install(small: Checkout) -> None:
    hidden = f"import sys; sys.modules['ensurepip'] = None\n{RUN_AS_SCRIPT}"
    done = small.run("--version", command=(str(PYTHON_OF_THIS_RUN), "-S", "-c", hidden, str(small.folder / "pulse")))
    assert done.returncode == 1
    assert "apt install python3-pip" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("newer", [True, False])
def test_an_old_python_hands_over_to_a_newer_one_or_says_what_is_needed(small: Checkout, newer: bool) -> None:
    old = f"import sys; sys.version_info = (3, 9, 2)\n{RUN_AS_SCRIPT}"
    programs = small.folder.parent / "programs"
    programs.mkdir()
    shim = programs / "python3.13"  # of a version manager, for a version that is not there
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    if newer:
        (programs / "python3.12").write_text(f'#!/bin/sh\nexec "{PYTHON_OF_THIS_RUN}" "$@"\n')
        (programs / "python3.12").chmod(0o755)
    checkout = replace(small, extra={"PATH": str(programs)})
    done = checkout.run("hello", command=(str(PYTHON_OF_THIS_RUN), "-c", old, str(small.folder / "pulse")))
    if newer:
        assert (done.returncode, done.stdout) == (0, "pulse hello\n"), done.stderr
    else:
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "needs Python 3.11 or later; python3 is 3.9.2" in done.stderr


def test_it_passes_on_arguments_exit_code_and_working_directory_and_obeys_a_link(small: Checkout) -> None:
    link = small.folder.parent / "a link"
    link.symlink_to(small.folder / "pulse")
    (small.folder / "src" / "pulse" / "__main__.py").write_text(
        "import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit(7)"
    )
    done = small.run("device", "add", "--name", "a b", command=(str(link),))
    assert (done.returncode, done.stdout) == (7, "/ ['device', 'add', '--name', 'a b']\n")


def test_web_libraries_that_cannot_be_fetched_stop_no_start_and_are_asked_for_again_by_web_alone(
    small: Checkout,
) -> None:
    small.make()
    (small.folder / "web.lock").write_text(block("idna"))
    offline = replace(small, extra={"PIP_NO_INDEX": "1"})
    first = offline.run("hello")
    assert (first.returncode, first.stdout) == (0, "pulse hello\n"), first.stderr
    assert "web.lock could not be fetched" in first.stderr
    second = offline.run("hello")
    assert (second.returncode, second.stdout, second.stderr) == (0, "pulse hello\n", "")
    assert offline.run("web").returncode == 1
    libraries = small.folder / ".venv" / "share" / "pulse" / "web"
    assert not (libraries / "idna").exists()
    fetched = small.run("web")
    assert fetched.returncode == 0, fetched.stderr
    assert (libraries / "idna" / "core.py").is_file()
    assert small.run("hello").stderr == ""


def test_development_commands_install_on_top_and_hand_over(small: Checkout) -> None:
    small.make()
    made = (small.folder / ".venv" / "pyvenv.cfg").stat().st_mtime_ns
    done = small.run("test", "-k", "one thing")
    assert (done.returncode, done.stdout) == (0, "pytest -k one thing\n"), done.stderr
    assert "installing requirements-dev.lock into .venv" in done.stderr
    assert (small.folder / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made
    check = small.run("check")
    steps = ["ruff check .", "ruff format --check .", "mypy", "pytest -n 4 --dist worksteal"]
    assert check.stdout.splitlines() == steps
    failed = replace(small, extra={"FAIL": "mypy"}).run("check")
    assert (failed.returncode, "pytest" in failed.stdout) == (1, False)
    assert failed.stderr.splitlines()[-1] == "pulse: failed: mypy; the tests did not run"
    helped = small.run("--help")
    assert re.search(r"^pulse --help$.*^  test .*^  check ", helped.stdout, re.MULTILINE | re.DOTALL)


def test_tests_in_a_fresh_clone_need_one_installation(small: Checkout) -> None:
    done = small.run("test")
    assert done.stderr.splitlines() == ["pulse: installing requirements-dev.lock into .venv"]
    assert small.run("hello").stderr == ""


@needs_root
def test_a_checkout_that_may_not_be_written_is_named_with_its_owner(small: Checkout) -> None:
    python = interpreter_for_anyone()
    ordinary = replace(small, user=ORDINARY_USER, python=python)
    foreign = ordinary.run("--version")
    assert foreign.returncode == 1
    assert f"{small.folder} belongs to root" in foreign.stderr
    (small.folder / ".venv").mkdir()
    half_made = ordinary.run("--version")
    assert half_made.returncode == 1
    assert f"{small.folder / '.venv'} belongs to root" in half_made.stderr
    assert len(foreign.stderr.splitlines()) == len(half_made.stderr.splitlines()) == 1


@needs_root
def test_a_venv_of_another_user_is_used_as_long_as_it_serves(small: Checkout) -> None:
    python = interpreter_for_anyone()
    replace(small, python=python).make()
    done = replace(small, user=ORDINARY_USER, python=python).run("hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, "pulse hello\n", "")


def test_a_checkout_of_ones_own_that_is_write_protected_is_said_to_be(small: Checkout) -> None:
    checkout = small
    if os.geteuid() == 0:
        small.own(ORDINARY_USER)
        checkout = replace(small, user=ORDINARY_USER, python=interpreter_for_anyone())
    small.folder.chmod(0o555)
    try:
        done = checkout.run("--version")
    finally:
        small.folder.chmod(0o755)
    assert done.returncode == 1
    assert f"make {small.folder} writable" in done.stderr
    assert len(done.stderr.splitlines()) == 1
