"""One pipeline for every log line, ours and the libraries': limited, masked, timed, for people or as JSON.

    ours (structlog) ──────────────────────────┐
                                               ├─► limit rate ─► level, UTC time, role ─► trace ─► mask ─► render
    uvicorn, nats, asyncio, asyncpg (logging) ─┘

A line that can come in a flood says so where it is logged, without importing this module:

    log.warning("publish refused", every_s=5.0, every_key=stream, stream=stream)

is written at most once per 5 s and `every_key` (the event alone, where there is none); the next one that is written
carries `suppressed`, the number that were not.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from enum import StrEnum
from typing import Any, Literal, TextIO, cast

import structlog

from pulse.runtime.masking import MASK, is_secret_name, mask_text

FOREIGN_EVERY_S = 1.0
"""A library's warning of one wording is written at most this often."""
LIMITED_KEYS_MAX = 1000
MASK_DEPTH_MAX = 4
TEXT_LENGTH_MAX = 32 * 1024
"""Of one value in a line, traces included; the rest is cut off."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

EventDict = MutableMapping[str, Any]


def configure_logging(
    *,
    level: Literal["debug", "info", "warning", "error"],
    log_format: Literal["auto", "console", "json"],
    role: str = "",
    stream: TextIO | None = None,
) -> None:
    """Send every log line of this process to `stream` (stderr), as `log_format` says; `auto` is console on a terminal.

    To be called once, before the first line; `role` stands in each one. Calling it again replaces what was set.
    """
    stream = stream or sys.stderr
    on_console = log_format == "console" or (log_format == "auto" and stream.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _Role(role),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        mask_secrets,
    ]
    rendering: list[structlog.typing.Processor] = (
        [
            _escape_control,
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(),
                sort_keys=False,
                pad_event_to=0,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
        if on_console
        else [structlog.processors.JSONRenderer()]
    )
    lines = cast("TextIO", _Lines(stream))
    structlog.configure(
        processors=[RateLimit(), *common, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(lines),
        cache_logger_on_first_use=False,
    )
    _route_foreign(lines, threshold, common, rendering)


def _route_foreign(
    lines: TextIO,
    threshold: int,
    common: list[structlog.typing.Processor],
    rendering: list[structlog.typing.Processor],
) -> None:
    handler = logging.StreamHandler(lines)
    handler.addFilter(_ForeignLimit())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, _from_record, *common],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    for replaced in root.handlers[:]:
        root.removeHandler(replaced)
    root.addHandler(handler)
    root.setLevel(threshold)
    logging.captureWarnings(capture=True)
    for chatty in ("uvicorn.error", "asyncio", "nats"):
        logging.getLogger(chatty).setLevel(max(threshold, logging.WARNING))


class _Lines:
    """Where lines go: a full disk or a reader that left costs the line, never the service that logs it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class RateLimit:
    """A processor that drops a line with `every_s` where one of its `every_key` was written less long ago."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._written: dict[Hashable, tuple[float, int]] = {}

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        every_s = event.pop("every_s", None)
        key = event.pop("every_key", None)
        if every_s is None:
            return event
        suppressed = self.admit((event.get("event"), key), every_s)
        if suppressed is None:
            raise structlog.DropEvent
        if suppressed:
            event["suppressed"] = suppressed
        return event

    def admit(self, key: Hashable, every_s: float) -> int | None:
        """None where the line must not be written; else how many were not since the last one.

        Remembers LIMITED_KEYS_MAX keys; with more than that the oldest one starts afresh.
        """
        now = self._clock()
        written_at, suppressed = self._written.pop(key, (-float("inf"), 0))
        if now - written_at < every_s:
            self._written[key] = (written_at, suppressed + 1)
            return None
        if len(self._written) >= LIMITED_KEYS_MAX:
            del self._written[next(iter(self._written))]
        self._written[key] = (now, 0)
        return suppressed


class _ForeignLimit(logging.Filter):
    """The libraries' warnings, limited by wording: one bad client must not fill the disk with them."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RateLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        suppressed = self._limit.admit((record.name, str(record.msg)), FOREIGN_EVERY_S)
        record.suppressed = suppressed
        return suppressed is not None


def _from_record(_logger: object, _method: str, event: EventDict) -> EventDict:
    suppressed = getattr(event["_record"], "suppressed", 0)
    if suppressed:
        event["suppressed"] = suppressed
    event["event"] = str(event["event"]).rstrip()
    return event


class _Role:
    """Adds the role of this process to each line."""

    def __init__(self, role: str) -> None:
        self._role = role

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        if self._role:
            event.setdefault("role", self._role)
        return event


def mask_secrets(_logger: object, _method: str, event: EventDict) -> EventDict:
    """A processor that masks values under secret names, and passwords inside texts, traces included."""
    for name, value in event.items():
        if name not in {"level", "timestamp", "_record", "_from_structlog"}:
            event[name] = _masked(name, value, MASK_DEPTH_MAX)
    return event


def _masked(name: str, value: object, depth: int) -> object:
    if is_secret_name(name) and value is not None:
        return MASK
    match value:
        case bool() | int() | float() | None:
            return value
        case Mapping() if depth:
            return {str(key): _masked(str(key), inner, depth - 1) for key, inner in value.items()}
        case [str() | bytes() as header, _] if is_secret_name(str(header)):
            return [str(header), MASK]
        case list() | tuple() | set() | frozenset() if depth:
            return [_masked("", inner, depth - 1) for inner in value]
    text = value if isinstance(value, str) else f"{value}" if isinstance(value, StrEnum) else repr(value)
    return mask_text(text[:TEXT_LENGTH_MAX])


def _escape_control(_logger: object, _method: str, event: EventDict) -> EventDict:
    """A processor that keeps what a device sent from writing to the operator's terminal."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            keeps_lines = name in {"exception", "stack"}
            escaped = _CONTROL.sub(lambda found: repr(found.group())[1:-1], value)
            event[name] = escaped if keeps_lines else escaped.replace("\n", "\\n")
    return event
