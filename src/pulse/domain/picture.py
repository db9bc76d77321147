"""What follows from readings of the pipeline: rates, health, and what is the matter.

Rates follow from counts that parts keep anyway: a stream's last sequence, and what its consumer has settled of it. A
stage is stuck where messages wait and none was settled for STUCK_AFTER_S.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pulse.domain.histogram import quantile
from pulse.domain.pipeline import Fleet, Health, Picture, Reading, Stage, StreamLevel, SystemState

RATE_WINDOW_S = 5.0
LATENCY_WINDOW_S = 60.0
STUCK_AFTER_S = 10.0
FULL_SOON = 0.9
"""Of a stream's bytes."""
SAID_BY_DEVICES = ("TELEMETRY", "SHADOW", "COMMANDS")
"""What stands in the other streams follows from messages that were counted here."""


def picture(readings: Sequence[Reading]) -> Picture:
    """What the last of `readings` (oldest first, at least one) says, with those before it for rates."""
    now = readings[-1]
    systems = {each.name: each for each in now.systems}
    nats_down = next((each for each in now.systems if each.name == "nats" and not each.ok), None)
    stages = {"http": _entrance(readings, "http"), "mqtt": _entrance(readings, "mqtt")}
    for name, level in (now.streams or {}).items():
        stages[name] = _stream(readings, level)
        if level.consumer is not None:
            stages[level.consumer] = _worker(readings, level, systems.get("postgresql"))
    if nats_down is not None:
        stages["nats"] = Stage(health=Health.DOWN, why=nats_down.detail)
    stages["postgresql"] = _postgresql(systems.get("postgresql"), stages)
    stages["destinations"] = _destinations(readings)
    stages["dead letters"] = _dead(now.fleet)
    return Picture(
        at_ms=int(now.at_s * 1000),
        systems=now.systems,
        stages=stages,
        figures=figures(readings),
        sparks={},
        audit=now.audit,
        fleet=now.fleet,
    )


