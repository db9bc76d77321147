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
NATS_CONF = FOLDER / "nats" / "nats.conf"
INIT_STREAMS = FOLDER / "nats" / "init-streams.sh"
TOPOLOGY = ROOT / "src" / "pulse" / "topology"

Service = dict[str, Any]

_VARIABLE = re.compile(r"\$(?:\$|\{([A-Z_]+):\?[^}]*\})")


def document(path: Path = COMPOSE) -> dict[str, Any]:
    """The file with its anchors merged, variables as they stand there."""
    loaded: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return loaded


def services(path: Path = COMPOSE) -> dict[str, Service]:
    """The services by name, variables as they stand there."""
    found: dict[str, Service] = document(path)["services"]
    return found


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


def metrics_of(query: str) -> set[str]:
    """The metrics that a PromQL expression names; a histogram's by the name that it is declared under."""
    named = re.findall(r"\b(?:pulse_\w+|process_\w+|up)\b(?!=)", re.sub(r'"[^"]*"', "", query))
    return {name.removesuffix("_bucket") for name in named}
