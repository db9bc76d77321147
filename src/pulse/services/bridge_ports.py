"""What the bridge needs of others for one message: JetStream, the way back to the broker, and somebody who counts."""

from __future__ import annotations

from typing import Protocol

from pulse.domain.receipt import Waiting


class Publisher(Protocol):
    """JetStream."""

    def send(self, subject: str, body: bytes, *, message_id: str, waiting: Waiting) -> None:
        """`waiting` gets the receipt once the message is on disk, or an error; raises Outage or Refusal at once."""


class Connection(Protocol):
    """The way back to the broker."""

    def acknowledge(self, packet_id: int) -> None:
        """Let the broker forget the message of this connection that has this packet id."""

    def pause(self) -> None:
        """Hand over no more for now."""

    def resume(self) -> None:
        """Go on."""


class BridgeMetrics(Protocol):
    """What is counted: each message once as received, and once by what became of it."""

    def received(self, count: int) -> None:
        """So many messages came, repeated ones included."""

    def settled(self, outcome: str, seconds: float) -> None:
        """After so long one is `stored`, a `duplicate`, a `dead_letter`, `rejected` (its device is told), `refused`, or
        `repeated`: here already."""

    def refused(self, reason: str, outcome: str) -> None:
        """One was not accepted; `outcome` says whether it is a `dead_letter`, `rejected`, or only `refused`."""

    def waiting(self, system: str, waiting: bool) -> None:
        """One of the bridge's parts began or ceased to wait for a system; each ceases as often as it began."""
