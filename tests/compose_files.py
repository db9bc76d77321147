"""What stands in `compose/`, as `docker compose` would read it: parsed, merged, variables filled in.

Only as much of the format as our files use: `${NAME:?message}`, `$$`, and YAML's own anchors and merges.
"""

from __future__ import annotations

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
