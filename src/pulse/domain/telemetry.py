"""What a device may say: the payloads of telemetry and heartbeat, and their bounds.

    {"metrics": {"temp": 21.5, "door": "open", "ok": true}, "ts": "2026-01-02T03:04:05Z", "seq": 17, "site_id": "roof"}

`ts` is RFC 3339 with an offset, or a number: seconds since the epoch below 1e11, milliseconds from there on
(1e11 s is the year 5138, 1e11 ms is March 1973, so no plausible time is read wrongly).
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pulse.domain.envelope import whole_decoder
from pulse.domain.errors import Reason, Refusal
from pulse.domain.json_text import read_json, refuse_repeated_keys
from pulse.domain.subjects import MessageType

Metric = int | float | bool | str
Metrics = dict[str, Metric]

MILLISECONDS_FROM = 100_000_000_000
TS_MAX = 10**15
"""Far outside any bound; keeps a float from becoming infinite on its way to µs."""
_ESCAPED_NUL = rb"\u0000"
"""As no JSON can have it otherwise."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a payload; lengths in characters, times in seconds relative to when the edge received it."""

    metric_count_max: int
    metric_name_length_max: int
    metric_string_length_max: int
    ts_past_s_max: int
    ts_future_s_max: int


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One checked telemetry payload; `ts_us` is the reading's time in µs since the epoch."""

    ts_us: int
    seq: int | None
    site_id: str | None
    metrics: Metrics


class PayloadDecoder:
    """Checks and reads payloads under `bounds`; the same rules at the edge and in the worker."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        name = Annotated[str, Meta(min_length=1, max_length=bounds.metric_name_length_max)]
        text = Annotated[str, Meta(max_length=bounds.metric_string_length_max)]
        integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
        self._metric: Any = integer | float | bool | text
        metrics = Annotated[
            dict[name, integer | float | bool | text],
            Meta(min_length=1, max_length=bounds.metric_count_max),
        ]
        optional: list[tuple[str, Any, Any]] = [
            ("ts", integer | float | Annotated[datetime, Meta(tz=True)] | UnsetType, UNSET),
            ("seq", Annotated[int, Meta(ge=0, le=2**63 - 1)] | UnsetType, UNSET),
        ]
        site: tuple[str, Any, Any] = ("site_id", Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType, UNSET)
        telemetry = msgspec.defstruct(
            "Telemetry", [("metrics", metrics), *optional, site], forbid_unknown_fields=True, gc=False
        )
        heartbeat = msgspec.defstruct("Heartbeat", optional, forbid_unknown_fields=True, gc=False)
        # A bound on each key costs a fifth of the decoding; messages of one kind have the same keys: see `fits`.
        usual = msgspec.defstruct(
            "Telemetry",
            [("metrics", dict[str, integer | float | bool | text]), *optional, site],
            forbid_unknown_fields=True,
            gc=False,
        )
        self.telemetry_shape: Any = usual
        """What `whole` reads a telemetry payload into: `metrics`, and `ts`, `seq` and `site_id` or UNSET."""
        self._telemetry: msgspec.json.Decoder[Any] = msgspec.json.Decoder(telemetry)
        self._heartbeat: msgspec.json.Decoder[Any] = msgspec.json.Decoder(heartbeat)
        self.whole = whole_decoder({MessageType.TELEMETRY: usual, MessageType.HEARTBEAT: heartbeat})
        """Envelope and payload in one pass, without a check of U+0000, `ts`, and the names of the metrics: `fits`."""

    def fits(self, names: Collection[str]) -> bool:
        """Whether these may be the names of a payload's metrics."""
        bounds = self._bounds
        return 0 < len(names) <= bounds.metric_count_max and all(
            0 < len(name) <= bounds.metric_name_length_max for name in names
        )

    def telemetry(self, payload: bytes | msgspec.Raw, *, received_ms: int, unique_keys: bool = False) -> Reading:
        """Read a telemetry payload.

        `unique_keys` also refuses a repeated key, which a decoder would silently resolve to the last one; the edge
        asks for it, a worker need not ask again. Raises Refusal with the path of the value at fault.
        """
        raw = read_json(self._telemetry, payload, culprit=self._culprit)
        seq = None if raw.seq is UNSET else raw.seq
        site_id = None if raw.site_id is UNSET else raw.site_id
        text = bytes(payload)
        if _ESCAPED_NUL in text:
            _refuse_nul(raw.metrics, site_id)
        if unique_keys:
            named = 1 + (raw.ts is not UNSET) + (seq is not None) + (site_id is not None) + len(raw.metrics)
            refuse_repeated_keys(text, named)
        return Reading(self.timestamp_us(raw.ts, received_ms), seq, site_id, raw.metrics)

    def heartbeat(self, payload: bytes | msgspec.Raw, *, received_ms: int, unique_keys: bool = False) -> int:
        """Read a heartbeat payload, `{}` or with `ts` and `seq`; returns its time in µs since the epoch."""
        raw = read_json(self._heartbeat, payload)
        if unique_keys:
            refuse_repeated_keys(bytes(payload), (raw.ts is not UNSET) + (raw.seq is not UNSET))
        return self.timestamp_us(raw.ts, received_ms)

    def _culprit(self, payload: bytes | msgspec.Raw, path: str) -> str:
        """The path of the first metric whose value is refused; only asked once the whole was refused."""
        if path != "metrics[...]":
            return path
        try:
            metrics = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])["metrics"]
            by_name = msgspec.json.decode(metrics, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return "metrics"
        for name, value in by_name.items():
            try:
                msgspec.json.decode(value, type=self._metric)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return f"metrics.{name}"
        return "metrics"

    def timestamp_us(self, ts: int | float | datetime | UnsetType, received_ms: int) -> int:
        """A payload's `ts` in µs since the epoch, the time of receipt where it has none. Raises Refusal."""
        received_us = received_ms * 1000
        if isinstance(ts, UnsetType):
            return received_us
        if isinstance(ts, datetime):
            since = ts - EPOCH
            ts_us = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
        else:
            finite = max(-TS_MAX, min(ts, TS_MAX))
            ts_us = round(finite * (1_000_000 if finite < MILLISECONDS_FROM else 1000))
        past_us, future_us = self._bounds.ts_past_s_max * 1_000_000, self._bounds.ts_future_s_max * 1_000_000
        if not received_us - past_us <= ts_us <= received_us + future_us:
            raise Refusal(
                Reason.TIMESTAMP_OUT_OF_RANGE,
                f"ts is more than {self._bounds.ts_past_s_max} s old or more than "
                f"{self._bounds.ts_future_s_max} s in the future",
                field="ts",
            )
        return ts_us


def _refuse_nul(metrics: Metrics, site_id: str | None) -> None:
    for key, value in metrics.items():
        if "\x00" in key or (type(value) is str and "\x00" in value):
            raise Refusal(Reason.INVALID_PAYLOAD, "U+0000 cannot be stored", field=f"metrics.{key}")
    if site_id is not None and "\x00" in site_id:
        raise Refusal(Reason.INVALID_PAYLOAD, "U+0000 cannot be stored", field="site_id")
