"""What the shadow worker counts."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from pulse.runtime.metrics.table import counter, gauge, histogram


class ShadowMetrics:
    """Counts what becomes of the messages of SHADOW."""

    def __init__(self, registry: CollectorRegistry) -> None:
        messages = counter(registry, "pulse_shadow_messages_total")
        self._accepted = messages.labels("accepted")
        self._answered = messages.labels("answered")
        self._rejected = messages.labels("rejected")
        self._dead = messages.labels("dead")
        self._already_settled = messages.labels("already_settled")
        self._redelivered = counter(registry, "pulse_shadow_redelivered_total")
        self._batch = histogram(registry, "pulse_shadow_batch_messages")
        self._commit = histogram(registry, "pulse_shadow_commit_seconds")
        self._waiting = gauge(registry, "pulse_shadow_waiting")
        self._end_to_end = histogram(registry, "pulse_shadow_end_to_end_seconds")

    def settled(
        self,
        *,
        accepted: int,
        answered: int,
        rejected: int,
        dead: int,
        already_settled: int,
        commit_s: float,
        end_to_end_s: Sequence[float],
    ) -> None:
        """One transaction settled that many messages in `commit_s`; `end_to_end_s` is of a sample of them."""
        self._accepted.inc(accepted)
        self._answered.inc(answered)
        self._rejected.inc(rejected)
        self._dead.inc(dead)
        self._already_settled.inc(already_settled)
        self._batch.observe(accepted + answered + rejected + dead + already_settled)
        self._commit.observe(commit_s)
        for seconds in end_to_end_s:
            self._end_to_end.observe(seconds)

    def waiting(self, system: str, waiting: bool) -> None:
        """The worker began or ended waiting out an outage of `system`."""
        self._waiting.labels(system).set(1 if waiting else 0)

    def redelivered(self, count: int) -> None:
        """`count` messages came once more."""
        self._redelivered.inc(count)
