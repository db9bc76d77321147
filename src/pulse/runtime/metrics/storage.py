"""What retention and rollups count."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from pulse.runtime.metrics.table import counter, gauge

SERIES = ("telemetry", "telemetry_minutes", "telemetry_hours", "dead_letters")


class RetentionMetrics:
    """Counts what was dropped after its time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rows = counter(registry, "pulse_retention_dropped_rows_total")
        self._bytes = counter(registry, "pulse_retention_dropped_bytes_total")
        for series in SERIES:
            self.dropped(series, 0, 0)

    def dropped(self, series: str, rows: int, size_bytes: int) -> None:
        """That much of `series` (of a bounded set) is gone."""
        self._rows.labels(series).inc(rows)
        self._bytes.labels(series).inc(size_bytes)


class RollupMetrics:
    """Counts what was added to the rollups, and what waits for it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._messages = counter(registry, "pulse_rollup_messages_total")
        self._pending = gauge(registry, "pulse_rollup_pending")

    def added(self, messages: int) -> None:
        """The rows of that many settled messages were added."""
        self._messages.inc(messages)

    def pending(self, batches: int) -> None:
        """That many settled batches are not in the rollups yet."""
        self._pending.set(batches)
