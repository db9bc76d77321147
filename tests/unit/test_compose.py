"""The rules that every compose file of ours keeps, and what the requirement says of names, ports and volumes."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from compose_files import (
    CLUSTER,
    COMPOSE,
    EXPORTED,
    FOLDER,
    INIT_STREAMS,
    LAYERS,
    NATS_CONF,
    TOPOLOGY,
    Service,
    alerts,
    document,
    filled_in,
    is_role,
    metrics_of,
    nats_users,
    queries,
    runs_once,
    services,
    variables_of,
)
from pulse.runtime.layers import load
from pulse.runtime.metrics import TABLE
from pulse.runtime.roles import Role
from repository import ROOT

FILES = sorted(FOLDER.glob("docker-compose*.yml"))
KEYS = frozenset(
    {
        "build",
        "cap_drop",
        "command",
        "container_name",
        "depends_on",
        "deploy",
        "entrypoint",
        "environment",
        "healthcheck",
    }
    | {
        "healthcheck",
        "image",
        "logging",
        "ports",
        "profiles",
        "read_only",
        "restart",
        "security_opt",
        "shm_size",
        "stop_grace_period",
        "stop_signal",
    }
    | {"tmpfs", "user", "volumes"}
)
"""Of a service, that we use: compose refuses a key that it does not know, and so do we, without compose."""
MQTT_WITH_TLS = "8883:8883"
PASSWORD = "p" + "0" * 32
"""As `make-env.sh` makes them."""
HEALTH_KEYS = frozenset({"test", "interval", "timeout", "retries", "start_period", "start_interval", "disable"})
PINNED = re.compile(r"^[a-z0-9./-]+:v?\d+\.\d+[\w.-]*$")


def unknown_keys(service: Service) -> list[str]:
    unknown = set(service) - KEYS | set(service.get("healthcheck", {})) - HEALTH_KEYS
    return sorted(unknown)


def unpinned_image(service: Service) -> list[str]:
    image = service.get("image", "none")
    return [] if PINNED.fullmatch(image) else [image]


def public_ports(service: Service) -> list[str]:
    """All but what devices come to from everywhere: MQTT with TLS."""
    ports = [str(port) for port in service.get("ports", []) if port != MQTT_WITH_TLS]
    return [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)]


def no_health_check(service: Service) -> list[str]:
    check = service.get("healthcheck", {})
    if runs_once(service):
        return []
    return [key for key in ("test", "interval", "timeout", "retries") if key not in check or check.get("disable")]


def no_bounds(service: Service) -> list[str]:
    missing = [] if "max-size" in service.get("logging", {}).get("options", {}) else ["logging"]
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    return missing + [key for key in ("memory", "pids") if key not in limits]


def no_restart_policy(service: Service) -> list[str]:
    policy = service.get("restart", "none")
    return [] if policy in ("unless-stopped", "no") else [str(policy)]


WRITES_TO_ITS_ROOT = ("timescale/timescaledb:", "emqx/emqx:", "grafana/grafana:")
"""What starts as root, or keeps files beside its volume: it has to be as its makers ship it."""


def gains_privileges(service: Service) -> list[str]:
    missing = [] if "no-new-privileges:true" in service.get("security_opt", []) else ["no-new-privileges"]
    if not service.get("image", "").startswith(WRITES_TO_ITS_ROOT):
        missing += [] if service.get("read_only") is True else ["read_only"]
        missing += [] if service.get("cap_drop") == ["ALL"] else ["cap_drop"]
    return missing


def writable_binds(service: Service) -> list[str]:
    return [mount for mount in service.get("volumes", []) if mount.startswith(".") and not mount.endswith(":ro")]


RULES = [
    unknown_keys,
    unpinned_image,
    public_ports,
    no_health_check,
    no_bounds,
    no_restart_policy,
    gains_privileges,
    writable_binds,
]


@pytest.mark.parametrize("rule", RULES)
def test_every_service_keeps_the_rule(rule: Callable[[Service], list[str]]) -> None:
    found = {
        f"{title}: {name}": rule(each) for title, files in LAYERS.items() for name, each in services(*files).items()
    }
    assert {path for files in LAYERS.values() for path in files} == set(FILES)
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (unknown_keys, {"imgae": "nats:2.15.0"}),
        (unknown_keys, {"healthcheck": {"tests": []}}),
        (unpinned_image, {"image": "natsio/nats-box:latest"}),
        (unpinned_image, {"image": "nats"}),
        (unpinned_image, {"image": "nats:alpine"}),
        (public_ports, {"ports": ["4222:4222"]}),
        (public_ports, {"ports": ["0.0.0.0:4222:4222"]}),
        (public_ports, {"ports": [8080]}),
        (public_ports, {"ports": ["1883:1883"]}),
        (no_health_check, {}),
        (no_health_check, {"healthcheck": {"test": [], "interval": "", "timeout": "", "retries": 1, "disable": True}}),
        (no_bounds, {"deploy": {"resources": {"limits": {"memory": "1G"}}}}),
        (no_restart_policy, {}),
        (gains_privileges, {"build": {}, "security_opt": ["no-new-privileges:true"]}),
        (gains_privileges, {"read_only": True, "cap_drop": ["ALL"]}),
        (writable_binds, {"volumes": ["./nats/nats.conf:/etc/nats/nats.conf"]}),
    ],
)
def test_each_rule_can_fail(rule: Callable[[Service], list[str]], bad: Service) -> None:
    assert rule(bad) != []


def test_every_role_has_a_service_and_every_service_of_ours_a_role() -> None:
    assert {name for name, each in services().items() if is_role(each)} == {role.value for role in Role}


def test_prometheus_asks_every_role() -> None:
    config = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text("utf-8"))
    job = next(each for each in config["scrape_configs"] if each["job_name"] == "pulse")
    assert sorted(job["dns_sd_configs"][0]["names"]) == sorted(role.value for role in Role)
    rules = (FOLDER / "prometheus" / "rules.yml").read_text("utf-8")
    assert set(re.findall(r'absent\(up\{job="pulse", service="(\w+)"\}\)', rules)) == {role.value for role in Role}


def test_what_prometheus_asks_and_tells_is_a_service_of_the_file() -> None:
    config = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text("utf-8"))
    told = [each for one in config["alerting"]["alertmanagers"] for each in one["static_configs"]]
    asked = [each for job in config["scrape_configs"] for each in job.get("static_configs", [])]
    hosts = {target.partition(":")[0] for each in told + asked for target in each["targets"]}
    assert hosts == {"alertmanager", "nats-exporter"}
    assert hosts <= set(services(*LAYERS["observability"]))


def test_every_query_names_metrics_that_are_declared() -> None:
    """That the roles expose them is in tests/integration/test_compose_services.py."""
    known = set(TABLE) | set(EXPORTED) | {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
    found = queries()
    assert len(found) > 20
    assert {name: each for name, each in found.items() if not metrics_of(each) or not metrics_of(each) <= known} == {}


def test_every_label_in_a_query_is_of_its_metric() -> None:
    target = {"job", "service", "instance", "le"}
    declared = {**{name: set(each.labels) for name, each in TABLE.items()}, **EXPORTED}
    for query in queries().values():
        labels = {label for name in metrics_of(query) for label in declared.get(name, ())} | target
        used = set(re.findall(r"(\w+)=\"", query))
        used |= {label.strip() for each in re.findall(r"by \(([^)]*)\)", query) for label in each.split(",")}
        assert used <= labels, query


def test_every_alert_says_how_bad_it_is_what_it_is_and_what_to_do() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"].keys() == {"summary", "action"}


def test_a_service_of_a_role_runs_that_role_and_can_be_scaled() -> None:
    for name, each in services().items():
        if is_role(each):
            assert each["command"] == ["serve", name]
            assert "container_name" not in each
            assert bool(each.get("ports")) == (name in {"gateway", "ui"})


@pytest.mark.parametrize("layer", [[], [CLUSTER]], ids=["one machine", "cluster"])
def test_who_depends_on_whom_waits_for_the_right_thing(layer: list[Path]) -> None:
    """For the end of what runs once, for the health of what goes on; and every role waits for streams and schema."""
    all_services = services(COMPOSE, *layer)
    for name, each in all_services.items():
        for target, how in each.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if runs_once(all_services[target]) else "service_healthy"
            assert how == {"condition": wanted}, f"{name} on {target}"
        if is_role(each):
            assert {"nats", "nats-init", "migrate", "pgbouncer"} <= set(each["depends_on"])


def test_every_variable_is_required_and_stands_in_the_example_file() -> None:
    """nats-server would accept an empty password, so a variable that is missing or empty has to stop compose."""
    text = "".join(path.read_text("utf-8") for path in FILES)
    required = set(re.findall(r"\$\{([A-Z_]+):\?", text))
    example = set(re.findall(r"^([A-Z_]+)=$", (FOLDER / ".env.example").read_text("utf-8"), re.MULTILINE))
    assert variables_of(text) == required == example


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_mounted_exists_and_every_volume_is_declared(path: Path) -> None:
    used: set[str] = set()
    for each in services(path).values():
        for mount in each.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).exists(), mount
            else:
                used.add(source)
    assert used == set(document(path)["volumes"])


@pytest.mark.parametrize("name", [name for name, each in services().items() if "build" in each])
def test_the_environment_of_a_service_is_made_of_settings(name: str) -> None:
    """A misspelt one is refused by `load`."""
    environment = services()[name]["environment"]
    variables = dict.fromkeys(variables_of(str(environment)), PASSWORD)
    settings = load(environment=filled_in(environment, variables))
    assert settings.database_url.startswith(f"postgresql://pulse:{PASSWORD}@")
    assert settings.nats_url.startswith("nats://") or name == "migrate"


def test_the_image_has_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert {each["image"] for each in services().values() if "build" in each} == {f"opsconductor-pulse:{version}"}


def test_the_dockerfile_pins_its_base_and_runs_as_nobody_in_particular() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    base = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)
    assert len(base) == 1
    assert PINNED.fullmatch(base[0])
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}
    last_stage = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last_stage, re.MULTILINE)
    assert "pip uninstall --yes" in last_stage
    assert "--require-hashes" in text


def test_the_image_installs_every_pin_of_the_lock_but_the_embedded_servers() -> None:
    """By the very line of the Dockerfile."""
    line = re.findall(r"^RUN (awk .*) > server\.lock$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    done = subprocess.run(["sh", "-c", line[0]], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    whole = (ROOT / "requirements.lock").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins, kept = _pins(whole), _pins(done.stdout)
    embedded = {canonicalize_name(Requirement(each).name) for each in project["optional-dependencies"]["embedded"]}
    assert kept == {name: pin for name, pin in pins.items() if name not in embedded}
    assert {canonicalize_name(Requirement(each).name) for each in project["dependencies"]} <= set(kept)


def _pins(lock: str) -> dict[str, str]:
    """Each distribution with its whole entry, hashes included."""
    entries = re.findall(r"^([A-Za-z0-9._-]+)(==[^\n]*(?:\n [^\n]*)*)", lock, re.MULTILINE)
    return {canonicalize_name(name): entry for name, entry in entries}


def test_nats_has_a_user_for_every_role_and_gets_all_their_passwords() -> None:
    users = nats_users(NATS_CONF.read_text("utf-8"))
    assert set(users) == {role.value for role in Role} | {"provisioner"}
    environment = services()["nats"]["environment"]
    assert {name for name in environment if name.endswith("_PASSWORD")} == set(users.values())
    for name, each in services().items():
        if is_role(each):
            assert each["environment"]["NATS_URL"].startswith(f"nats://{name}:${{{users[name]}:?")


def test_no_user_of_nats_may_do_everything() -> None:
    """One without permissions of its own may."""
    text = NATS_CONF.read_text("utf-8")
    assert len(re.findall(r"publish: \{ allow: \[", text)) == len(nats_users(text))
    assert len(re.findall(r"subscribe: \{ allow: \[", text)) == len(nats_users(text))
    assert '">"' not in text


def test_the_server_has_room_above_the_streams_and_an_update_of_the_largest() -> None:
    sizes = [json.loads(path.read_bytes())["max_bytes"] for path in (TOPOLOGY / "streams").glob("*.json")]
    room = re.findall(r"^  max_file: (\d+)GB$", NATS_CONF.read_text("utf-8"), re.MULTILINE)
    assert sum(sizes) + max(sizes) < int(room[0]) * 1024**3


def test_the_script_swallows_no_error() -> None:
    """As the requirement's own did: it said "ready" for streams that did not exist."""
    text = INIT_STREAMS.read_text("utf-8")
    assert text.startswith("#!/bin/sh\n")
    assert "|| true" not in text
    assert "/dev/null" not in text
    assert INIT_STREAMS.stat().st_mode & 0o111 == 0o111