def figures(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Messages a second, p99 of received-to-stored in seconds, what waits, and devices that are there."""
    now = readings[-1]
    telemetry = (now.streams or {}).get("TELEMETRY")
    rates = [_accepted_rate(readings, name) for name in now.streams or {} if name in SAID_BY_DEVICES]
    known = [rate for rate in rates if rate is not None]
    return {
        "rate": sum(known) if known else None,
        "p99_s": _latency(readings),
        "pending": None if telemetry is None else float(telemetry.pending),
        "online": None if now.fleet is None else float(now.fleet.online),
    }


def _then(readings: Sequence[Reading], window_s: float) -> Reading | None:
    """The reading that is `window_s` old, or the oldest that is younger, if it is not the last one."""
    since = readings[-1].at_s - window_s
    for reading in readings[:-1]:
        if reading.at_s >= since - 0.5:
            return reading
    return None


def _rate(before: int, now: int, seconds: float) -> float | None:
    return max(0.0, (now - before) / seconds) if seconds > 0 and now >= before else None


def _accepted_rate(readings: Sequence[Reading], name: str) -> float | None:
    then, now = _levels(readings, name, RATE_WINDOW_S)
    if then is None or now is None:
        return None
    return _rate(then[1].last_seq, now.last_seq, readings[-1].at_s - then[0])


def _settled_rate(readings: Sequence[Reading], name: str, window_s: float = RATE_WINDOW_S) -> float | None:
    then, now = _levels(readings, name, window_s)
    if then is None or now is None:
        return None
    return _rate(min(then[1].settled, now.settled), now.settled, readings[-1].at_s - then[0])


def _levels(
    readings: Sequence[Reading], name: str, window_s: float
) -> tuple[tuple[float, StreamLevel] | None, StreamLevel | None]:
    """The level of a stream then and now, of the same making."""
    now = (readings[-1].streams or {}).get(name)
    reading = _then(readings, window_s)
    then = (reading.streams or {}).get(name) if reading is not None else None
    if reading is None or then is None or now is None or then.created != now.created:
        return None, now
    return (reading.at_s, then), now


def _entrance(readings: Sequence[Reading], kind: str) -> Stage:
    count = getattr(readings[-1].edge, kind)
    if count is None:
        return Stage(health=Health.UNKNOWN, why="its metrics cannot be reached from here")
    then = _then(readings, RATE_WINDOW_S)
    before = getattr(then.edge, kind) if then is not None else None
    rate = None if then is None or before is None else _rate(before, count, readings[-1].at_s - then.at_s)
    return Stage(health=Health.FLOWING if rate else Health.QUIET, rate=rate)


def _stream(readings: Sequence[Reading], level: StreamLevel) -> Stage:
    fill = None if level.bytes_max is None else level.bytes / level.bytes_max
    rate = _accepted_rate(readings, level.name)
    health, why = (Health.FLOWING if rate else Health.QUIET), ""
    if fill is not None and fill >= FULL_SOON and level.lag:
        health, why = Health.WARNING, f"{fill:.0%} full, with messages that nobody has processed"
    return Stage(
        health=health,
        why=why,
        rate=rate,
        messages=level.messages,
        age_s=level.oldest_age_s,
        fill=fill,
        lag=level.pending,
    )


def _worker(readings: Sequence[Reading], level: StreamLevel, postgresql: SystemState | None) -> Stage:
    rate = _settled_rate(readings, level.name)
    if not level.lag:
        asked = level.waiting_pulls > 0 or rate
        return Stage(
            health=Health.FLOWING if rate else Health.QUIET if asked else Health.ABSENT,
            why="" if asked else "no worker asks for messages; none waits",
            rate=rate,
            lag=0,
        )
    health, why = Health.FLOWING, ""
    if _has_not_moved(readings, level.name):
        health = Health.STUCK
        if postgresql is not None and not postgresql.ok:
            why = f"waits for PostgreSQL; {level.lag:,} messages are kept in {level.name}"
        elif not level.waiting_pulls and not level.ack_pending:
            why = f"{level.lag:,} messages wait, and no worker asks for them"
        else:
            why = f"{level.lag:,} messages wait, and none was settled for {STUCK_AFTER_S:.0f} s"
    return Stage(health=health, why=why, rate=rate, lag=level.lag)


def _has_not_moved(readings: Sequence[Reading], name: str) -> bool:
    """Whether something has waited, and nothing was settled, at each reading of the last STUCK_AFTER_S."""
    since = readings[-1].at_s - STUCK_AFTER_S
    if readings[0].at_s > since:
        return False
    now = (readings[-1].streams or {}).get(name)
    if now is None:
        return False
    for reading in reversed(readings):
        level = (reading.streams or {}).get(name)
        if level is None or level.created != now.created or not level.lag or level.settled < now.settled:
            return False
        if reading.at_s <= since:
            return True
    return False


def _postgresql(state: SystemState | None, stages: Mapping[str, Stage]) -> Stage:
    if state is not None and not state.ok:
        return Stage(health=Health.DOWN, why=state.detail or "PostgreSQL does not answer")
    rates = [stage.rate for name, stage in stages.items() if name.endswith("-workers") and stage.rate is not None]
    rate = sum(rates) if rates else None
    return Stage(health=Health.FLOWING if rate else Health.QUIET, rate=rate)


def _dead(fleet: Fleet | None) -> Stage:
    if fleet is None:
        return Stage(health=Health.UNKNOWN, why="counted in PostgreSQL, which does not answer")
    if not fleet.dead_letters:
        return Stage(health=Health.QUIET, messages=0)
    return Stage(
        health=Health.WARNING,
        why=f"{fleet.dead_letters:,} wait for somebody to mend or purge them",
        messages=fleet.dead_letters,
    )


def _destinations(readings: Sequence[Reading]) -> Stage:
    """Where routes go: what they take, and how many jobs wait for their time."""
    now = readings[-1]
    entrance = _entrance(readings, "delivered")
    later, fleet = (now.streams or {}).get("LATER"), now.fleet
    health, why = entrance.health, entrance.why
    if fleet is not None and fleet.routes_failing:
        health = Health.WARNING
        why = f"{fleet.routes_failing:,} of {fleet.routes:,} routes deliver nothing now"
    return Stage(health=health, why=why, rate=entrance.rate, lag=None if later is None else later.messages)


def _latency(readings: Sequence[Reading]) -> float | None:
    """p99 of what was stored in the last LATENCY_WINDOW_S."""
    then, now = _then(readings, LATENCY_WINDOW_S), readings[-1].edge.latency
    before = then.edge.latency if then is not None else None
    if now is None or before is None:
        return None
    return quantile({bound: count - before.get(bound, 0) for bound, count in now.items()}, 0.99)
