"""`pulse up`: the whole of Pulse on one machine, with nats-server and PostgreSQL as children.

    stage 1   nats-server, PostgreSQL              then topology and migrations, from here
    stage 2   ingest; shadow with commands; maintenance with rescue      a process each
    stage 3   gateway, bridge, ui                  last in, first out: nothing is accepted that nobody would store

Each is restarted when it dies; all end with this process, however it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console

from pulse.adapters.embedded.data_folder import DataFolder
from pulse.adapters.embedded.nats_server import MqttListener, NatsServer
from pulse.adapters.embedded.ports import NeededPort, check_ports
from pulse.adapters.embedded.postgres_server import PostgresServer
from pulse.adapters.embedded.process import ManagedProcess
from pulse.adapters.embedded.supervisor import Supervisor
from pulse.adapters.nats.nkeys import AccountKey
from pulse.cli.account import sign_in_link
from pulse.cli.context import Context
from pulse.cli.demo import DEMO_DEVICE, DEMO_TENANT, prepare
from pulse.cli.key import OPERATOR_KEY_FILE, operator_key
from pulse.runtime.layers import ENVIRONMENT_BY_OWN_NAME, ENVIRONMENT_PREFIX
from pulse.runtime.logging import configure_logging
from pulse.runtime.roles import Role
from pulse.runtime.settings import Settings

STOP_S_MAX = 4.8
"""Everything ends within five seconds of Ctrl-C."""
PROBE_TIMEOUT_S = 1.0

PROCESSES = {
    Role.GATEWAY: (Role.GATEWAY,),
    Role.INGEST: (Role.INGEST,),
    Role.SHADOW: (Role.SHADOW, Role.COMMANDS),
    Role.MAINTENANCE: (Role.MAINTENANCE, Role.RESCUE),
    Role.DELIVERY: (Role.DELIVERY,),
    Role.BRIDGE: (Role.BRIDGE,),
    Role.UI: (Role.UI,),
}
"""The roles of each process, which has the name, log and health port of its first one.