CONTRACT: dict[str, dict[str, Any]] = {
    "nats": {
        "container_name": "iot-nats",
        "command": ["-c", "/etc/nats/nats.conf"],
        "ports": ["127.0.0.1:4222:4222", "127.0.0.1:8222:8222"],
        "volumes": ["./nats/nats.conf:/etc/nats/nats.conf:ro", "nats-data:/data"],
        "restart": "unless-stopped",
    },
    "nats-init": {
        "container_name": "iot-nats-init",
        "entrypoint": ["/bin/sh", "/scripts/init-streams.sh"],
        "depends_on": {"nats": {"condition": "service_healthy"}},
        "restart": "no",
    },
}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_requirement_s_services_are_as_it_says(name: str) -> None:
    service = services()[name]
    assert {key: service[key] for key in CONTRACT[name]} == CONTRACT[name]
    timing = {"interval": "5s", "timeout": "3s", "retries": 12, "start_period": "5s"}
    assert name != "nats" or timing.items() <= service["healthcheck"].items()


@pytest.mark.parametrize("name", ["nats-init", "ingest", "ui"])
def test_nats_is_found_where_the_requirement_says(name: str) -> None:
    assert re.sub(r"//.*@", "//", services()[name]["environment"]["NATS_URL"]) == "nats://iot-nats:4222"


