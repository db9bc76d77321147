"""Following what has begun until it has ended: an outage is waited out, and being cut off ends nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from pulse.cli import command_following
from pulse.cli.command_following import until
from pulse.domain.errors import Outage, Reason, Refusal

Seen = int | BaseException


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_following, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(command_following, "RETRY_S", 0)


async def follow(*all_seen: Seen) -> int:
    """Until 9 is seen."""
    seen: Iterator[Seen] = iter(all_seen)

    async def look() -> int:
        one = next(seen)
        if isinstance(one, BaseException):
            raise one
        return one

    return await until(look, lambda one: one == 9, again="pulse command watch acme c")


async def test_an_outage_is_told_once_and_waited_out(capsys: pytest.CaptureFixture[str]) -> None:
    away = Outage("postgresql", "PostgreSQL is away: connection refused")
    assert await follow(1, away, away, 2, away, 9) == 9
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("PostgreSQL is away") for line in said] == [True, False, True, False]
    assert said[1] == said[3] == "PostgreSQL is back"


async def test_what_is_refused_ends_it() -> None:
    with pytest.raises(Refusal):
        await follow(1, Refusal(Reason.NOT_FOUND, "there is no such command"), 9)


async def test_being_cut_off_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await follow(1, asyncio.CancelledError())
    assert capsys.readouterr().err == "it goes on; `pulse command watch acme c` follows it further\n"
