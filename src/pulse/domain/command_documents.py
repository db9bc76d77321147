"""What is said of commands to people and programs: by the control API, and by the command line with `--json`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from pulse.domain.command import Command, Move
from pulse.domain.errors import Reason, Refusal
from pulse.domain.fleet import Fleet
from pulse.domain.identity import ID_PATTERN

CURSOR_PATTERN = f"[0-9]{{1,15}}_{ID_PATTERN}"
"""What a page begins behind: when its neighbour was made, and its id."""

_CURSOR = re.compile(CURSOR_PATTERN)


def document(command: Command) -> dict[str, Any]:
    """The command; `due_at` is when time moves it, `sent_at` when it last left for its device."""
    return {
        "command_id": command.command_id,
        "device_id": command.device_id,
        "fleet_id": command.fleet_id,
        "name": command.name,
        "payload": msgspec.json.decode(command.payload),
        "state": command.state,
        "ordered": command.ordered,
        "held": command.held,
        "created_at": instant(command.created_ms),
        "created_by": command.created_by,
        "expires_at": instant(command.expires_ms),
        "timeout_s": command.timeout_ms / 1000,
        "due_at": None if command.due_ms is None else instant(command.due_ms),
        "sent_at": None if command.sent_ms is None else instant(command.sent_ms),
        "sends": command.sends,
        "result": None if command.result is None else msgspec.json.decode(command.result),
        "error": command.error,
    }


def moves_document(moves: Iterable[Move]) -> list[dict[str, Any]]:
    """Which states a command came into, when, and by whom."""
    return [{"state": move.state, "at": instant(move.at_ms), "who": move.who} for move in moves]


def fleet_document(fleet: Fleet) -> dict[str, Any]:
    """The fleet command; `counts` is how many of its commands are in each state."""
    return {
        "fleet_id": fleet.fleet_id,
        "name": fleet.name,
        "payload": msgspec.json.decode(fleet.payload),
        "filter": msgspec.json.decode(msgspec.json.encode(fleet.filter)),
        "stage": fleet.stage,
        "devices": fleet.devices,
        "counts": dict(fleet.counts),
        "created_at": instant(fleet.created_ms),
        "created_by": fleet.created_by,
        "expires_at": instant(fleet.expires_ms),
        "timeout_s": fleet.timeout_ms / 1000,
    }


def cursor(created_ms: int, identifier: str) -> str:
    """What the page behind this one begins behind."""
    return f"{created_ms}_{identifier}"


def read_cursor(text: str | None) -> tuple[int, str] | None:
    """The other way round. Raises Refusal where the text is no such thing."""
    if text is None:
        return None
    if not _CURSOR.fullmatch(text):
        raise Refusal(Reason.INVALID_REQUEST, "must be as the page before told it", field="before")
    created_ms, _, identifier = text.partition("_")
    return int(created_ms), identifier


def instant(at_ms: int) -> datetime:
    """A moment that is kept in ms since the epoch."""
    return datetime.fromtimestamp(at_ms / 1000, UTC)
