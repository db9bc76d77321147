"""A job in hand, the stream that it came from, and the letter that it becomes where it is dead."""

from __future__ import annotations

from pulse.domain.dead_letter import Condemned
from pulse.domain.identity import is_id
from pulse.domain.route import Job
from pulse.domain.settlement import Message
from pulse.domain.subjects import tenant_of
from pulse.domain.waiting_job import NS_PER_MS, origin_subject, past_of
from pulse.services.delivery_acks import Acks
from pulse.services.job_fate import Dying
from pulse.services.waiting import KeptAlive, Source

ROUTES = "ROUTES"


class Held:
    """A job in hand."""

    __slots__ = ("created_ns", "inlet", "job", "message", "past")

    def __init__(self, inlet: Inlet, created_ns: int, message: Message) -> None:
        self.inlet = inlet
        self.created_ns = created_ns
        self.message = message
        self.past = past_of(message)
        self.job: Job | None = None

    @property
    def name(self) -> str:
        """Names its message, for ever."""
        return f"{self.inlet.stream}/{self.created_ns}/{self.message.sequence}"


class Inlet:
    """One of the two streams: its source, and what is in hand of it."""

    def __init__(self, stream: str, source: Source, acks: Acks, hand: KeptAlive) -> None:
        self.stream = stream
        self.source = source
        self.acks = acks
        self.hand = hand
        self.held: set[tuple[int, int]] = set()


def letter_of(held: Held, dying: Dying) -> Condemned:
    """The letter of a job: of its own place in ROUTES, or, where it has waited and has none any more, of its own."""
    message, is_first = held.message, held.inlet.stream == ROUTES
    tenant_id = tenant_of(origin_subject(message))
    return Condemned(
        stream=ROUTES,
        subject=origin_subject(message),
        reason=dying.reason,
        error=dying.error,
        body=message.body,
        headers=message.headers,
        tenant_id=tenant_id if is_id(tenant_id) else None,
        device_id=held.job.device_id if held.job is not None else None,
        attempts=dying.attempts,
        published_ns=held.past.since_ms * NS_PER_MS,
        stream_seq=message.sequence if is_first else None,
        created_ns=held.created_ns if is_first else None,
    )
