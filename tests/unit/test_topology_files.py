"""The declared files: complete, checked, and what the requirement and the design say."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from pulse.domain.errors import ConfigurationError
from pulse.topology.declared import Declared, load, parse
from pulse.topology.subjects import overlap

HOUR_NS = 3600 * 10**9
MIB = 1024 * 1024
EMBEDDED_SERVER_BYTES = 6 * 1024**3

STREAM_FILES = {entry.name: entry.read_bytes() for entry in files("pulse.topology").joinpath("streams").iterdir()}
CONSUMER_FILES = {entry.name: entry.read_bytes() for entry in files("pulse.topology").joinpath("consumers").iterdir()}


def edited(files_by_name: dict[str, bytes], name: str, /, **changes: object) -> dict[str, bytes]:
    """The files with fields of one of them replaced; `...` removes a field."""
    config = json.loads(files_by_name[name]) | changes
    return files_by_name | {name: json.dumps({k: v for k, v in config.items() if v is not ...}).encode()}


def stream(declared: Declared, name: str) -> dict[str, object]:
    return {field: getattr(s, field) for s in declared.streams if s.name == name for field in s.__struct_fields__}


@pytest.mark.parametrize(
    ("name", "contract"),
    [
        (
            "TELEMETRY",
            {"subjects": ("telemetry.>",), "retention": "limits", "max_msgs_per_subject": 100_000, "max_age": HOUR_NS,
             "max_bytes": 1024 * MIB, "discard": "old", "allow_atomic": True, "deny_delete": False},
        ),
        ("SHADOW", {"subjects": ("shadow.>",), "retention": "limits", "max_msgs_per_subject": 10_000,
                    "max_age": HOUR_NS, "max_bytes": 256 * MIB, "discard": "old", "allow_atomic": True}),
        ("COMMANDS", {"subjects": ("commands.>",), "retention": "limits", "max_msgs_per_subject": 10_000,
                      "max_age": HOUR_NS, "max_bytes": 256 * MIB, "discard": "old"}),
        ("DOWN", {"subjects": ("down.>",), "retention": "limits", "max_msgs_per_subject": -1, "max_age": HOUR_NS,
                  "max_bytes": 256 * MIB, "discard": "old", "allow_atomic": True}),
        ("ROUTES", {"subjects": ("routes.>",), "retention": "workqueue", "max_age": 24 * HOUR_NS,
                    "max_bytes": 512 * MIB, "discard": "new", "allow_atomic": True}),
        ("LATER", {"subjects": ("later.>",), "retention": "workqueue", "max_age": 0, "max_bytes": 256 * MIB,
                   "discard": "old", "allow_msg_schedules": True}),
        ("DEAD_LETTERS", {"subjects": ("dead.>", "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>"),
                          "discard": "new", "max_age": 0}),
        ("KV_registry", {"subjects": ("$KV.registry.>",), "max_msgs_per_subject": 1, "allow_rollup_hdrs": True,
                         "deny_delete": True, "allow_direct": True, "discard": "new", "max_bytes": 256 * MIB}),
    ],
)  # fmt: skip
def test_a_stream_is_as_its_contract_says(name: str, contract: dict[str, object]) -> None:
    common = {"storage": "file", "num_replicas": 1, "duplicate_window": 120 * 10**9}
    found = stream(load(), name)
    assert {field: found[field] for field in common | contract} == common | contract


@pytest.mark.parametrize(
    ("stream_name", "name", "max_ack_pending", "max_deliver"),
    [
        ("TELEMETRY", "ingest-workers", 20_000, 3),
        ("SHADOW", "shadow-workers", 5000, 3),
        ("COMMANDS", "command-workers", 5000, 3),
        ("ROUTES", "route-delivery", 100, 3),
        ("LATER", "later-delivery", 100, 3),
        ("DOWN", "bridge-down", 2000, -1),
    ],
)
def test_a_consumer_is_as_its_contract_says(
    stream_name: str, name: str, max_ack_pending: int, max_deliver: int
) -> None:
    [consumer] = [c for c in load().consumers if c.config.name == name]
    config = consumer.config
    assert (consumer.stream, config.max_ack_pending) == (stream_name, max_ack_pending)
    assert (config.ack_policy, config.deliver_policy, config.max_deliver) == ("explicit", "all", max_deliver)
    assert (config.ack_wait, config.num_replicas) == (30 * 10**9, 0)


def test_the_streams_fit_into_the_embedded_server() -> None:
    assert sum(declared.max_bytes for declared in load().streams) < EMBEDDED_SERVER_BYTES


def test_stream_replicas_apply_to_every_stream_and_consumers_follow() -> None:
    declared = load(stream_replicas=3)
    assert {declared_stream.num_replicas for declared_stream in declared.streams} == {3}
    assert {consumer.config.num_replicas for consumer in declared.consumers} == {0}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_agee": 1},
        {"max_age": ...},
        {"max_age": "1h"},
        {"max_age": 1.5},
        {"discard": "older"},
        {"num_replicas": 2},
        {"name": "SHADOWS"},
        {"duplicate_window": 2 * HOUR_NS},
        {"subjects": []},
        {"subjects": ["telemetry.x.>"]},
        {"sealed": True},
    ],
)
def test_a_wrong_stream_file_is_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="SHADOW"):
        parse(edited(STREAM_FILES, "SHADOW.json", **changes), CONSUMER_FILES)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_pending": 1},
        {"ack_wait": ...},
        {"ack_wait": 0},
        {"ack_policy": "none"},
        {"durable_name": "other"},
        {"num_replicas": 1},
    ],
)
def test_a_wrong_consumer_file_is_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="shadow-workers"):
        parse(STREAM_FILES, edited(CONSUMER_FILES, "SHADOW.shadow-workers.json", **changes))


def test_a_consumer_of_an_undeclared_stream_is_refused() -> None:
    without = {name: body for name, body in STREAM_FILES.items() if name != "SHADOW.json"}
    with pytest.raises(ConfigurationError, match="shadow-workers"):
        parse(without, CONSUMER_FILES)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("telemetry.>", "telemetry.a", True),
        ("telemetry.>", "telemetry", False),
        ("telemetry.>", "telemetry.a.b", True),
        ("telemetry.*", "telemetry.a.b", False),
        ("*.a", "telemetry.*", True),
        ("*.a", "telemetry.b", False),
        (">", "dead.x", True),
        ("a.b", "a.b", True),
        ("a.*.c", "a.b.d", False),
        ("telemetry.>", "telemetrys.a", False),
    ],
)
def test_overlap_is_symmetric_and_knows_wildcards(one: str, other: str, shared: bool) -> None:
    assert overlap(one, other) is shared
    assert overlap(other, one) is shared
