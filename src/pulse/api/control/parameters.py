"""What the endpoints share: who calls, which tenant and device, which page."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request

from pulse.api.control.entrance import ControlBounds
from pulse.domain.identity import ID_PATTERN
from pulse.services.control import Caller, Control

PAGE_MAX = 1000


def _control(request: Request) -> Control:
    return cast(Control, request.app.state.control)


def _bounds(request: Request) -> ControlBounds:
    return cast(ControlBounds, request.app.state.bounds)


def _caller(request: Request) -> Caller:
    """Whom the entrance let in."""
    return cast(Caller, request.state.caller)


TheControl = Annotated[Control, Depends(_control)]
TheBounds = Annotated[ControlBounds, Depends(_bounds)]
TheCaller = Annotated[Caller, Depends(_caller)]

TenantId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]
DeviceId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]
After = Annotated[str, Query(pattern=f"^({ID_PATTERN})?$", description="Begin behind this id.")]
Prefix = Annotated[str, Query(pattern=f"^({ID_PATTERN})?$", description="How the ids begin.")]
Limit = Annotated[int, Query(ge=1, le=PAGE_MAX, description="How many to list.")]
Enabled = Annotated[bool | None, Query(description="Only those that are, or are not; default: both.")]
BIGINT_MAX = 2**63 - 1
