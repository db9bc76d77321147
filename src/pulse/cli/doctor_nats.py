"""What `pulse doctor` looks at in NATS: the server, what it does before it acknowledges, streams and consumers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import msgspec

from pulse.adapters.nats.connection import PulseClient
from pulse.adapters.nats.provisioner import Provisioner
from pulse.adapters.nats.stream_status import limit_of
from pulse.adapters.nats.streams import StreamSurvey, stream_state, survey
from pulse.cli.doctor_http import Answer, ask
from pulse.cli.streams_status import StreamStatus, bytes_text, duration_text, status_of
from pulse.domain.doctor import STAY_WARNING_S, Finding, Status, finding, full_in_s, graded, judge_clock, stay_s
from pulse.topology.declared import Declared

VERSION_MIN = (2, 12, 0)
"""Atomic batches."""
RATE_OVER_S = 1.0
STORAGE_WARNING_SHARE, STORAGE_FAILING_SHARE = 0.85, 0.98
MORE = "`pulse streams status` shows more"


class _Config(msgspec.Struct, frozen=True):
    max_storage: int = 0
    sync_interval: int = 0
    sync_always: bool = False


class _Stats(msgspec.Struct, frozen=True):
    storage: int = 0
    reserved_storage: int = 0


class _JetStream(msgspec.Struct, frozen=True):
    config: _Config | None = None
    stats: _Stats | None = None


class _Varz(msgspec.Struct, frozen=True):
    """`/varz` of nats-server's monitoring, as far as it is looked at."""

    port: int
    jetstream: _JetStream | None = None


async def server(client: PulseClient) -> list[Finding]:
    """Whether it answers, and is new enough."""
    started = time.monotonic()
    await client.flush()
    took_ms = (time.monotonic() - started) * 1000
    found = client.connected_server_version
    version = (found.major, found.minor, found.patch)
    status = Status.OK if version >= VERSION_MIN else Status.FAILING
    needed = ".".join(map(str, VERSION_MIN))
    text = f"nats-server {'.'.join(map(str, version))} answers in {took_ms:.1f} ms"
    return [finding("nats", status, text, f"upgrade it: {needed} or newer is needed for atomic batches")]


async def persistence(client: PulseClient, monitor_port: int) -> list[Finding]:
    """Whether an acknowledged message is on disk, and how much room there is: by the server's monitoring alone."""
    url = client.connected_url
    host, port = (url.hostname, url.port) if url else (None, None)
    where = f"http://{host}:{monitor_port}/varz"
    answer = await ask(where)
    found = _varz_of(answer)
    if found is None or found.port != port:
        why = "is another server's" if found else f"does not tell ({answer.text if not answer.status else 'no JSON'})"
        advice = "if its monitoring listens elsewhere, say so by --set embedded_nats_monitor_port=…"
        return [Finding(check="nats disk", status=Status.NOT_RUN, text=f"{where} {why}", advice=advice)]
    if found.jetstream is None or found.jetstream.config is None or found.jetstream.stats is None:
        return [finding("nats disk", Status.FAILING, "JetStream is not enabled", "`jetstream { … }` in nats.conf")]
    config, stats = found.jetstream.config, found.jetstream.stats
    synced = (
        "sync_interval: always" if config.sync_always else f"sync every {duration_text(config.sync_interval / 1e9)}"
    )
    findings = [
        finding(
            "nats sync",
            Status.OK if config.sync_always else Status.FAILING,
            synced,
            "`sync_interval: always` in nats.conf: until then an acknowledged message may be lost with the machine",
        )
    ]
    if config.max_storage > 0:
        share = stats.storage / config.max_storage
        text = f"{bytes_text(stats.storage)} of {bytes_text(config.max_storage)} used"
        status = graded(share, warning_at=STORAGE_WARNING_SHARE, failing_at=STORAGE_FAILING_SHARE)
        findings.append(finding("nats disk", status, text, "raise max_file_store in nats.conf, if the disk has room"))
    return findings


async def clock(client: PulseClient, stream: str) -> list[Finding]:
    """The server's clock against ours."""
    asked_at, started = time.time(), time.monotonic()
    state = await stream_state(client, stream)
    middle = asked_at + (time.monotonic() - started) / 2
    return [judge_clock("clock of nats", state.now_ns / 1e9 - middle)]


