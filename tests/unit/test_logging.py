"""Logging: one pipeline for every line, no secret in any, and floods bounded."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
import structlog

from pulse.runtime.logging import LIMITED_KEYS_MAX, TEXT_LENGTH_MAX, RateLimit, configure_logging
from pulse.runtime.masking import MASK

SECRET = "s3cr3t-Zx81"
LIBRARIES = ("", "uvicorn.error", "asyncio", "nats", "asyncpg", "py.warnings")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in LIBRARIES}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def configured(
    stream: io.StringIO | None = None,
    *,
    level: Literal["debug", "info", "warning", "error"] = "info",
    log_format: Literal["auto", "console", "json"] = "auto",
) -> io.StringIO:
    stream = stream or io.StringIO()
    configure_logging(level=level, log_format=log_format, role="ingest", stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_role_level_and_utc_time_where_nobody_watches() -> None:
    stream = configured()
    structlog.get_logger().info("batch stored", messages=3)
    (line,) = lines(stream)
    assert datetime.fromisoformat(line.pop("timestamp")).tzinfo == UTC
    assert line == {"event": "batch stored", "messages": 3, "level": "info", "role": "ingest"}


def test_a_line_is_for_people_on_a_terminal() -> None:
    stream = configured(Terminal())
    structlog.get_logger().info("batch stored", messages=3)
    assert "batch stored" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


@pytest.mark.parametrize(("log_format", "is_json"), [("json", True), ("console", False)])
def test_the_format_can_be_said(log_format: Literal["console", "json"], is_json: bool) -> None:
    stream = configured(Terminal() if is_json else io.StringIO(), log_format=log_format)
    structlog.get_logger().info("batch stored")
    assert stream.getvalue().startswith("{") is is_json


def test_lines_below_the_level_are_not_written() -> None:
    stream = configured(level="warning")
    structlog.get_logger().info("not this")
    logging.getLogger("asyncpg").info("nor this")
    structlog.get_logger().warning("this")
    assert [line["event"] for line in lines(stream)] == ["this"]


def test_the_libraries_write_through_the_same_pipeline() -> None:
    stream = configured()
    logging.getLogger("asyncpg").info("connected to %s", f"postgresql://u:{SECRET}@h/d")
    logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=KeyError("bug"))
    connected, failed = lines(stream)
    assert connected["event"] == f"connected to postgresql://u:{MASK}@h/d"
    assert (connected["level"], connected["logger"], connected["role"]) == ("info", "asyncpg", "ingest")
    assert (failed["event"], failed["level"]) == ("Exception in ASGI application", "error")
    assert "KeyError: 'bug'" in failed["exception"]
    assert datetime.fromisoformat(failed["timestamp"]).tzinfo == UTC


class Opaque:
    def __repr__(self) -> str:
        return f"Opaque(password='{SECRET}')"


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize(
    "facts",
    [
        {"token": SECRET},
        {"device_token": SECRET.encode()},
        {"headers": {"Authorization": f"Bearer {SECRET}", "nested": {"password": SECRET}}},
        {"headers": [(b"x-provision-token", SECRET.encode())]},
        {"url": f"nats://u:{SECRET}@h"},
        {"urls": [f"nats://{SECRET}@h"]},
        {"error": ValueError(f"cannot reach postgresql://u:{SECRET}@h/d")},
        {"value": Opaque()},
        {"deep": {"a": {"b": {"c": {"d": {"token": SECRET}}}}}},
    ],
    ids=repr,
)
def test_no_line_shows_a_secret(facts: dict[str, Any], log_format: Literal["console", "json"]) -> None:
    stream = configured(log_format=log_format)
    structlog.get_logger().info("refused", **facts)
    assert SECRET not in stream.getvalue()
    assert MASK in stream.getvalue()


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_trace_shows_neither_secrets_nor_local_variables(log_format: Literal["console", "json"]) -> None:
    stream = configured(Terminal(), log_format=log_format)
    token = SECRET
    try:
        raise ValueError(f"cannot reach nats://{token}@h")
    except ValueError:
        structlog.get_logger().exception("lost the server")
    assert SECRET not in stream.getvalue()
    assert f"ValueError: cannot reach nats://{MASK}@h" in stream.getvalue()


def test_a_device_cannot_write_to_the_operators_terminal() -> None:
    stream = configured(log_format="console")
    sent = "a\x1b[2Jb\nfake line\x9b1m\x00"
    structlog.get_logger().warning("refused", name=sent)
    logging.getLogger("asyncpg").warning("refused %s", sent)
    assert stream.getvalue().count("\n") == 2
    structlog.get_logger().warning("refused", exc_info=ValueError(sent))
    assert not {"\x1b", "\x9b", "\x00"} & set(stream.getvalue())


def test_a_long_value_is_cut() -> None:
    stream = configured()
    structlog.get_logger().info("odd", value="x" * (TEXT_LENGTH_MAX * 2))
    assert len(lines(stream)[0]["value"]) == TEXT_LENGTH_MAX


def test_a_full_disk_costs_the_line_and_not_the_service() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    configured(Full())
    structlog.get_logger().info("batch stored")
    logging.getLogger("asyncpg").info("connected")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told_by(limit: RateLimit, **facts: object) -> dict[str, Any] | None:
    try:
        return dict(limit(None, "warning", {"event": "refused", **facts}))
    except structlog.DropEvent:
        return None


def test_a_flood_is_one_line_and_the_count_of_the_rest() -> None:
    clock = Clock()
    limit = RateLimit(clock=clock)
    assert told_by(limit, every_s=5.0, size=1) == {"event": "refused", "size": 1}
    assert [told_by(limit, every_s=5.0, size=2) for _ in range(41)] == [None] * 41
    clock.now = 5.0
    assert told_by(limit, every_s=5.0, size=3) == {"event": "refused", "size": 3, "suppressed": 41}
    clock.now = 10.0
    assert told_by(limit, every_s=5.0, size=4) == {"event": "refused", "size": 4}


def test_each_key_has_a_limit_of_its_own() -> None:
    limit = RateLimit(clock=Clock())
    assert [told_by(limit, every_s=5.0, every_key=key) is not None for key in ("a", "b", "a", "b")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_line_without_a_limit_is_always_written() -> None:
    limit = RateLimit(clock=Clock())
    assert [told_by(limit) for _ in range(3)] == [{"event": "refused"}] * 3


def test_the_limit_remembers_a_bounded_number_of_keys() -> None:
    limit = RateLimit(clock=Clock())
    for key in range(LIMITED_KEYS_MAX * 2):
        assert told_by(limit, every_s=5.0, every_key=key) is not None
    assert len(limit._written) == LIMITED_KEYS_MAX


def test_a_flood_from_a_library_is_limited_by_its_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pulse.runtime.logging.RateLimit.__init__", limit_with(clock))
    stream = configured()
    for port in range(100):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received from %d", port)
    clock.now = 1.0
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received from %d", 100)
    first, second = lines(stream)
    assert "suppressed" not in first
    assert second["suppressed"] == 99


def limit_with(clock: Clock) -> Callable[[RateLimit], None]:
    original = RateLimit.__init__

    def init(self: RateLimit) -> None:
        original(self, clock=clock)

    return init
