"""What is counted of commands."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from pulse.domain.command import State
from pulse.runtime.metrics.table import counter, gauge, histogram

OUTCOMES = ("moved", "late", "dead", "not_kept", "already_settled")
"""Each is there from the start, so that its first increase is seen as one; and so are the states."""


class MoveMetrics:
    """Counts what becomes of commands, whoever moves them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._moves = counter(registry, "pulse_commands_moves_total")
        for state in State:
            self._moves.labels(state.value)

    def moved(self, states: Mapping[State, int]) -> None:
        """So many commands came into each of these states."""
        for state, count in states.items():
            self._moves.labels(state.value).inc(count)


class CommandMetrics(MoveMetrics):
    """Counts what a worker settles."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        messages = counter(registry, "pulse_commands_messages_total")
        self._moved, self._late, self._dead, self._not_kept, self._already = map(messages.labels, OUTCOMES)
        self._rejected = counter(registry, "pulse_commands_rejected_total")
        self._redelivered = counter(registry, "pulse_commands_redelivered_total")
        self._commit = histogram(registry, "pulse_commands_commit_seconds")
        self._waiting = gauge(registry, "pulse_commands_waiting")

    def settled(
        self, *, words: int, late: int, dead: int, not_kept: int, rejected: int, already_settled: int, commit_s: float
    ) -> None:
        """One transaction has committed in `commit_s`: words that moved their command, late ones, letters buried,
        answers to unknown commands that were not kept; so many answers were rejected to their devices."""
        self._moved.inc(words)
        self._late.inc(late)
        self._dead.inc(dead)
        self._not_kept.inc(not_kept)
        self._rejected.inc(rejected)
        self._already.inc(already_settled)
        self._commit.observe(commit_s)

    def redelivered(self, count: int) -> None:
        """`count` messages came once more."""
        self._redelivered.inc(count)

    def waiting(self, system: str, waiting: bool) -> None:
        """The worker began or ended waiting out an outage of `system`."""
        self._waiting.labels(system).set(1 if waiting else 0)


class FleetMetrics(MoveMetrics):
    """Counts what is made, and ended, for fleets."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._made = counter(registry, "pulse_fleets_made_total")
        self._waiting = gauge(registry, "pulse_fleets_waiting")

    def made(self, count: int) -> None:
        """`count` commands of a fleet were made."""
        self._made.inc(count)

    def waiting(self, system: str, waiting: bool) -> None:
        """The expander began or ended waiting out an outage of `system`."""
        self._waiting.labels(system).set(1 if waiting else 0)


class SweepMetrics(MoveMetrics):
    """Counts what time does to commands."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._again = counter(registry, "pulse_commands_said_again_total")

    def said_again(self, count: int) -> None:
        """`count` commands are sent again."""
        self._again.inc(count)
