"""How often a device and a tenant may send: a token bucket each, without a clock of its own.

A bucket holds `burst` tokens and gets `per_s` new ones a second; a message takes one. It is kept as one number, the
moment at which it would be full again (GCRA, the "virtual scheduling algorithm" of ITU-T I.371), so one whose moment
is past is the same as none at all, and forgetting it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from pulse.domain.errors import LimitExceeded, Reason, Refusal

NS_PER_S = 1_000_000_000
PER_S_MAX = 1_000_000
PER_S_MIN = 0.001
BURST_MAX = 1_000_000_000
LOOK_NS = NS_PER_S
"""How often some of the tenants that have rates of their own are looked at, whether they still need their buckets."""
LOOKS_MAX = 256
"""How many at once: 0.05 ms."""


class Rate(msgspec.Struct, frozen=True):
    """`per_s` messages a second in the long run, `burst` at once; a `per_s` of 0 is no limit at all."""

    per_s: Annotated[float, Meta(ge=0, le=PER_S_MAX)]
    burst: Annotated[int, Meta(ge=1, le=BURST_MAX)]


class TenantLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The rates that a tenant has of its own, all its devices together and each of them; None: as the settings say."""

    messages: Rate | None = None
    device_messages: Rate | None = None


NO_LIMITS = TenantLimits()
"""Of a tenant that has none of its own."""
LimitsOf = Callable[[str], TenantLimits | None]


def check_rate(rate: Rate, *, field: str) -> Rate:
    """`rate`, if it is within bounds; else Refusal INVALID_REQUEST that names `field`."""
    if rate.per_s != 0 and not PER_S_MIN <= rate.per_s <= PER_S_MAX:
        bounds = f"0 (no limit), or {PER_S_MIN:g} to {PER_S_MAX} messages a second"
        raise Refusal(Reason.INVALID_REQUEST, f"a rate is {bounds}", field=f"{field}.per_s")
    if not 1 <= rate.burst <= BURST_MAX:
        raise Refusal(Reason.INVALID_REQUEST, f"a burst is 1 to {BURST_MAX} messages", field=f"{field}.burst")
    return rate


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

    def exceeded(self, over_ns: int) -> LimitExceeded:
        """What a sender is told whose bucket would be full again `over_ns` too late."""
        return LimitExceeded(
            Reason.RATE_LIMITED,
            f"{self.who} may send {self.rate.per_s:g} messages a second, and {self.rate.burst} at once",
            limit=self.name,
            value=self.rate.per_s,
            retry_after_s=over_ns / NS_PER_S,
        )


def _nobodys(_tenant_id: str) -> None:
    """No tenant has limits of its own."""


class _Shares:
    """The limits that hold for some tenants, and what they have used of them."""

    __slots__ = ("device", "devices", "given", "idle_ns", "tenant", "tenants", "used_ns")

    def __init__(self, device: Rate, tenant: Rate, given: TenantLimits) -> None:
        self.given = given
        self.device = _Limit(device, "a device", "device_messages_per_s")
        self.tenant = _Limit(tenant, "this tenant", "tenant_messages_per_s")
        self.devices = Buckets(idle_ns=self.device.burst_ns)
        self.tenants = Buckets(idle_ns=self.tenant.burst_ns)
        self.idle_ns = max(self.device.burst_ns, self.tenant.burst_ns)
        self.used_ns = 0


class RateLimits:
    """Who may send now: at `device` and `tenant` rate, or at those that `of_tenant` has for a tenant at this moment.

    A message counts against both or, where one of them refuses it, against neither: a device that sends too much
    takes nothing from its neighbours. A tenant whose rates are changed begins with full buckets.

    Of a tenant that has rates of its own nothing is kept once they are taken away, or once all its buckets are full
    again: LOOKS_MAX of these tenants are looked at every LOOK_NS, as long as anybody sends.
    """

    def __init__(self, *, device: Rate, tenant: Rate, of_tenant: LimitsOf = _nobodys) -> None:
        self._device, self._tenant = device, tenant
        self._of_tenant = of_tenant
        self._all = _Shares(device, tenant, NO_LIMITS)
        self._own: dict[str, _Shares] = {}
        self._unseen: list[str] = []
        self._look_ns = 0

    @property
    def buckets(self) -> int:
        """How many buckets are remembered."""
        return sum(len(each.devices) + len(each.tenants) for each in (self._all, *self._own.values()))

    def admit(self, tenant_id: str, device_id: str, now_ns: int) -> None:
        """Count one message of this device, or raise LimitExceeded; `now_ns` must never go back."""
        if now_ns >= self._look_ns:
            self._look(now_ns)
        given = self._of_tenant(tenant_id)
        shares = self._all if given is None else self._own_shares(tenant_id, given, now_ns)
        device, tenant = shares.device, shares.tenant
        device_key, device_full_at_ns = (tenant_id, device_id), 0
        if device.interval_ns:
            device_full_at_ns = shares.devices.full_at_ns(device_key, now_ns) + device.interval_ns
            if (over_ns := device_full_at_ns - now_ns - device.burst_ns) > 0:
                raise device.exceeded(over_ns)
        if tenant.interval_ns:
            full_at_ns = shares.tenants.full_at_ns(tenant_id, now_ns) + tenant.interval_ns
            if (over_ns := full_at_ns - now_ns - tenant.burst_ns) > 0:
                raise tenant.exceeded(over_ns)
            shares.tenants.put(tenant_id, full_at_ns)
        if device.interval_ns:
            shares.devices.put(device_key, device_full_at_ns)

    def _own_shares(self, tenant_id: str, given: TenantLimits, now_ns: int) -> _Shares:
        shares = self._own.get(tenant_id)
        if shares is None or shares.given != given:
            device, tenant = given.device_messages, given.messages
            shares = _Shares(device or self._device, tenant or self._tenant, given)
            self._own[tenant_id] = shares
        shares.used_ns = now_ns
        return shares

    def _look(self, now_ns: int) -> None:
        """Let go of what some tenants had, where their rates are gone or it would be the same as none."""
        self._look_ns = now_ns + LOOK_NS
        if not self._unseen:
            self._unseen = list(self._own)
        looked_at = self._unseen[-LOOKS_MAX:]
        del self._unseen[-LOOKS_MAX:]
        for tenant_id in looked_at:
            shares = self._own.get(tenant_id)
            if shares is None:
                continue
            if now_ns - shares.used_ns >= shares.idle_ns or self._of_tenant(tenant_id) is None:
                del self._own[tenant_id]
