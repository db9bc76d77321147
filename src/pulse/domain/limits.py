"""How often a device and a tenant may send: a token bucket each, without a clock of its own.

A bucket holds `burst` tokens and gets `per_s` new ones a second; a message takes one. It is kept as one number, the
moment at which it would be full again (GCRA, the "virtual scheduling algorithm" of ITU-T I.371), so one whose moment
is past is the same as none at all, and forgetting it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from pulse.domain.errors import LimitExceeded, Reason
from pulse.domain.identity import ID_PATTERN

NS_PER_S = 1_000_000_000
_RATE_PATTERN = ID_PATTERN + r"=[0-9]{1,7}(\.[0-9]{1,3})?/[1-9][0-9]{0,8}"
OVERRIDES_PATTERN = rf"^({_RATE_PATTERN}(, *{_RATE_PATTERN})*)?$"
"""`tenant_id=per_s/burst`, separated by commas; nothing is no override."""


class Rate(msgspec.Struct, frozen=True):
    """`per_s` messages a second in the long run, `burst` at once; a `per_s` of 0 is no limit at all."""

    per_s: float
    burst: int


def parse_overrides(text: str) -> dict[str, Rate]:
    """The rates by tenant of a text that matches OVERRIDES_PATTERN.

    >>> parse_overrides("acme=50/100, beta=0/1")
    {'acme': Rate(per_s=50.0, burst=100), 'beta': Rate(per_s=0.0, burst=1)}
    """
    rates = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        tenant_id, _, rate = part.partition("=")
        per_s, _, burst = rate.partition("/")
        rates[tenant_id] = Rate(float(per_s), int(burst))
    return rates


class Buckets:
    """The buckets of any number of senders that may have rates of their own; `idle_ns` is what the slowest one takes
    to be full again.

    Two generations: a bucket that is used moves to the young one, and every `idle_ns` the old one, in which all are
    full by then, is dropped. So it holds who sent within twice that time, and nobody has to sweep.
    """

    def __init__(self, *, idle_ns: int) -> None:
        self._idle_ns = idle_ns
        self._young: dict[object, int] = {}
        self._old: dict[object, int] = {}
        self._young_since_ns = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def full_at_ns(self, key: object, now_ns: int) -> int:
        """When the bucket of `key` will be full again: `now_ns` where it is."""
        if now_ns - self._young_since_ns >= self._idle_ns:
            self._old = self._young if now_ns - self._young_since_ns < 2 * self._idle_ns else {}
            self._young, self._young_since_ns = {}, now_ns
        full_at = self._young.get(key)
        if full_at is None:
            full_at = self._old.get(key, now_ns)
        return max(full_at, now_ns)

    def put(self, key: object, full_at_ns: int) -> None:
        """Note when the bucket of `key` will be full again."""
        self._young[key] = full_at_ns


class _Limit:
    """A rate in whole ns, an interval rounded up so that never more is given than promised; 0 for no limit."""

    __slots__ = ("burst_ns", "interval_ns", "name", "rate", "who")

    def __init__(self, rate: Rate, who: str, name: str) -> None:
        self.rate, self.who, self.name = rate, who, name
        self.interval_ns = math.ceil(NS_PER_S / rate.per_s) if rate.per_s else 0
        self.burst_ns = rate.burst * self.interval_ns

    def next_full_at_ns(self, full_at_ns: int, now_ns: int) -> int:
        """When the bucket will be full again if it gives one token now; LimitExceeded where it has none."""
        next_full_at_ns = full_at_ns + self.interval_ns
        over_ns = next_full_at_ns - now_ns - self.burst_ns
        if over_ns > 0:
            raise LimitExceeded(
                Reason.RATE_LIMITED,
                f"{self.who} may send {self.rate.per_s:g} messages a second, and {self.rate.burst} at once",
                limit=self.name,
                value=self.rate.per_s,
                retry_after_s=over_ns / NS_PER_S,
            )
        return next_full_at_ns


class RateLimits:
    """Who may send now; the same rate for every device, and for every tenant that `overrides` does not name.

    A message counts against both or, where one of them refuses it, against neither: a device that sends too much
    takes nothing from its neighbours. The refusal names the setting.
    """

    def __init__(self, *, device: Rate, tenant: Rate, overrides: Mapping[str, Rate] | None = None) -> None:
        self._device = _Limit(device, "a device", "device_messages_per_s")
        self._tenant = _Limit(tenant, "this tenant", "tenant_messages_per_s")
        self._overrides = {
            tenant_id: _Limit(rate, "this tenant", "tenant_messages_overrides")
            for tenant_id, rate in (overrides or {}).items()
        }
        self._devices = Buckets(idle_ns=self._device.burst_ns)
        self._tenants = Buckets(idle_ns=max(each.burst_ns for each in (self._tenant, *self._overrides.values())))

    @property
    def buckets(self) -> int:
        """How many buckets are remembered."""
        return len(self._devices) + len(self._tenants)

    def admit(self, tenant_id: str, device_id: str, now_ns: int) -> None:
        """Count one message of this device, or raise LimitExceeded; `now_ns` must never go back."""
        device, tenant = self._device, self._overrides.get(tenant_id, self._tenant)
        device_full_at_ns = 0
        device_key = (tenant_id, device_id)
        if device.interval_ns:
            device_full_at_ns = device.next_full_at_ns(self._devices.full_at_ns(device_key, now_ns), now_ns)
        if tenant.interval_ns:
            full_at_ns = self._tenants.full_at_ns(tenant_id, now_ns)
            self._tenants.put(tenant_id, tenant.next_full_at_ns(full_at_ns, now_ns))
        if device.interval_ns:
            self._devices.put(device_key, device_full_at_ns)
