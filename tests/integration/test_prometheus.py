"""Rules, dashboards and the files of Prometheus and Alertmanager, by their own `promtool` and `amtool`."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compose_files import FOLDER, alerts, queries
from compose_server import HOST, compose_nats, container_environment, program, run
from repository import ROOT

RULES = FOLDER / "prometheus" / "rules.yml"
PLAYED = ROOT / "tests" / "prometheus_rules.yml"


@pytest.fixture
def promtool() -> str:
    """Of any version: what our rules ask of it is old."""
    return program("promtool", install="it comes with Prometheus; Debian's package is prometheus")


def test_prometheus_takes_its_files(promtool: str, tmp_path: Path) -> None:
    """With the rules where the container has them."""
    config = (FOLDER / "prometheus" / "prometheus.yml").read_text("utf-8")
    assert config.count("/etc/prometheus/rules.yml") == 1
    here = tmp_path / "prometheus.yml"
    here.write_text(config.replace("/etc/prometheus/rules.yml", str(RULES)), "utf-8")
    done = run([promtool, "check", "config", str(here)], container_environment(tmp_path), folder=tmp_path)
    assert done.code == 0, done.output + done.errors
    assert f"{len(alerts())} rules found" in done.output


def test_each_alert_fires_when_it_should_and_no_sooner(promtool: str, tmp_path: Path) -> None:
    done = run([promtool, "test", "rules", str(PLAYED)], container_environment(tmp_path), folder=tmp_path)
    assert done.code == 0, done.output + done.errors


def test_no_alert_is_left_out_of_what_is_played() -> None:
    assert {alert["alert"] for alert in alerts() if alert["alert"] not in PLAYED.read_text("utf-8")} == set()


def test_a_rule_that_would_never_fire_is_found(promtool: str, tmp_path: Path) -> None:
    """That what is played can fail."""
    (tmp_path / "compose" / "prometheus").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    broken = RULES.read_text("utf-8").replace('state="expired"', 'state="expire"')
    (tmp_path / "compose" / "prometheus" / "rules.yml").write_text(broken, "utf-8")
    played = tmp_path / "tests" / PLAYED.name
    played.write_text(PLAYED.read_text("utf-8"), "utf-8")
    done = run([promtool, "test", "rules", str(played)], container_environment(tmp_path), folder=tmp_path)
    assert done.code != 0


def test_every_query_of_a_dashboard_is_promql(promtool: str, tmp_path: Path) -> None:
    """Grafana fills in `$__rate_interval`."""
    rules = [
        {"record": f"dashboard:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries().values())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}), "utf-8")
    done = run([promtool, "check", "rules", str(path)], container_environment(tmp_path), folder=tmp_path)
    assert done.code == 0, done.output + done.errors


def test_alertmanager_takes_its_file_and_every_alert_has_somewhere_to_go(tmp_path: Path) -> None:
    amtool = program("amtool", install="it comes with Alertmanager; Debian's package is prometheus-alertmanager")
    config = str(FOLDER / "alertmanager" / "alertmanager.yml")
    environment = container_environment(tmp_path)
    done = run([amtool, "check-config", config], environment, folder=tmp_path)
    assert done.code == 0, done.output + done.errors
    for alert in alerts():
        labels = [f"alertname={alert['alert']}", f"severity={alert['labels']['severity']}"]
        route = [amtool, "config", "routes", "test", f"--config.file={config}", *labels]
        assert run(route, environment, folder=tmp_path).output.strip() == "operator"


def test_nats_server_says_what_the_exporter_s_metrics_are_made_of(tmp_path: Path) -> None:
    """The exporter itself is not at hand; these are the fields that it reads, of each metric that is asked for."""
    with compose_nats(tmp_path) as server:
        varz, jsz = (_asked(server.monitor_port, path) for path in ("/varz", "/jsz?consumers=true&config=true"))
    assert {"connections", "slow_consumers", "server_name"} <= varz.keys()
    assert {"bytes", "account_details"} <= jsz.keys()
    assert jsz["config"]["max_storage"] == 6 * 10**9 or jsz["config"]["max_storage"] == 6 * 1024**3


def _asked(port: int, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return answer