Rescue takes in what has killed a worker. Should it die of that too, it takes along only chores that start over.
Shadows and commands are said far less often than telemetry: together they cost one interpreter.
"""

TOLD_TO_OTHER_COMMANDS = (
    "nats_url", "database_url", "gateway_host", "gateway_port", "ui_host", "ui_port", "health_host", "health_port",
    "embedded_nats_monitor_port", "mqtt_url", "secret_keys",
)  # fmt: skip
BRIDGE_S_OWN = ("mqtt_password", "mqtt_issuer_secret", "mqtt_access_url")
"""What no other process of ours is told."""
SEALING_ROLES = ("ui", "delivery")
"""Who else knows what secrets of webhooks are sealed with."""
BRIDGE_CLIENT_ID = "pulse-bridge"
"""Whatever this machine is called: under another name the session, and what waits in it, would be left behind."""
OWN_NAMES = {name: key for key, name in ENVIRONMENT_BY_OWN_NAME.items()}


@click.command()
@click.option("--gateway-port", type=click.IntRange(1, 65535), help="Where devices send; default 8080.")
@click.pass_obj
def up(context: Context, gateway_port: int | None) -> None:
    """Start everything on this machine, and stop it on Ctrl-C.

    The data are in .pulse, or in --data-dir, and are found again at the next start.
    """
    settings = context.settings(with_instance=False, gateway_port=gateway_port)
    console = Console(stderr=True, highlight=False)
    configure_logging(level="warning", log_format=settings.log_format, role="up")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with DataFolder(Path(settings.data_dir)) as folder:
        check_ports(_ports(settings))
        nats, postgres, settings = _servers(settings, folder)
        with Supervisor(stop_s_max=STOP_S_MAX) as supervisor:
            with _step(console, "nats-server and PostgreSQL"):
                supervisor.start(nats, postgres)
            with _step(console, "streams, schema and demo tenant"):
                demo_token = prepare(settings, folder.path)
                link = sign_in_link(settings, operator_key(settings, folder.path))
            folder.write_instance({name: getattr(settings, name) for name in TOLD_TO_OTHER_COMMANDS})
            roles = _roles(settings, folder)
            with _step(console, "ingest, shadows and commands, deliveries, maintenance"):
                supervisor.start(roles[Role.INGEST], roles[Role.SHADOW], roles[Role.DELIVERY], roles[Role.MAINTENANCE])
            with _step(console, "gateway, bridge and console"):
                supervisor.start(roles[Role.GATEWAY], roles[Role.BRIDGE], roles[Role.UI])
            _print_ready(settings, folder, nats, demo_token, link)
            supervisor.wait(stop)
            folder.remove_instance()
            console.print("stopping …", style="dim")
    console.print("stopped; the data are kept", style="dim")


def _servers(settings: Settings, folder: DataFolder) -> tuple[NatsServer, PostgresServer, Settings]:
    """Both servers, not started, and the settings with what it takes to reach them."""
    secrets = folder.secrets()
    nats = NatsServer(
        folder.nats,
        port=settings.embedded_nats_port,
        monitor_port=settings.embedded_nats_monitor_port,
        password=secrets.nats_password,
        log_dir=folder.log,
        mqtt=MqttListener(
            port=settings.embedded_mqtt_port,
            bridge_password=secrets.mqtt_bridge_password,
            access_password=secrets.mqtt_access_password,
            issuer=AccountKey(secrets.mqtt_issuer_secret).public,
        ),
    )
    postgres = PostgresServer(
        folder.postgres,
        port=settings.embedded_postgres_port,
        password=secrets.postgresql_password,
        superuser_password=secrets.postgresql_superuser_password,
        log_dir=folder.log,
        pg_bin=settings.pg_bin,
    )
    settings = msgspec.structs.replace(
        settings,
        nats_url=nats.url,
        database_url=postgres.url,
        data_dir=str(folder.path),
        mqtt_url=f"mqtt://127.0.0.1:{settings.embedded_mqtt_port}",
        mqtt_version="3.1.1",
        mqtt_username=MqttListener.BRIDGE_USER,
        mqtt_password=secrets.mqtt_bridge_password,
        mqtt_client_id=BRIDGE_CLIENT_ID,
        mqtt_access_url=nats.access_url,
        mqtt_issuer_secret=secrets.mqtt_issuer_secret,
        secret_keys=settings.secret_keys or secrets.sealing_key,
    )
    return nats, postgres, settings


def health_port(settings: Settings, role: Role) -> int:
    """Where the process of `role` answers for its health."""
    return settings.health_port + list(Role).index(role)


def _ports(settings: Settings) -> Iterator[NeededPort]:
    yield NeededPort(purpose="nats-server", number=settings.embedded_nats_port, setting="embedded_nats_port")
    yield NeededPort(
        purpose="NATS monitoring", number=settings.embedded_nats_monitor_port, setting="embedded_nats_monitor_port"
    )
    yield NeededPort(purpose="MQTT", number=settings.embedded_mqtt_port, setting="embedded_mqtt_port")
    yield NeededPort(purpose="PostgreSQL", number=settings.embedded_postgres_port, setting="embedded_postgres_port")
    yield NeededPort(
        purpose="the gateway", number=settings.gateway_port, setting="gateway_port", host=settings.gateway_host
    )
    yield NeededPort(purpose="the console", number=settings.ui_port, setting="ui_port", host=settings.ui_host)
    for role in PROCESSES:
        number = health_port(settings, role)
        yield NeededPort(
            purpose=f"the health of {role}", number=number, setting="health_port", host=settings.health_host
        )


def _roles(settings: Settings, folder: DataFolder) -> dict[Role, ManagedProcess]:
    return {
        role: ManagedProcess(
            role,
            [sys.executable, "-m", "pulse", "serve", *together],
            log_path=folder.log / f"{role}.log",
            ready=_answers(f"http://{settings.health_host}:{health_port(settings, role)}/readyz"),
            environment=_environment(settings, role),
            orphan_signal=signal.SIGTERM,
        )
        for role, together in PROCESSES.items()
    }


def _environment(settings: Settings, role: Role) -> dict[str, str]:
    """Every setting as this process has it, so that a child decides nothing anew."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    if role is Role.UI and not settings.role_addresses:
        addresses = " ".join(f"{settings.health_host}:{health_port(settings, each)}" for each in PROCESSES)
        settings = msgspec.structs.replace(settings, role_addresses=addresses)
    if role is not Role.BRIDGE:
        hidden = [name for name in BRIDGE_S_OWN if role is not Role.DELIVERY or name != "mqtt_password"]
        settings = msgspec.structs.replace(settings, **dict.fromkeys(hidden, ""))
    if role not in SEALING_ROLES:
        settings = msgspec.structs.replace(settings, secret_keys="")
    for name, value in msgspec.structs.asdict(settings).items():
        environment[OWN_NAMES.get(name, ENVIRONMENT_PREFIX + name.upper())] = str(value)
    environment[f"{ENVIRONMENT_PREFIX}HEALTH_PORT"] = str(health_port(settings, role))
    return environment


