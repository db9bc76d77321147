"""Rejected answers to commands, for devices that ask over HTTP: what passes through DOWN, until it is handed out once.

It is kept in memory, in each gateway, for a while: a device that asks another gateway hears of it there, and what a
gateway has not handed out when it ends is lost. The record of what becomes of an answer is the command.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable

Device = tuple[str, str]
"""Tenant and device id."""
DEVICES_MAX = 5000
"""Some 10 MB, where all of them have as many as may be."""
EACH_MAX = 8
KEPT_S = 300.0


class Rejections:
    """The last few of each device; those that are oldest make room."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[Device, deque[tuple[float, bytes]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, device: Device, document: bytes) -> None:
        """The device is to hear `document`, which is JSON."""
        self._kept.setdefault(device, deque(maxlen=EACH_MAX)).append((self._clock(), document))
        self._kept.move_to_end(device)
        while len(self._kept) > DEVICES_MAX:
            self._kept.popitem(last=False)

    def take(self, device: Device) -> list[bytes]:
        """What the device has not been told yet, oldest first."""
        since = self._clock() - KEPT_S
        return [document for at, document in self._kept.pop(device, ()) if at >= since]
