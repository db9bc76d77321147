"""What was refused, in the log: at most one line a second, however much it is."""

from __future__ import annotations

import asyncio

import structlog

log = structlog.get_logger()

GATHER_S = 1.0


class RefusalLog:
    """Gathers refusals for GATHER_S from the first one on; one event loop."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._example: tuple[str, str] = ("", "")

    def note(self, reason: str, error: str, topic: bytes) -> None:
        """A message on `topic` was refused for `reason` (of a bounded set)."""
        if not self._counts:
            self._example = (error, topic[:256].decode("utf-8", "backslashreplace"))
            asyncio.get_running_loop().call_later(GATHER_S, self._write)
        name = str(reason)
        self._counts[name] = self._counts.get(name, 0) + 1

    def _write(self) -> None:
        error, topic = self._example
        log.warning("messages were refused", counts=self._counts, first_error=error, first_topic=topic)
        self._counts = {}
