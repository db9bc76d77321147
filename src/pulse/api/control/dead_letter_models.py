"""The bodies about dead letters: which are meant, what is to become of them, and what the answers look like."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pulse.api.control.models import Answer, Request
from pulse.api.control.parameters import BIGINT_MAX, PAGE_MAX
from pulse.domain.dead_letter import Filter
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.domain.query import parse_instant

RATE_PER_S_DEFAULT = 500.0
RATE_PER_S_MAX = 10_000.0

OptionalId = Annotated[str | None, Field(pattern=f"^{ID_PATTERN}$")]
_INSTANT: dict[str, JsonValue] = {"format": "date-time", "examples": ["2026-03-01T12:00:00Z"]}
Instant = Annotated[str | None, Field(max_length=64, json_schema_extra=_INSTANT)]
LetterId = Annotated[int, Field(ge=1, le=BIGINT_MAX)]


class Which(BaseModel):
    """Which dead letters: those for which all that is given holds. They died at `since` or later, before `until`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: Reason | None = None
    stream: Annotated[str | None, Field(pattern="^[A-Z_]{1,64}$", examples=["TELEMETRY"])] = None
    tenant_id: OptionalId = None
    device_id: OptionalId = None
    route_id: OptionalId = None
    since: Instant = None
    until: Instant = None

    def filter(self, tenant_id: str | None, *, replayed: bool | None = None) -> Filter:
        """As the domain has it, held to the tenant of the path where there is one.

        Raises Refusal for a time that is none, and for another tenant.
        """
        if tenant_id is not None and self.tenant_id not in (None, tenant_id):
            raise Refusal(Reason.INVALID_REQUEST, "the path names another tenant", field="tenant_id")
        return Filter(
            reason=self.reason,
            stream=self.stream,
            tenant_id=tenant_id or self.tenant_id,
            device_id=self.device_id,
            route_id=self.route_id,
            since=None if self.since is None else parse_instant(self.since, field="since"),
            until=None if self.until is None else parse_instant(self.until, field="until"),
            replayed=replayed,
        )


class WhichInState(Which):
    """The same, and of those that wait, or that were replayed; without `state` both."""

    state: Literal["waiting", "replayed"] | None = None

    @property
    def replayed(self) -> bool | None:
        """As the domain has it."""
        return None if self.state is None else self.state == "replayed"


class Listing(WhichInState):
    """Which of them, and which page."""

    before: Annotated[int | None, Field(ge=1, le=BIGINT_MAX, description="`next` of the page before.")] = None
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX, description="How many to list.")] = 100


class ReplayOfMany(Request):
    """All that match are published again, oldest first, `rate_per_s` of them at most; an empty filter is all there are.

    Those that were replayed before only with `again`. Those that die while this goes on are not meant.
    """

    filter: Annotated[Which, Field(examples=[{"reason": "routes_full", "since": "2026-03-01T12:00:00Z"}])]
    again: bool = False
    rate_per_s: Annotated[float, Field(ge=0.1, le=RATE_PER_S_MAX)] = RATE_PER_S_DEFAULT


class Purge(Request):
    """All that match are deleted for good; an empty filter is all there are. `confirm` says that this is meant.

    `last_id`, as a count told it, leaves out those that have died since.
    """

    filter: Annotated[WhichInState, Field(examples=[{"reason": "invalid_payload", "state": "replayed"}])]
    confirm: Literal[True]
    last_id: LetterId | None = None


class Mended(Request):
    """Another body for the message: whole, envelope and payload, as it was shown. `base64` for what is no text."""

    body: Annotated[str, Field(examples=['{"v":1,"tenant_id":"acme","device_id":"boiler-1","msg_type":"telemetry",…}'])]
    encoding: Literal["text", "base64"] = "text"


class DeadLetter(Answer):
    """A dead letter. `sequence` is null where it never came into its stream; `replay_of` names the one whose replay
    died again as this one, `route_id` the route that wanted it.
    """

    id: int
    stream: str
    sequence: int | None
    subject: str
    tenant_id: str | None
    device_id: str | None
    route_id: str | None
    reason: str
    error: str
    body_bytes: int
    attempts: int
    published_at: datetime
    died_at: datetime
    replays: int
    replayed_at: datetime | None
    replayed_sequence: int | None
    replay_of: int | None


class DeadLetterWhole(Answer):
    """A dead letter with all that is kept of it; `body` is its `text`, or `base64` of what is no UTF-8.

    `died_again_as` are the dead letters that its replays became.
    """

    dead_letter: DeadLetter
    headers: dict[str, str]
    encoding: Literal["text", "base64"]
    body: str
    died_again_as: list[int]


class DeadLetterPage(Answer):
    """Dead letters, the newest first; `next` is the `before` of the next page, null where there is none."""

    dead_letters: list[DeadLetter]
    next: int | None


class DeadLetterCount(Answer):
    """How many match, how many of them were replayed, and the newest id (0: none)."""

    count: int
    replayed: int
    last_id: int


class ReplayedLetter(Answer):
    """A dead letter that was published again: as message `sequence` of its stream."""

    id: int
    stream: str
    sequence: int


class Progress(Answer):
    """How many are done, `failed` ones among them, of how many."""

    done: int
    failed: int
    total: int


class Failed(Answer):
    """A letter that its stream does not take; it is kept as it was."""

    id: int
    reason: str
    detail: str


class Summary(Answer):
    """What was done. `stopped` is empty where it came to its end; else a system went away, and it can be repeated."""

    done: int
    failed: int
    total: int
    stopped: str = ""


LINE: dict[str, JsonValue] = {
    "type": "object",
    "description": "How far it is, a letter that failed (of these the first hundred), or the end.",
    "properties": {
        "progress": Progress.model_json_schema(),
        "failed": Failed.model_json_schema(),
        "summary": Summary.model_json_schema(),
    },
    "minProperties": 1,
    "maxProperties": 1,
}
"""One line of an answer about many."""
