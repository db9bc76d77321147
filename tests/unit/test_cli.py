"""The command line in process: what is registered, what help costs, and how an error ends."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click
import pytest

from pulse import cli
from pulse.cli import _hoisted
from pulse.cli.context import Context, as_async
from pulse.domain.errors import CheckFailed, ConfigurationError, Outage, PulseError
from pulse.runtime.settings import Settings

SECRET = "s3cr3t-Zx81"


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pulse", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def register(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `pulse broken` raise `error`."""

    @click.command("broken")
    def broken() -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "broken", broken, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "broken", (f"{__name__}:broken", ""))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_in_the_table_exists_and_has_help(name: str) -> None:
    module, _, attribute = cli.COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help
    assert cli.COMMANDS[name][1].endswith(".")


def test_a_command_misspelt_is_answered_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "strems") == 2
    assert "Did you mean 'streams'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("the port is taken", hint="change it"), 2),
        (Outage("nats", "nats is away"), 1),
        (CheckFailed("two messages are missing"), 1),
    ],
)
def test_an_error_of_ours_is_one_line_and_an_exit_code(
    error: PulseError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, error)
    assert run(monkeypatch, "broken") == code
    assert capsys.readouterr().err == f"pulse: {error}\n"


def test_an_error_stays_one_line_without_secrets_whatever_is_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, Outage("nats", f"cannot reach nats://u:{SECRET}@h:\nrefused", hint=f"token={SECRET}"))
    assert run(monkeypatch, "broken") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert SECRET not in error


def test_a_bug_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, KeyError("bug"))
    monkeypatch.setattr(sys, "argv", ["pulse", "broken"])
    with pytest.raises(KeyError):
        cli.main()


def test_a_connection_that_broke_is_not_taken_for_a_reader_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where stdout itself is what broke may BrokenPipeError end in exit code 0."""
    register(monkeypatch, BrokenPipeError())
    monkeypatch.setattr(sys, "argv", ["pulse", "broken"])
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with pytest.raises(BrokenPipeError):
        cli.main()


@pytest.mark.parametrize(
    "arguments", [["--set", "gateway_port"], ["nosuch"], ["settings", "--nosuch"], ["settings", "extra"]]
)
def test_a_wrong_call_is_exit_code_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", f"postgresql://u:{SECRET}@h"],
        ["settings", f"nats://{SECRET}@h"],
        ["--set", f"token={SECRET}", "settings"],
    ],
)
def test_a_wrong_call_does_not_repeat_a_secret(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_the_flags_of_a_command_cover_those_before_it() -> None:
    given: list[dict[str, object]] = []

    def load(flags: dict[str, object], _with_instance: bool) -> tuple[Settings, dict[str, str]]:
        given.append(flags)
        return Settings(), {}

    assert Context(load=load).settings(gateway_port=1, health_port=None) == Settings()
    assert given == [{"gateway_port": 1, "health_port": None}]


def test_an_async_command_runs_in_a_loop_of_its_own_and_returns_its_result() -> None:
    async def double(number: int) -> int:
        return number * 2

    assert as_async(double)(21) == 42


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        (["up", "--set", "a=1", "--gateway-port", "9"], ["--set", "a=1", "up", "--gateway-port", "9"]),
        (["--set", "a=1", "up", "--set=b=2"], ["--set", "a=1", "--set=b=2", "up"]),
        (["audit", "--data-dir", "x", "--json"], ["--data-dir", "x", "audit", "--json"]),
        (["tail", "--", "--set", "a=1"], ["tail", "--", "--set", "a=1"]),
        (["up", "--set"], ["--set", "up"]),
    ],
)
def test_what_holds_for_every_command_may_stand_behind_it(written: list[str], understood: list[str]) -> None:
    assert _hoisted(written) == understood
