"""What stands in `compose/`, as `docker compose` would read it: parsed, merged, variables filled in.

Only as much of the format as our files use: `${NAME:?message}`, `$$`, and YAML's own anchors and merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from repository import ROOT

FOLDER = ROOT / "compose"
COMPOSE = FOLDER / "docker-compose.yml"
CLUSTER = FOLDER / "docker-compose.cluster.yml"
OBSERVABILITY = FOLDER / "docker-compose.observability.yml"
LAYERS = {"one machine": (COMPOSE,), "cluster": (COMPOSE, CLUSTER), "observability": (COMPOSE, OBSERVABILITY)}
"""The files that are given to compose together."""
NATS_CONF = FOLDER / "nats" / "nats.conf"
INIT_STREAMS = FOLDER / "nats" / "init-streams.sh"
TOPOLOGY = ROOT / "src" / "pulse" / "topology"

Service = dict[str, Any]

_VARIABLE = re.compile(r"\$(?:\$|\{([A-Z_]+):\?[^}]*\})")


def document(path: Path = COMPOSE) -> dict[str, Any]:
    """The file with its anchors merged, variables as they stand there."""
    loaded: dict[str, Any] = yaml.load(path.read_text("utf-8"), _Strict)  # noqa: S506 - it is a SafeLoader
    return loaded


class _Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, as compose does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is there twice"
        return super().construct_mapping(node, deep)


def services(*paths: Path) -> dict[str, Service]:
    """The services by name, variables as they stand there; of several files as compose merges them."""
    found: dict[str, Service] = {}
    for path in paths or (COMPOSE,):
        for name, service in document(path)["services"].items():
            found[name] = _merged(found.get(name, {}), service)
    return found


def _merged(below: Service, above: Service) -> Service:
    """As much of compose's rules as our files need; tests/integration/test_compose_config.py asks compose itself."""
    merged = {**below, **above}
    for key in {"environment", "depends_on"} & below.keys() & above.keys():
        merged[key] = {**below[key], **above[key]}
    if "volumes" in below and "volumes" in above:
        mounts = {mount.split(":")[1]: mount for mount in [*below["volumes"], *above["volumes"]]}
        merged["volumes"] = list(mounts.values())
    return merged


def filled_in(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with every `${NAME:?…}` replaced; KeyError for a variable that is not given."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: variables[found[1]] if found[1] else "$", value)
    if isinstance(value, list):
        return [filled_in(each, variables) for each in value]
    if isinstance(value, dict):
        return {key: filled_in(each, variables) for key, each in value.items()}
    return value


def variables_of(text: str) -> set[str]:
    """The names of all variables in `text`, however they are written."""
    return set(re.findall(r"(?<!\$)\$\{?([A-Z_]+)", text))


def nats_users(text: str) -> dict[str, str]:
    """The users in a nats.conf, each with the variable that its password comes from."""
    return dict(re.findall(r"^\s+user: (\w+), password: \$(\w+)$", text, re.MULTILINE))


def is_role(service: Service) -> bool:
    """Whether it runs `pulse serve …`."""
    return list(service.get("command") or [])[:1] == ["serve"]


def runs_once(service: Service) -> bool:
    """Whether it does its work and ends: `restart: "no"`."""
    return service.get("restart") == "no"


def alerts() -> list[dict[str, Any]]:
    """The alert rules of Prometheus."""
    loaded = yaml.safe_load((FOLDER / "prometheus" / "rules.yml").read_text("utf-8"))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Every PromQL expression of the alert rules and the dashboards, by where it stands."""
    found = {f"alert {alert['alert']}": str(alert["expr"]) for alert in alerts()}
    for path in sorted((FOLDER / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_bytes())["panels"]:
            for target in panel["targets"]:
                found[f"{path.name}: {panel['title']}, {target['refId']}"] = target["expr"]
    return found


EXPORTED = {
    "gnatsd_varz_connections": {"server_id"},
    "gnatsd_varz_slow_consumers": {"server_id"},
    "jetstream_server_max_storage": {"server_id", "server_name"},
    "jetstream_server_total_message_bytes": {"server_id", "server_name"},
    "jetstream_stream_total_bytes": {"server_id", "server_name", "stream_name"},
    "jetstream_consumer_num_pending": {"server_id", "server_name", "stream_name", "consumer_name"},
}
"""What we ask of prometheus-nats-exporter, and by which labels: collector/jsz.go and collector.go of its source."""


def metrics_of(query: str) -> set[str]:
    """The metrics that a PromQL expression names; a histogram's by the name that it is declared under."""
    text = re.sub(r'"[^"]*"', "", query)
    named = re.findall(r"\b(?:pulse_\w+|process_\w+|gnatsd_\w+|jetstream_\w+|up)\b(?!=)", text)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