NODES = ["nats", "nats-1", "nats-2"]


def test_the_servers_of_a_cluster_differ_in_name_and_volume_alone() -> None:
    """And each gets what the one server gets."""
    alone, cluster = services()["nats"], services(*LAYERS["cluster"])
    own = {"NATS_SERVER_NAME"}
    shared = [{key: value for key, value in cluster[name]["environment"].items() if key not in own} for name in NODES]
    assert shared == [shared[0]] * len(NODES)
    assert alone["environment"].items() <= shared[0].items()
    names = [cluster[name]["environment"]["NATS_SERVER_NAME"] for name in NODES]
    assert names == [cluster["nats"]["container_name"], "nats-1", "nats-2"]
    routes = [value for key, value in shared[0].items() if key.startswith("NATS_ROUTE_") and "://" in value]
    assert [url.rpartition("@")[2] for url in routes] == [f"{name}:6222" for name in names]
    for key in ("image", "security_opt", "read_only", "cap_drop", "restart", "logging", "deploy"):
        assert all(cluster[name][key] == alone[key] for name in NODES), key


def test_a_server_of_a_cluster_never_gets_the_volume_of_one_that_has_run_alone() -> None:
    """The cluster does not know its streams, and removes them."""
    mounted = {name: _volume_of(each, "/data") for name, each in services(*LAYERS["cluster"]).items() if name in NODES}
    assert _volume_of(services()["nats"], "/data") not in mounted.values()
    assert len(set(mounted.values())) == len(NODES)


