"""Which devices somebody looks for."""

from __future__ import annotations

import msgspec

from pulse.domain.presence import Presence

TEXT_LENGTH_MAX = 200


class DeviceSearch(msgspec.Struct, frozen=True, kw_only=True):
    """What is None or empty does not matter; `text` is a part of the id or the name, in any case."""

    tenant_id: str | None = None
    text: str = ""
    enabled: bool | None = None
    presence: Presence | None = None