async def drift(client: PulseClient, declared: Declared) -> list[Finding]:
    """Streams and consumers against what is declared."""
    changes = (await Provisioner(client).plan(declared)).changes
    if not changes:
        count = f"{len(declared.streams)} streams and {len(declared.consumers)} consumers"
        return [finding("streams", Status.OK, f"{count} as declared")]
    targets = ", ".join(f"{change.target} ({_what(change.action)})" for change in changes)
    return [
        finding("streams", Status.FAILING, targets, "`pulse streams plan` shows it, `pulse streams apply` mends it")
    ]


async def fill(client: PulseClient, declared: Declared) -> list[Finding]:
    """How full each stream is, when it will be, and how its consumers stand; seen twice, a second apart."""
    names = [stream.name for stream in declared.streams]
    before = await _surveys(client, names)
    started = time.monotonic()
    await asyncio.sleep(RATE_OVER_S)
    after = await _surveys(client, names)
    took_s = time.monotonic() - started
    findings = []
    for name, now in after.items():
        then = before.get(name)
        per_s = (now.state.last_seq - then.state.last_seq) / took_s if then else 0.0
        growth = (now.state.bytes - then.state.bytes) / took_s if then else 0.0
        findings += _of_stream(now, per_s=max(0.0, per_s), growth_per_s=growth)
    return findings


async def _surveys(client: PulseClient, names: Sequence[str]) -> Mapping[str, StreamSurvey]:
    """Those that are there."""
    found = {name: await survey(client, name) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def _of_stream(now: StreamSurvey, *, per_s: float, growth_per_s: float) -> list[Finding]:
    status = status_of(now)
    check = f"stream {status.name}"
    limit = limit_of(now.config, "max_bytes")
    of_limit = f" of {bytes_text(limit)}" if limit else ""
    text = f"{status.messages:,} messages, {bytes_text(status.bytes)}{of_limit}, {per_s:,.0f} more a second"
    if now.config.get("discard") == "old":
        stays_s = _stays_s(now, status, per_s)
        text += f"; a message stays {duration_text(stays_s)}" if stays_s is not None else ""
        soon = stays_s is not None and stays_s < STAY_WARNING_S
        advice = "workers may not be away for longer: raise the stream's limits"
    else:
        full_s = full_in_s(used=status.bytes, limit=limit, growth_per_s=growth_per_s)
        text += f"; full in {duration_text(full_s)}" if full_s is not None else ""
        soon = full_s is not None and full_s < STAY_WARNING_S
        advice = "full, it refuses what comes: see why nobody empties it"
    findings = [finding(check, Status.WARNING if soon else Status.OK, text, advice)]
    findings += [finding(check, Status.WARNING, warning, MORE) for warning in status.warnings]
    for consumer in status.consumers:
        again = consumer.redelivered > 0
        advice = "a worker died with them in hand, or takes longer than the ack wait: see its log"
        text = f"lag {consumer.lag:,}, {consumer.redelivered:,} delivered more than once"
        findings.append(
            finding(f"consumer {consumer.name}", Status.WARNING if again else Status.OK, text, advice),
        )
    return findings


def _stays_s(now: StreamSurvey, status: StreamStatus, per_s: float) -> float | None:
    age_ns, bytes_max = limit_of(now.config, "max_age"), limit_of(now.config, "max_bytes")
    subject_max = limit_of(now.config, "max_msgs_per_subject")
    message_bytes = status.bytes / status.messages if status.messages else 0.0
    fullest = now.subject_messages.get(status.fullest_subject or "", 0)
    fullest_per_s = per_s * fullest / status.messages if status.messages else 0.0
    return stay_s(
        age_s_max=None if age_ns is None else age_ns / 1e9,
        bytes_left_at=None if bytes_max is None else (per_s * message_bytes, bytes_max),
        messages_left_at=None if subject_max is None else (fullest_per_s, subject_max),
    )


def _varz_of(answer: Answer) -> _Varz | None:
    if answer.status != 200:
        return None
    try:
        return msgspec.json.decode(answer.body, type=_Varz)
    except msgspec.MsgspecError:
        return None


def _what(action: str) -> str:
    return {"create": "missing", "update": "differs", "blocked": "differs, and cannot be changed in place"}[action]