def _answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as answer:  # noqa: S310 - our own http URL
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    return ready


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Say what is being started, and how long it took."""
    started = time.monotonic()
    if console.is_terminal:
        with console.status(f"starting {what} …"):
            yield
    else:
        yield
    console.print(f"[green]✓[/green] {what} [dim]{time.monotonic() - started:.1f} s[/dim]")


def _print_ready(settings: Settings, folder: DataFolder, nats: NatsServer, demo_token: str | None, link: str) -> None:
    gateway = f"http://{settings.gateway_host}:{settings.gateway_port}"
    click.echo(
        f"""
Pulse is up.  Ctrl-C stops it.

  console      {link}
               (signs you in once; `pulse account link` prints another)
  gateway      {gateway}   (/livez /readyz /metrics)
  control API  http://{settings.ui_host}:{settings.ui_port}/api/v1   (/api/v1/openapi.json)
  MQTT         {settings.mqtt_url}   (3.1.1; user name TENANT_ID/DEVICE_ID, password the token)
  NATS         nats://127.0.0.1:{nats.port}   monitoring {nats.monitor_url}
  PostgreSQL   postgresql://127.0.0.1:{settings.embedded_postgres_port}/pulse
  data, logs   {folder.path}
  credentials  {folder.path / "instance.toml"}, the control API's in {folder.path / OPERATOR_KEY_FILE}
"""
    )
    if demo_token is None:
        click.echo("Make a device with `pulse device add TENANT_ID DEVICE_ID`; it prints a token and a curl.\n")
    else:
        click.echo(
            f"""Send a reading:

  curl -i {gateway}/ingest/v1/tenant/{DEMO_TENANT}/device/{DEMO_DEVICE}/telemetry \\
    -H 'Authorization: Bearer {demo_token}' \\
    -H 'Content-Type: application/json' \\
    -d '{{"metrics":{{"temperature":21.5,"door":"closed"}}}}'

The same by MQTT:

  mosquitto_pub -p {settings.embedded_mqtt_port} -q 1 -i {DEMO_TENANT}/{DEMO_DEVICE} \\
    -u {DEMO_TENANT}/{DEMO_DEVICE} -P {demo_token} \\
    -t tenant/{DEMO_TENANT}/device/{DEMO_DEVICE}/telemetry -m '{{"metrics":{{"temperature":21.5}}}}'

Report a state, and see its shadow with `pulse shadow get {DEMO_TENANT} {DEMO_DEVICE}`:

  curl -i {gateway}/ingest/v1/tenant/{DEMO_TENANT}/device/{DEMO_DEVICE}/shadow \\
    -H 'Authorization: Bearer {demo_token}' \\
    -H 'Content-Type: application/json' \\
    -d '{{"state":{{"reported":{{"mode":"eco"}}}}}}'

See it arrive with `pulse tail`, make load with `pulse simulate`, prove that nothing is lost with `pulse audit`.
"""
        )
