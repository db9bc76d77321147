"""One configuration against another: which fields count, and when two values mean the same.

Compared is every declared field, and the fields of `STREAM_NEUTRAL` and `CONSUMER_NEUTRAL`: they are not declared
because they must be absent, as each would change what a stream holds or what a worker is given. Any other field
(metadata, placement, republish, more abilities such as `allow_msg_ttl`, whatever only a newer server knows) is left
as it is found, and a default that the server filled in is no drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STREAM_NEUTRAL: Mapping[str, object] = {
    "mirror": None,
    "sources": [],
    "subject_transform": None,
    "subject_delete_marker_ttl": 0,
    "allow_msg_counter": False,
    "persist_mode": "default",
    "consumer_limits": {},
}
CONSUMER_NEUTRAL: Mapping[str, object] = {
    "filter_subjects": [],
    "backoff": [],
    "deliver_subject": "",
    "deliver_group": "",
    "flow_control": False,
    "idle_heartbeat": 0,
    "rate_limit_bps": 0,
    "max_batch": 0,
    "max_expires": 0,
    "max_bytes": 0,
    "priority_policy": "none",
    "priority_groups": [],
    "opt_start_seq": 0,
    "opt_start_time": None,
}

UNLIMITED = frozenset(
    {"max_msgs", "max_bytes", "max_msgs_per_subject", "max_msg_size", "max_consumers", "max_deliver", "max_ack_pending"}
)
"""Where 0 and -1 mean the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field of a configuration: as the server has it, and as it is declared."""

    field: str
    actual: object
    declared: object


def differences(wanted: Mapping[str, object], found: Mapping[str, object]) -> tuple[Difference, ...]:
    """The fields of `wanted` whose value differs in `found`; what the server leaves out counts as its zero."""
    return tuple(
        Difference(field=name, actual=found.get(name, _zero(value)), declared=value)
        for name, value in wanted.items()
        if _normal(name, found.get(name, _zero(value))) != _normal(name, value)
    )


def laid_over(
    found: Mapping[str, object], wanted: Mapping[str, object], neutral: Mapping[str, object]
) -> dict[str, object]:
    """The configuration to send, as an update replaces all of it: the server's own, `wanted` laid over it, without
    the fields of `neutral` and without the server's own metadata.
    """
    config = {name: value for name, value in found.items() if name not in neutral and name != "metadata"}
    config |= {name: value for name, value in wanted.items() if name not in neutral}
    metadata = found.get("metadata")
    if isinstance(metadata, Mapping):
        config["metadata"] = {key: value for key, value in metadata.items() if not str(key).startswith("_nats.")}
    return config


def _zero(value: object) -> object:
    return None if value is None else type(value)()


def _normal(name: str, value: object) -> object:
    if name in UNLIMITED and isinstance(value, int) and value <= 0:
        return -1
    if name == "subjects" and isinstance(value, list | tuple):
        return sorted(str(subject) for subject in value)
    if name in {"compression", "persist_mode", "priority_policy"} and not value:
        return "none" if name != "persist_mode" else "default"
    if value in (None, [], {}, ""):
        return None
    return value