def _volume_of(service: Service, target: str) -> str:
    [source] = [mount.split(":")[0] for mount in service["volumes"] if mount.split(":")[1] == target]
    return str(source)


def test_whoever_works_with_nats_knows_all_servers_of_a_cluster_and_that_there_are_three_copies() -> None:
    hosts = ["iot-nats", "nats-1", "nats-2"]
    for name, each in services(*LAYERS["cluster"]).items():
        alone = services().get(name, {}).get("environment", {}).get("NATS_URL")
        if alone is None:
            continue
        environment = each["environment"]
        assert environment["NATS_URL"] == ",".join(alone.replace("iot-nats", host) for host in hosts), name
        assert environment["STREAM_REPLICAS" if name == "nats-init" else "PULSE_STREAM_REPLICAS"] == "3", name


def test_the_servers_of_a_cluster_have_the_name_that_the_requirement_gives_it() -> None:
    text = NATS_CONF.with_name("cluster.conf").read_text("utf-8")
    assert "include nats.conf\n" in text
    for line in ("name: pulse-nats-cluster", "listen: 0.0.0.0:6222"):
        assert f"  {line}\n" in text
        assert f"#   {line}\n" in NATS_CONF.read_text("utf-8")


def test_whoever_drains_is_given_the_time_to() -> None:
    """Between SIGTERM and SIGKILL; and what is drained is not awaited for longer than a message may be."""
    for name, each in services().items():
        if is_role(each):
            environment = filled_in(
                each["environment"], dict.fromkeys(variables_of(str(each["environment"])), PASSWORD)
            )
            assert float(each["stop_grace_period"].removesuffix("s")) > load(environment=environment).drain_s_max, name


def test_a_role_can_be_scaled_unless_it_has_a_port_of_the_machine() -> None:
    """`--scale ingest=4`: no name of its own, no port, no volume."""
    scaled = [
        name
        for name, each in services().items()
        if is_role(each) and not {"ports", "volumes", "container_name"} & each.keys()
    ]
    assert {"ingest", "maintenance", "rescue"} <= set(scaled)
